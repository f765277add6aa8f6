"""Real cachefs processes for tests and benchmarks, ended with the block whatever happens."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cachefs.fuse import FS_TYPE, MountError, abort, find_mount, unmount
from cachefs.model import CachefsError

READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0


class Running:
    """A process of ours that said it is ready."""

    def __init__(self, process: subprocess.Popen[bytes], facts: dict[str, Any]) -> None:
        self.process = process
        self.facts = facts
        """What it reported: "listen", "mountpoint" and the like."""

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit status."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(END_TIMEOUT_S)


@contextmanager
def running(
    role: str,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
    stderr: Any = None,
    prefix: Sequence[str] = (),
) -> Iterator[Running]:
    """`python -m cachefs ROLE ARGUMENTS…`, ready. It ends with the block, and by itself if this process is killed.

    `prefix`: a program that becomes this one, as another user or so (see `users`).

    Raises CachefsError when it ends or takes too long before it is ready.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "cachefs",
                    role,
                    *map(str, arguments),
                    "--supervised",
                    str(theirs.fileno()),
                ],
                env={**os.environ, **(environment or {})},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        started = Running(process, {})
        try:
            started.facts = _wait_ready(role, ours)
            yield started
        finally:
            try:
                started.end()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _wait_gone(ours)


def child_of(up: Running, role: str) -> int:
    """The process with this role of a `cachefs up`, or of a `cachefs mount`: "mount" is the one that answers, which is
    a child of the "mount-keeper".
    """
    names = {"mount", "mount-server"} if role == "mount" else {role}
    todo = [up.process.pid]
    while todo:
        pid = todo.pop()
        with suppress(OSError):  # it has ended since it was found
            if not names.isdisjoint(Path(f"/proc/{pid}/cmdline").read_text().split("\0")):
                return pid
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    raise CachefsError(f"no process with the role {role}")


def kill_mount(process: Running) -> None:
    """Both processes of a `cachefs mount`, or of that of a `cachefs up`: nobody is left who would go on."""
    keeper, server = (child_of(process, role) for role in ("mount-keeper", "mount-server"))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in (keeper, server):
            os.kill(pid, number)


def _wait_gone(link: socket.socket) -> None:
    """Whoever holds the other end: a mount may have another keeper than the one that was started."""
    link.settimeout(END_TIMEOUT_S)
    with suppress(OSError):
        link.shutdown(socket.SHUT_WR)
        while link.recv(4096):
            pass


def _wait_ready(role: str, link: socket.socket) -> dict[str, Any]:
    line = b""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([link], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise CachefsError(f"cachefs {role} was not ready within {READY_TIMEOUT_S:g} s")
        data = link.recv(4096)
        if not data:
            raise CachefsError(f"cachefs {role} ended before it was ready")
        line += data
    facts: dict[str, Any] = json.loads(line)
    if "error" in facts:
        raise CachefsError(f"cachefs {role}: {facts['error']}")
    return facts


@contextmanager
def mountpoint_below(directory: Path) -> Iterator[Path]:
    """A directory to mount on, which is none any more at the end, whatever became of the mount's server."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    try:
        yield mountpoint
    finally:
        while (mounted := find_mount(mountpoint)) is not None and mounted.fs_type == FS_TYPE:
            abort(mounted)  # first: what is mounted no more cannot be ended
            with suppress(MountError):  # somebody was faster
                unmount(mountpoint, lazy=True)
        mountpoint.rmdir()
