"""One reading process: takes a job as JSON in a line of standard input, prints what it measured as JSON.

Only opening, reading and closing is timed; comparing checksums is not.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import xxhash

CHUNK = 1 << 20
TURN = 50
"""Files in a turn."""
READY = "ready"


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


def read_each(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: list of [path, xxh3_64 in hex, or "" where none is compared]. Waits to be started; opens, reads and
    closes each in that order. The seconds that each took, without comparing.
    """
    buffer = bytearray(CHUNK)
    view, into = memoryview(buffer), [buffer]
    taken: list[float] = []
    wrong: list[str] = []
    total = 0
    clock, open_, readv, close = time.perf_counter, os.open, os.readv, os.close
    wait_to_be_started()
    for path, expected in job["files"]:
        digest = xxhash.xxh3_64() if expected else None
        comparing = 0.0
        begin = clock()
        fd = open_(path, os.O_RDONLY)
        while count := readv(fd, into):
            total += count
            if digest is not None:
                paused = clock()
                digest.update(view[:count])
                comparing += clock() - paused
        close(fd)
        taken.append(clock() - begin - comparing)
        if digest is not None and digest.hexdigest() != expected:
            wrong.append(path)
    return {"taken": taken, "bytes": total, "wrong": wrong}


def look_at_each(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: paths, of which each is looked at by stat(2), in that order, when started. The seconds each took."""
    taken: list[float] = []
    clock, stat = time.perf_counter, os.stat
    wait_to_be_started()
    for path in job["files"]:
        begin = clock()
        stat(path)
        taken.append(clock() - begin)
    return {"taken": taken}


def wait_to_be_started() -> None:
    """Tells that this process is up, so that all of them begin at once."""
    print(READY, flush=True)
    sys.stdin.readline()


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """Read the same from several `places`, in turns of a few milliseconds, so that whatever else the machine does meets
    all of them alike. `kind` says what: sequential, random or small. Per place: operations and the seconds they took.
    """
    spent = dict.fromkeys(job["places"], 0.0)
    operations = dict.fromkeys(job["places"], 0)
    turns = {place: TURNS[job["kind"]](root, job) for place, root in job["places"].items()}
    order = list(turns)
    for prepare in turns.values():
        # Opening files and choosing offsets is not timed: each generator first comes to a yield of 0.
        next(prepare)
    while True:
        order.reverse()
        for place in order:
            begin = time.perf_counter()
            count = next(turns[place], 0)
            spent[place] += time.perf_counter() - begin
            operations[place] += count
        if count == 0:
            return {place: {"seconds": spent[place], "operations": operations[place]} for place in turns}


def sequential_turns(root: str, job: dict[str, Any]) -> Iterator[int]:
    """The file `large` from its beginning to its end, 1 MiB at a time, 16 of them in a turn."""
    buffer = [bytearray(CHUNK)]
    fd = os.open(os.path.join(root, "large"), os.O_RDONLY)
    try:
        yield 0
        count = 16
        while count == 16:
            count = 0
            while count < 16 and os.readv(fd, buffer) == CHUNK:
                count += 1
            if count:
                yield count
    finally:
        os.close(fd)


def random_turns(root: str, job: dict[str, Any]) -> Iterator[int]:
    """The file `large`, 4 KiB at a time at aligned offsets that `seed` determines, 5,000 in a turn."""
    buffers = [bytearray(4096)]
    fd = os.open(os.path.join(root, "large"), os.O_RDONLY)
    try:
        blocks = os.fstat(fd).st_size // 4096
        random_ = random.Random(job["seed"])
        turns = [[random_.randrange(blocks) * 4096 for _ in range(5000)] for _ in range(40)]
        yield 0
        for offsets in turns:
            yield _read_at(fd, buffers, offsets)
    finally:
        os.close(fd)


def _read_at(fd: int, buffers: list[bytearray], offsets: list[int]) -> int:
    preadv = os.preadv
    for offset in offsets:
        preadv(fd, buffers, offset)
    return len(offsets)


def small_turns(root: str, job: dict[str, Any]) -> Iterator[int]:
    """The files in `small`: each is opened, read by one call, and closed; 50 in a turn."""
    buffer = [bytearray(CHUNK)]
    paths = [os.path.join(root, "small", f"{number:04}") for number in range(job["files"])]
    yield 0
    for start in range(0, len(paths), TURN):
        for path in paths[start : start + TURN]:
            fd = os.open(path, os.O_RDONLY)
            os.readv(fd, buffer)
            os.close(fd)
        yield len(paths[start : start + TURN])


def mapped_turns(root: str, job: dict[str, Any]) -> Iterator[int]:
    """One byte of `large` at a time through a mapping, on pages that `seed` determines, 20,000 in a turn."""
    with open(os.path.join(root, "large"), "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = len(mapped) // 4096
        random_ = random.Random(job["seed"])
        turns = [[random_.randrange(pages) * 4096 for _ in range(20_000)] for _ in range(20)]
        yield 0
        for offsets in turns:
            for offset in offsets:
                mapped[offset]
            yield len(offsets)


def read_blindly(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: paths. Opens, reads and closes each, in that order."""
    buffer = [bytearray(CHUNK)]
    begin = time.perf_counter()
    for path in job["files"]:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, buffer) == CHUNK:
            pass
        os.close(fd)
    return {"seconds": time.perf_counter() - begin, "files": len(job["files"])}


def read_at_random(job: dict[str, Any]) -> dict[str, Any]:
    """`file`: a path. Reads 4 KiB of it at `reads` aligned offsets that `seed` determines."""
    random_ = random.Random(job["seed"])
    fd = os.open(job["file"], os.O_RDONLY)
    try:
        blocks = os.fstat(fd).st_size // 4096
        offsets = [random_.randrange(blocks) * 4096 for _ in range(job["reads"])]
        begin = time.perf_counter()
        _read_at(fd, [bytearray(4096)], offsets)
        return {"seconds": time.perf_counter() - begin}
    finally:
        os.close(fd)


def look(job: dict[str, Any]) -> dict[str, Any]:
    """`files`: paths, of which each is looked at by stat(2)."""
    begin = time.perf_counter()
    for path in job["files"]:
        os.stat(path)
    return {"seconds": time.perf_counter() - begin}


TURNS = {"sequential": sequential_turns, "random": random_turns, "mapped": mapped_turns, "small": small_turns}
WORK = (read_files, read_each, read_blindly, read_at_random, look, look_at_each, compare)
JOBS = {each.__name__: each for each in WORK}

if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    json.dump(JOBS[given["job"]](given), sys.stdout)
