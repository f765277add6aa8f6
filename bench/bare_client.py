"""The least that reading from the server can cost: its ranges, fetched concurrently into memory and thrown away.

Takes a job as JSON on standard input: `endpoint`, `key`, `secret`, `bucket`, `ranges` ([object, start, end]) and
`concurrency`; prints the seconds it took. The client is the fastest there is for Python (obstore, Rust below).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import obstore
from obstore.store import S3Store


async def fetch(job: dict[str, Any]) -> float:
    store = S3Store(
        job["bucket"],
        endpoint=job["endpoint"],
        region="us-east-1",
        access_key_id=job["key"],
        secret_access_key=job["secret"],
        client_options={"allow_http": True},
    )
    todo = iter(job["ranges"])

    async def work() -> None:
        for key, start, end in todo:
            data = await obstore.get_range_async(store, key, start=start, end=end)
            assert len(memoryview(data)) == end - start

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(job["concurrency"])))
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(asyncio.run(fetch(json.load(sys.stdin))), flush=True)
    # The client's threads do not always survive the interpreter's end.
    os._exit(0)
