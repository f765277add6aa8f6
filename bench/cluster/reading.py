"""A reading process that asks its worker, through the client library. No page cache hides what the worker is asked for.

Takes a job as JSON on standard input, prints what it measured as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import trio
import xxhash

from cachefs.client import Client, ClientConfig, open_client
from cachefs.net import parse_address

READERS = 4
CHUNK = 8 << 20


async def read_files(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: list of [path, xxh3_64 in hex], read in that order by four readers. `pace_s`: seconds that at least pass
    from one file to the next.
    """
    wrong: list[str] = []
    size = 0
    began = time.perf_counter()

    async def read(client: Client, files: Iterator[tuple[int, list[str]]]) -> None:
        nonlocal size
        for number, (path, expected) in files:
            await trio.sleep_until(start + number * job["pace_s"])
            digest = xxhash.xxh3_64()
            async for data in client.read_file(path, CHUNK):
                digest.update(data)
                size += len(data)
            if digest.hexdigest() != expected:
                wrong.append(path)

    config = ClientConfig(parse_address(job["master"]), job["socket"])
    async with open_client(config) as client, trio.open_nursery() as nursery:
        start = trio.current_time()
        files = enumerate(job["files"])
        for _ in range(READERS):
            nursery.start_soon(read, client, files)
    return {"seconds": time.perf_counter() - began, "bytes": size, "files": len(job["files"]), "wrong": wrong}


if __name__ == "__main__":
    json.dump(trio.run(read_files, json.load(sys.stdin)), sys.stdout)
