"""The program of a FUSE file system: started, waited for, and ended in bounded time whatever became of it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.systems.base import Missing, Mounted, System
from cachefs.fuse import MountError, abort, find_mount, unmount

START_LIMIT_S = 60.0
END_LIMIT_S = 15.0
LOG_TAIL_BYTES = 800
QUIET_S = 0.5
SETTLE_LIMIT_S = 60.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Peer(System):
    """A file system of others, of whose cache nothing is known but what it takes of the disk."""

    def settle(self, mounted: Mounted) -> None:
        """Some write what was read to their caches later, and are given the time for it."""
        deadline = time.monotonic() + SETTLE_LIMIT_S
        before, since = -1, time.monotonic()
        while (now := kept_bytes(mounted)) != before or time.monotonic() - since < QUIET_S:
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cache still changed after {SETTLE_LIMIT_S:g} s")
            time.sleep(0.05)
        super().settle(mounted)


def kept_bytes(mounted: Mounted) -> int:
    """What a mount takes of the disk in its place, below which it may be itself."""
    kept = 0
    for directory, names, files in os.walk(mounted.place):
        if Path(directory) == mounted.path.parent:
            names[:] = [name for name in names if name != mounted.path.name]
        for name in files:
            # Caches rename their files.
            with suppress(FileNotFoundError):
                kept += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return kept


def program(name: str, how: str) -> str:
    """Its path: beside this Python, or on PATH. Raises Missing; `how` says how to install it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed: {how}")
    return found


def check_fusermount() -> None:
    """Raises Missing."""
    if shutil.which("fusermount3") is None:
        raise Missing("fusermount3 is not installed: apt-get install fuse3")


def version_of(command: Sequence[str], pattern: str) -> str:
    """What the group in `pattern` matches in what it prints. Raises Missing where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]} does not run: {error}") from error
    found = re.search(pattern, done.stdout + done.stderr)
    if done.returncode != 0 or found is None:
        raise Missing(f"{' '.join(command)} does not tell its version: {(done.stdout + done.stderr)[-300:]}")
    return found[1]


@contextmanager
def serving(
    command: Sequence[str], mountpoint: Path, place: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[int]]:
    """Run `command`, which mounts on `mountpoint` and stays in the foreground; yields its processes. What it says is
    in `place`/log. It is asked to end where all went well, and killed where not.

    Raises RuntimeError, with the end of the log, when it does not mount.
    """
    mountpoint.mkdir(parents=True, exist_ok=True)
    name = Path(command[0]).name
    process = None
    polite_s = 0.0
    try:
        with (place / "log").open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=place,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        deadline = time.monotonic() + START_LIMIT_S
        while find_mount(mountpoint) is None:
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended instead of mounting:\n{end_of_log(place)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not mount in {START_LIMIT_S:g} s:\n{end_of_log(place)}")
            time.sleep(0.05)
        yield [pid for pid in group_members(process.pid) if not _only_mounts(pid)]
        polite_s = END_LIMIT_S
    finally:
        while (mounted := find_mount(mountpoint)) is not None:
            if not polite_s:
                with suppress(MountError):
                    abort(mounted)
            unmount(mountpoint, lazy=True)
        if process is not None:
            _end(process, polite_s)


def _end(process: subprocess.Popen[bytes], polite_s: float) -> None:
    if polite_s:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(polite_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_with_parent() -> None:
    """In a child before it becomes its program: it is ended should this process be killed."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def group_members(group: int) -> list[int]:
    """The processes of a process group."""
    members = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            with suppress(ProcessLookupError):
                if os.getpgid(int(each.name)) == group:
                    members.append(int(each.name))
    return sorted(members)


def _only_mounts(pid: int) -> bool:
    """It ends once the mount is there: that is no crash."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("fusermount")
    except OSError:
        return True


def is_running(pid: int) -> bool:
    """False for one that has ended, also if nobody has asked for its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "XZ"


def end_of_log(place: Path) -> str:
    """The end of what the system behind a mount in this directory said."""
    try:
        content = (place / "log").read_bytes()
    except OSError:
        return ""
    return _COLOURS.sub("", content[-LOG_TAIL_BYTES:].decode(errors="replace")).strip()
