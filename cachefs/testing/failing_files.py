"""A process of ours some of whose system calls on files fail, as those on a broken disk do, or that stops at one of
them. What the kernel does by itself, such as reads by passthrough, is as ever.

`python -m cachefs.testing.failing_files CONTROL PYTHON -m cachefs ROLE …` is the process; see `Faults`. Disks are
looked after far more often there than else, so that tests need not wait.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import fnmatch
import functools
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cachefs.store import health
from cachefs.worker import care

Call = Literal["write", "sync", "read", "change"]
"""change: whatever changes a directory, and opening for writing."""
_BY_DESCRIPTOR: dict[str, Call] = {
    "pwrite": "write",
    "fsync": "sync",
    "read": "read",
    "pread": "read",
    "preadv": "read",
}
_CARE_EVERY_S = 0.2
_STOP = 0
"""In the place of an errno."""


class Faults:
    """Which calls fail in the processes that are started with `prefix`."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._write([])

    @property
    def prefix(self) -> Sequence[str]:
        return sys.executable, "-m", __name__, str(self._control)

    @contextmanager
    def failing(self, calls: Sequence[Call], pattern: str, code: int = errno.EIO) -> Iterator[None]:
        """These calls fail for files whose paths match `pattern`, as of `fnmatch`, until the end of the block."""
        with self._having([*calls, pattern, code]):
            yield

    @contextmanager
    def stopping_while_it_compares(self, pattern: str) -> Iterator[None]:
        """The process stops, as by SIGSTOP, when it reads from such a file past the page cache, which it does to
        compare it only; and again after each SIGCONT, until the end of the block.
        """
        with self._having(["read", pattern, _STOP]):
            yield

    @contextmanager
    def _having(self, fault: Sequence[str | int]) -> Iterator[None]:
        self._write(fault)
        try:
            yield
        finally:
            self._write([])

    def _write(self, fault: Sequence[str | int]) -> None:
        new = self._control.with_suffix(".new")
        new.write_text(json.dumps(fault))
        new.rename(self._control)


class _Injection:
    def __init__(self, control: str) -> None:
        self._control = control
        self._seen = 0, 0
        self._fault: list[Any] = []
        self._stat, self._readlink, self._open = os.stat, os.readlink, builtins.open

    def check(self, call: Call, where: Callable[[], str], fd: int = -1) -> None:
        """Raises OSError if it is to fail."""
        found = self._stat(self._control)
        if (found.st_ino, found.st_mtime_ns) != self._seen:
            with self._open(self._control, encoding="utf-8") as file:
                self._fault = json.load(file)
            self._seen = found.st_ino, found.st_mtime_ns
        if not self._fault:
            return
        *calls, pattern, code = self._fault
        if call not in calls or not fnmatch.fnmatch(where(), pattern):
            return
        if code != _STOP:
            raise OSError(code, os.strerror(code))
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            os.kill(os.getpid(), signal.SIGSTOP)

    def path(self, name: Any, dir_fd: int | None) -> str:
        return os.path.join(self.of(dir_fd), os.fspath(name)) if dir_fd is not None else os.fspath(name)

    def of(self, fd: int) -> str:
        return self._readlink(f"/proc/self/fd/{fd}")

    def install(self) -> None:
        for name, call in _BY_DESCRIPTOR.items():
            setattr(os, name, self._by_descriptor(getattr(os, name), call))
        os.open, os.unlink, os.rename = self._opening(os.open), self._removing(os.unlink), self._renaming(os.rename)
        os.mkdir = self._making(os.mkdir)

    def _by_descriptor(self, real: Callable[..., Any], call: Call) -> Callable[..., Any]:
        def checked(fd: int, *rest: Any) -> Any:
            self.check(call, lambda: self.of(fd), fd)
            return real(fd, *rest)

        return checked

    def _opening(self, real: Callable[..., int]) -> Callable[..., int]:
        def checked(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.check("change", lambda: self.path(path, dir_fd))
            return real(path, flags, mode, dir_fd=dir_fd)

        return checked

    def _making(self, real: Callable[..., None]) -> Callable[..., None]:
        def checked(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            self.check("change", lambda: self.path(path, dir_fd))
            real(path, mode, dir_fd=dir_fd)

        return checked

    def _removing(self, real: Callable[..., None]) -> Callable[..., None]:
        def checked(path: Any, *, dir_fd: int | None = None) -> None:
            self.check("change", lambda: self.path(path, dir_fd))
            real(path, dir_fd=dir_fd)

        return checked

    def _renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def checked(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            self.check("change", lambda: self.path(source, src_dir_fd))
            self.check("change", lambda: self.path(target, dst_dir_fd))
            real(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

        return checked


def _become() -> None:
    _, control, _, _, module, *arguments = sys.argv
    health.HealthConfig = functools.partial(  # type: ignore[assignment,misc]
        health.HealthConfig, probe_every_s=_CARE_EVERY_S, longest_pause_s=_CARE_EVERY_S, relapse_within_s=0.0
    )
    care._EVERY_S = _CARE_EVERY_S
    _Injection(control).install()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become()
