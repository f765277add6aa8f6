"""Readers that go on while processes of ours are killed: they compare every byte, and time every read."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cachefs.fuse import find_mount
from cachefs.model import CachefsError

WARM, HELD, MAPPED, LARGE = "warm", "held/0", "held/1", "large/0"
"""Names below the mount: a directory of small files, and three files that stay open."""
COLD = "cold"
"""A directory of files that each reader reads once."""

KINDS = ("held", "mapped", "large", "warm", "cold", "listing")
"""Of reads: of a file that is held open, by passthrough; of one that is mapped; of one that is held open in cached
mode, at first; a small file, opened and read whole; the same for the first time; and all names of a directory."""

_READER = r"""
import json, mmap, os, random, select, sys, time
root, source, number, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(number)

def path(name):
    return os.path.join(root, name)

def reference(name):
    with open(os.path.join(source, name), "rb") as file:
        return file.read()

warm = sorted(os.listdir(os.path.join(source, "warm")))
expected = {name: reference("warm/" + name) for name in warm}
cold = sorted(os.listdir(os.path.join(source, "cold")))[number::count]
held_bytes, mapped_bytes, large_bytes = map(reference, ("held/0", "held/1", "large/0"))
held, mapped, large = (os.open(path(name), os.O_RDONLY) for name in ("held/0", "held/1", "large/0"))
view = mmap.mmap(mapped, 0, prot=mmap.PROT_READ)
gaps, errors, rounds, done = {}, [], 0, 0

def timed(kind, read, wanted):
    began = time.monotonic()
    try:
        if read() != wanted:
            errors.append(kind + ": wrong bytes")
    except OSError as error:
        errors.append(kind + ": " + str(error))
    gaps[kind] = max(gaps.get(kind, 0.0), time.monotonic() - began)

def whole(name):
    with open(path(name), "rb", buffering=0) as file:
        data = b""
        while chunk := file.read(50_001):
            data += chunk
    return data

def names():
    found = []
    with os.scandir(path("warm")) as entries:
        for at, entry in enumerate(entries):
            if at % 10 == 0:
                time.sleep(0.001)
            found.append(entry.name)
    return sorted(found)

print("begun", flush=True)
while not rounds or not select.select([sys.stdin], [], [], 0)[0]:
    at = chance.randrange(len(held_bytes) - 4096)
    timed("held", lambda: os.pread(held, 4096, at), held_bytes[at : at + 4096])
    at = chance.randrange(len(mapped_bytes) - 4096)
    timed("mapped", lambda: view[at : at + 4096], mapped_bytes[at : at + 4096])
    at = chance.randrange(len(large_bytes) - 70_000)
    timed("large", lambda: os.pread(large, 70_000, at), large_bytes[at : at + 70_000])
    name = chance.choice(warm)
    timed("warm", lambda: whole("warm/" + name), expected[name])
    if done < len(cold) and rounds % 4 == 0:
        timed("cold", lambda: whole("cold/" + cold[done]), reference("cold/" + cold[done]))
        done += 1
    if rounds % 50 == 0:
        timed("listing", names, warm)
    rounds += 1
json.dump({"rounds": rounds, "errors": errors, "gaps": gaps}, sys.stdout)
"""


class Report(NamedTuple):
    rounds: int
    """Of reads, of all readers together."""
    errors: list[str]
    gaps: dict[str, float]
    """Kind of read -> the longest one, in seconds."""


class Readers:
    """Processes that read until `stop`."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes

    def stop(self, limit_s: float = 60.0) -> Report:
        """What they saw. Raises CachefsError when one of them hangs or died."""
        found: list[dict[str, Any]] = []
        for process in self._processes:
            try:
                said, _ = process.communicate(b"stop\n", timeout=limit_s)
            except subprocess.TimeoutExpired as error:
                raise CachefsError(f"a reader hangs: {_where(process.pid)}") from error
            if process.returncode != 0:
                raise CachefsError(f"a reader ended with status {process.returncode}")
            found.append(json.loads(said))
        kinds = {kind for each in found for kind in each["gaps"]}
        return Report(
            sum(each["rounds"] for each in found),
            [error for each in found for error in each["errors"]],
            {kind: max(each["gaps"].get(kind, 0.0) for each in found) for kind in sorted(kinds)},
        )


def _where(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError as error:
        return str(error)


def make_source(directory: Path, cold: int) -> None:
    """What the readers expect to find: 40 warm files, two that are held, a large one, and so many cold ones."""
    chance = random.Random(1)
    sizes = {
        **{f"{WARM}/{number:03}": 20_000 + number for number in range(40)},
        **{f"{COLD}/{number:05}": 5_000 + number % 100 for number in range(cold)},
        HELD: 300_000,
        MAPPED: 300_000,
        LARGE: 3_000_000,
    }
    for name, size in sizes.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(chance.randbytes(size))


@contextmanager
def reading(mountpoint: Path, source: Path, count: int = 2) -> Iterator[Readers]:
    """So many readers, once each has everything open. They are killed with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            arguments = [str(mountpoint), str(source), str(number), str(count)]
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _READER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"begun\n":
                raise CachefsError("a reader could not begin")
        yield Readers(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def pids_of(role: str, mountpoint: Path) -> list[int]:
    """The processes with `ROLE MOUNTPOINT` in their command lines, as people look for them: `mount-server`,
    `mount-keeper`.
    """
    wanted, found = [role, str(mountpoint)], []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(words[at : at + 2] == wanted for at in range(len(words))):
                found.append(int(process.name))
    return found


def pid_of(role: str, mountpoint: Path) -> int | None:
    """The first of `pids_of`."""
    return next(iter(pids_of(role, mountpoint)), None)


def kill(role: str, mountpoint: Path, number: signal.Signals = signal.SIGKILL) -> int:
    """Signal it once it is there, which may be a moment after its predecessor was killed; its process id."""
    while True:
        pid = wait_for(role, mountpoint)
        with suppress(ProcessLookupError):  # it has just ended: its successor is meant
            os.kill(pid, number)
            return pid


def wait_for(role: str, mountpoint: Path, other_than: int | None = None, limit_s: float = 60.0) -> int:
    """Its process id, once there is one. Raises CachefsError."""
    give_up_at = time.monotonic() + limit_s
    while (pid := pid_of(role, mountpoint)) in (None, other_than):
        if time.monotonic() > give_up_at:
            raise CachefsError(f"no {role} for {mountpoint}; mounted: {find_mount(mountpoint)}")
        time.sleep(0.005)
    assert pid is not None
    return pid
