"""Makes data sets: the same files natively and as objects, a piece at a time, the same bytes in every run.

Runs in a process of its own (`python -m bench.data`, a `Job` as JSON on standard input): the client that uploads is the
fastest there is for Python, and leaves threads behind.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import msgspec
import xxhash

from bench.jobs import decode
from bench.workloads.base import Workload
from bench.workloads.registry import loaded

Content = Callable[[str, int], bytes | None]
PIECE = 1 << 20
UPLOADS = 16
MULTIPART_BYTES = 64 << 20
"""Larger files are uploaded in parts."""
_POOL_PIECES = 16


class Job(msgspec.Struct, kw_only=True):
    native: Path
    endpoint: str
    key: str
    secret: str
    bucket: str
    prefix: str
    files: dict[str, int]
    seed: int
    workload: str
    """MODULE:CLASS, with `scale` and `options`: who may know a file's content."""
    scale: str
    options: dict[str, str]


def random_pieces(path: str, size: int, seed: int = 0) -> Iterator[memoryview]:
    """A file of bytes that do not compress, and that `seed` and `path` determine; at most a `PIECE` at a time."""
    pool = memoryview(_pool())
    for start in range(0, size, PIECE):
        offset = xxhash.xxh3_64_intdigest(f"{seed}/{start}/{path}".encode()) % (len(pool) - PIECE)
        yield pool[offset : offset + min(PIECE, size - start)]


@cache
def _pool() -> bytes:
    """What all files are cut out of, each piece elsewhere: random bytes are slow to make."""
    return random.Random(0).randbytes(_POOL_PIECES * PIECE)


def write_native(native: Path, files: Mapping[str, int], seed: int, content: Content | None = None) -> None:
    """`content`: of path and size; None where random bytes do. Raises ValueError for content of another size."""
    for path, size in files.items():
        target = native / path
        target.parent.mkdir(parents=True, exist_ok=True)
        own = content(path, size) if content is not None else None
        if own is not None and len(own) != size:
            raise ValueError(f"{path}: {len(own)} bytes were made instead of the {size} that were announced")
        with target.open("wb", buffering=0) as file:
            for piece in [own] if own is not None else random_pieces(path, size, seed):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]


async def upload(job: Job) -> None:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        job.bucket,
        endpoint=job.endpoint,
        region="us-east-1",
        access_key_id=job.key,
        secret_access_key=job.secret,
        unsigned_payload=True,
        client_options={"allow_http": True, "timeout": "300s"},
    )
    todo = iter(job.files.items())

    async def work() -> None:
        for path, size in todo:
            name = f"{job.prefix}/{path}"
            if size > MULTIPART_BYTES:
                await obstore.put_async(store, name, job.native / path, use_multipart=True, chunk_size=8 << 20)
            else:
                await obstore.put_async(store, name, (job.native / path).read_bytes(), use_multipart=False)

    await asyncio.gather(*(work() for _ in range(UPLOADS)))


def main() -> None:
    job = decode(sys.stdin.buffer.read(), Job)
    workload = loaded(job.workload, job.scale, job.options)
    assert isinstance(workload, Workload)
    write_native(job.native, job.files, job.seed, workload.content)
    asyncio.run(upload(job))
    sys.stdout.flush()
    sys.stderr.flush()
    # The client's threads do not always survive the interpreter's end.
    os._exit(0)


if __name__ == "__main__":
    main()
