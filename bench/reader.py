"""One reading process: takes a job as JSON on standard input, prints what it measured as JSON.

Only opening, reading and closing is timed; comparing checksums is not.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import xxhash

CHUNK = 1 << 20


def read_files(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: list of [path, xxh3_64 in hex]. Reads each once, in that order."""
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    spent = total = 0.0
    wrong: list[str] = []
    for path, expected in job["files"]:
        digest = xxhash.xxh3_64()
        begin = time.perf_counter()
        fd = os.open(path, os.O_RDONLY)
        while count := os.readv(fd, [buffer]):
            spent += time.perf_counter() - begin
            digest.update(view[:count])
            total += count
            begin = time.perf_counter()
        os.close(fd)
        spent += time.perf_counter() - begin
        if digest.hexdigest() != expected:
            wrong.append(path)
    return {"seconds": spent, "bytes": int(total), "files": len(job["files"]), "wrong": wrong}


def read_sequentially(job: dict[str, Any]) -> dict[str, Any]:
    """`path`, from its beginning to its end, `block` bytes at a time."""
    buffer = bytearray(job["block"])
    total = 0
    fd = os.open(job["path"], os.O_RDONLY)
    begin = time.perf_counter()
    while count := os.readv(fd, [buffer]):
        total += count
    spent = time.perf_counter() - begin
    os.close(fd)
    return {"seconds": spent, "bytes": total, "operations": total // job["block"]}


def read_randomly(job: dict[str, Any]) -> dict[str, Any]:
    """`count` reads of `block` bytes of `path`, at aligned offsets that `seed` determines."""
    buffers = [bytearray(job["block"])]
    fd = os.open(job["path"], os.O_RDONLY)
    blocks = os.fstat(fd).st_size // job["block"]
    random_ = random.Random(job["seed"])
    offsets = [random_.randrange(blocks) * job["block"] for _ in range(job["count"])]
    preadv = os.preadv
    begin = time.perf_counter()
    for offset in offsets:
        preadv(fd, buffers, offset)
    spent = time.perf_counter() - begin
    os.close(fd)
    return {"seconds": spent, "bytes": len(offsets) * job["block"], "operations": len(offsets)}


def open_read_close(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: paths of small files; each is opened, read by one call, and closed."""
    buffer = [bytearray(CHUNK)]
    total = 0
    begin = time.perf_counter()
    for path in job["files"]:
        fd = os.open(path, os.O_RDONLY)
        total += os.readv(fd, buffer)
        os.close(fd)
    spent = time.perf_counter() - begin
    return {"seconds": spent, "bytes": total, "operations": len(job["files"])}


JOBS = {each.__name__: each for each in (read_files, read_sequentially, read_randomly, open_read_close)}

if __name__ == "__main__":
    given = json.load(sys.stdin)
    json.dump(JOBS[given["job"]](given), sys.stdout)
