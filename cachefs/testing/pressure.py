"""Many readers at once, in one process beside the mount: what they make of the memory of our processes is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cachefs.model import CachefsError, MiB

_READERS = r"""
import collections, json, os, random, select, sys, threading
root, large, small, threads, unit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), 1 << 20
threading.stack_size(1 << 18)
done, errors, over = collections.Counter(), [], threading.Event()

def path(*names):
    return os.path.join(root, *names)

def read_large(chance):
    file = "large/%d" % chance.randrange(large)
    fd = os.open(path(file), os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(8):
            if over.is_set():
                return
            at = chance.randrange(size // unit) * unit
            os.posix_fadvise(fd, at, unit, os.POSIX_FADV_DONTNEED)
            data = os.pread(fd, unit, at)
            number = at // unit % 251
            if len(data) != unit or data[0] != number or data[-1] != number or data.count(number) != unit:
                errors.append(file + ": wrong bytes at %d" % at)
            done["large"] += 1
    finally:
        os.close(fd)

def read_small(chance):
    number = chance.randrange(small)
    with open(path("small", "%05d" % number), "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read() != b"%05d" % number * 4000:
            errors.append("small: wrong bytes")
    done["small"] += 1

def list_names(chance):
    if len(os.listdir(path("small"))) != small:
        errors.append("listing: not all names")
    done["listing"] += 1

def work(number):
    chance = random.Random(number)
    kinds = [read_large] if number % 8 < 6 else [read_small] if number % 8 == 6 else [read_small, list_names]
    while not over.is_set():
        for kind in kinds:
            try:
                kind(chance)
            except OSError as error:
                errors.append("%s: %s" % (kind.__name__, error))

threads = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
for each in threads:
    each.start()
print("begun", flush=True)
sys.stdin.read()
over.set()
for each in threads:
    each.join()
json.dump({"done": done, "errors": errors[:20]}, sys.stdout)
"""

SMALL_BYTES = 20_000


class Pressed(NamedTuple):
    done: dict[str, int]
    """Kind of work ("large": reads of 1 MiB, "small": files read, "listing": directories listed) -> how often."""
    errors: list[str]
    """The first twenty: of the system, and of bytes that were wrong."""


class Memory(NamedTuple):
    """Of one process, bytes."""

    peak: int
    """Resident, at its highest: with what it maps of files."""
    anonymous: int
    """Resident now, without that."""
    descriptors: int
    """Open now."""


def make_files(directory: Path, large: int, large_bytes: int, small: int) -> None:
    """`large` files, of whole MiB, and `small` ones, in two directories. Old enough to be believed."""
    for name in ("large", "small"):
        (directory / name).mkdir(parents=True)
    for number in range(large):
        with (directory / "large" / str(number)).open("wb") as file:
            for unit in range(large_bytes // MiB):
                file.write(bytes([unit % 251]) * MiB)
        os.utime(file.name, (1, 1))
    for number in range(small):
        path = directory / "small" / f"{number:05d}"
        path.write_bytes(b"%05d" % number * (SMALL_BYTES // 5))
        os.utime(path, (1, 1))


class Pressure:
    """Made by `pressing`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def stop(self, limit_s: float = 120.0) -> Pressed:
        """What was done. Raises CachefsError when a reader hangs."""
        try:
            said, _ = self._process.communicate(b"", timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise CachefsError("a reader hangs") from error
        if self._process.returncode != 0:
            raise CachefsError(f"the readers ended with status {self._process.returncode}")
        return Pressed(**json.loads(said))


@contextmanager
def pressing(mountpoint: Path, large: int, small: int, threads: int) -> Iterator[Pressure]:
    """So many readers of what `make_files` made, none of whom finds anything in the kernel's page cache, until `stop`:
    three quarters read 1 MiB at random places of the large files, the others small ones, half of them list as well.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _READERS, mountpoint, str(large), str(small), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"begun\n":
            raise CachefsError("the readers did not begin")
        yield Pressure(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def memory_of(pid: int) -> Memory:
    """By /proc/PID/status, see proc(5)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    peak, anonymous = (int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
    return Memory(peak, anonymous, len(os.listdir(f"/proc/{pid}/fd")))
