"""What the demo can show where nothing can be mounted: master and worker, read through the client library."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import trio
import xxhash

from cachefs.client import Client, ClientConfig, open_client
from cachefs.net import parse_address
from cachefs.testing.processes import running
from cachefs.testing.s3server import S3Server

READERS = 4
CHUNK = 8 << 20


def read_through_client(
    server: S3Server, url: str, directory: Path, checksums: dict[str, str], step: Callable[[str], None]
) -> None:
    """Read everything twice and compare every checksum. Raises SystemExit when a byte is wrong."""
    loopback = ["--insecure", "--listen", "127.0.0.1:0", "--log-level", "WARNING"]
    namespace = ["--data-dir", directory / "master", "--mount", f"/={url}"]
    socket, tier = directory / "worker.sock", f"ssd:{directory / 'tier'}:4G"
    environment = {"CACHEFS_UFS_OPTIONS": json.dumps(server.ufs_options)}
    with running("master", *namespace, *loopback, environment=environment) as master:
        address = master.facts["listen"]
        with running("worker", "--master", address, "--socket", socket, "--tier", tier, *loopback):
            config = ClientConfig(parse_address(address), str(socket))
            for name in ("cold (bucket)", "warm (worker)"):
                began = time.perf_counter()
                size = trio.run(_read_all, config, checksums)
                seconds = time.perf_counter() - began
                rate = f"{size / seconds / 1e6:,.0f} MB/s, {len(checksums) / seconds:,.0f} files/s"
                step(f"{name}, through the client library: {rate}, every checksum equal")


async def _read_all(config: ClientConfig, checksums: dict[str, str]) -> int:
    keys = list(checksums)
    random.shuffle(keys)
    size = 0

    async def read(client: Client, share: list[str]) -> None:
        nonlocal size
        for key in share:
            digest = xxhash.xxh3_64()
            async for data in client.read_file(f"/{key}", CHUNK):
                digest.update(data)
                size += len(data)
            if digest.hexdigest() != checksums[key]:
                raise SystemExit(f"WRONG BYTES in {key}")

    async with open_client(config) as client, trio.open_nursery() as nursery:
        for start in range(READERS):
            nursery.start_soon(read, client, keys[start::READERS])
    return size
