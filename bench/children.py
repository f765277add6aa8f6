"""Processes of a run, all of which go with it: whatever one of them starts carries its mark, and is found by that."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachefs.fuse import MountError, abort, all_mounts, unmount

MARK = "CACHEFS_BENCH_RUN"
"""Environment variable."""
GONE_LIMIT_S = 60.0


def end_marked(mark: str) -> None:
    """Kill what carries the mark, or one that was made within it."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (pids := _carrying(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _carrying(mark: str) -> list[int]:
    wanted = f"\0{MARK}={mark}".encode()
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal() and int(each.name) != os.getpid():
            with suppress(OSError):
                if wanted in b"\0" + (each / "environ").read_bytes():
                    found.append(int(each.name))
    return found


def release_mounts(directory: Path) -> None:
    """Take away every mount at and below a directory, and end its connection: who hangs in it goes on with an error."""
    root = os.path.realpath(directory)
    while below := [each for each in all_mounts() if f"{each.mountpoint}/".startswith(f"{root}/")]:
        last = below[-1]
        if last.fs_type.startswith("fuse"):
            with suppress(MountError):
                abort(last)
        unmount(last.mountpoint, lazy=True)


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A new directory that is gone at the end, with all that is mounted in it and every process started meanwhile."""
    before = os.environ.get(MARK)
    mark = f"{before or 'run'}-{secrets.token_hex(8)}"
    directory = parent / f"{name}-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True)
        os.environ[MARK] = mark
        yield directory
    finally:
        if before is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = before
        # Mounts first: a process that waits for a stuck one in the kernel cannot be killed. Then those that a process
        # has made before it was.
        release_mounts(directory)
        end_marked(mark)
        release_mounts(directory)
        shutil.rmtree(directory, ignore_errors=True)
