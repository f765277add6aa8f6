"""Groups of processes with a limit on their memory, as containers have one: cgroups, of version 1 or 2."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cachefs.model import CachefsError

_ROOT = Path("/sys/fs/cgroup")
_EMPTY_S = 60.0


class MemoryGroup:
    """Made by `memory_group`."""

    def __init__(self, path: Path, version: int) -> None:
        self.path = path
        self._version = version

    @property
    def prefix(self) -> list[str]:
        """A program that becomes what follows it, within the group from the start."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    def add(self, pid: int) -> None:
        """What that process has is not counted here, but what it takes from now on."""
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def used_bytes(self) -> int:
        name = "memory.usage_in_bytes" if self._version == 1 else "memory.current"
        return int((self.path / name).read_text())

    @property
    def cache_bytes(self) -> int:
        """Page cache that is counted here, that of tmpfs included."""
        return self._stat("memory.stat")["cache" if self._version == 1 else "file"]

    @property
    def kills(self) -> int:
        """By the OOM killer."""
        return self._stat("memory.oom_control" if self._version == 1 else "memory.events")["oom_kill"]

    def _stat(self, name: str) -> dict[str, int]:
        lines = (self.path / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


def why_no_groups() -> str:
    """Empty where `memory_group` works."""
    try:
        with memory_group(1 << 30):
            return ""
    except (OSError, CachefsError) as error:
        return f"no memory cgroups here: {error}"


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Below the group of this process. Whatever is in it has to have ended when the block does.

    Raises CachefsError where neither version is mounted, OSError where none may be made.
    """
    parent, version = _own()
    path = parent / f"cachefs-test-{uuid.uuid4().hex[:8]}"
    path.mkdir()
    try:
        name = "memory.limit_in_bytes" if version == 1 else "memory.max"
        (path / name).write_text(str(limit_bytes))
        yield MemoryGroup(path, version)
    finally:
        deadline = time.monotonic() + _EMPTY_S
        while (path / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.rmdir(path)


def _own() -> tuple[Path, int]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found, version = _ROOT / "memory" / path.lstrip("/"), 1
            return (found if found.is_dir() else _ROOT / "memory"), version
    if "memory" in _words(_ROOT / "cgroup.subtree_control"):
        return _ROOT, 2
    raise CachefsError("the memory controller is not mounted")


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
