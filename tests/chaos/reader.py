"""A process that reads a mount and checks every byte, until its standard input is closed.

    python -m tests.chaos.reader ROOT HOW SEED DIRECTORY...

HOW: `calls` (read, pread, held files, listings, stat), `maps` (mmap, in children: a page that is not to be had is a
SIGBUS) or `all` (every file that is listed, once, then it ends). One line of JSON on standard output for everything
tried, see `Try`. Standard library only.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from tests.chaos.contents import BLOCK, Check

_Result = TypeVar("_Result")
_HELD = 6
_PAUSE_S = 0.01


@dataclass
class Try:
    """Times are of time.monotonic(), which all processes share."""

    how: str
    name: str
    began: float
    """Before the open, also of files that are held."""
    ended: float = 0.0
    version: int | None = None
    size: int | None = None
    error: str | None = None
    """ESTALE and the like, SIGBUS."""
    call: str | None = None
    """That failed."""
    wrong: str | None = None
    names: list[str] | None = None
    """Of a listing."""
    longest_s: float = 0.0
    """Of the calls since the last line about the same."""
    longest: str = ""
    longest_at: float = 0.0
    calls: int = 0
    data_bytes: int = field(default=0)

    def time(self, call: str, function: Callable[..., _Result], *arguments: object) -> _Result:
        began = time.monotonic()
        try:
            return function(*arguments)
        except OSError:
            self.call = call
            raise
        finally:
            took = time.monotonic() - began
            self.calls += 1
            if took > self.longest_s:
                self.longest_s, self.longest, self.longest_at = took, call, began

    def tell(self) -> None:
        self.ended = time.monotonic()
        # In one write of less than PIPE_BUF, or by the only process that writes: lines of children are not torn.
        data = (json.dumps(asdict(self)) + "\n").encode()
        while data:
            data = data[os.write(1, data) :]


class Reader:
    def __init__(self, root: str, seed: int, directories: list[str]) -> None:
        self._root = root
        self._rng = random.Random(seed)
        self._directories = directories
        self._held: list[tuple[int, Try, Check]] = []
        self._known: list[str] = []

    # ---- one thing -------------------------------------------------------------------------------------------------

    def list(self) -> None:
        directory = self._rng.choice(self._directories)
        one = Try("list", directory, time.monotonic())
        self._guard(one, lambda: self._listed(one))

    def _listed(self, one: Try) -> None:
        one.names = sorted(one.time("listdir", os.listdir, self._path(one.name)))
        kept = [name for name in self._known if not name.startswith(one.name + "/")]
        self._known = kept + [f"{one.name}/{name}" for name in one.names]

    def stat(self, name: str) -> None:
        one = Try("stat", name, time.monotonic())

        def look() -> None:
            one.size = one.time("stat", os.stat, self._path(name)).st_size

        self._guard(one, look)

    def whole(self, name: str) -> None:
        one = Try("read", name, time.monotonic())
        self._guard(one, lambda: self._with_open(one, self._read_whole))

    def pieces(self, name: str) -> None:
        one = Try("pread", name, time.monotonic())
        self._guard(one, lambda: self._with_open(one, self._read_pieces))

    def hold(self, name: str) -> None:
        """Open one and keep it."""
        one = Try("held", name, time.monotonic())

        def keep() -> None:
            fd = one.time("open", os.open, self._path(name), os.O_RDONLY)
            check = Check(name)
            self._held.append((fd, one, check))
            self._read_pieces(one, fd, check)

        self._guard(one, keep)

    def again(self) -> None:
        """Read one of those that are held; sometimes for the last time."""
        if not self._held:
            return
        number = self._rng.randrange(len(self._held))
        fd, first, check = self._held[number]
        one = Try("held", first.name, first.began, version=check.version)
        self._guard(one, lambda: self._read_pieces(one, fd, check))
        if one.error is not None or one.wrong is not None or len(self._held) > _HELD or self._rng.random() < 0.1:
            os.close(fd)
            del self._held[number]

    def mapped(self, name: str) -> None:
        began = time.monotonic()
        seed, lasting_s = self._rng.random(), self._rng.choice([0.0, 0.5, 2.0])
        pid = os.fork()
        if pid == 0:
            self._rng = random.Random(seed)
            one = Try("mmap", name, began)
            try:
                self._guard(one, lambda: self._with_open(one, lambda *what: self._read_map(lasting_s, *what)))
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            number = os.waitstatus_to_exitcode(status)
            error = signal.Signals(-number).name if number < 0 else f"status {number}"
            Try("mmap", name, began, error=error, call="mmap").tell()

    # ---- how -------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)

    def _guard(self, one: Try, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            one.error = errno.errorcode.get(error.errno or 0, str(error))
        one.tell()

    def _with_open(self, one: Try, work: Callable[[Try, int, Check], None]) -> None:
        fd = one.time("open", os.open, self._path(one.name), os.O_RDONLY)
        try:
            work(one, fd, Check(one.name))
        finally:
            os.close(fd)

    def _take(self, one: Try, check: Check, data: bytes, at: int) -> bool:
        one.data_bytes += len(data)
        one.wrong = check(data, at)
        one.version = check.version
        return one.wrong is None

    def _size(self, one: Try, fd: int, check: Check) -> int:
        one.size = size = one.time("fstat", os.fstat, fd).st_size
        if check.version is not None and check.size != size:
            one.wrong = f"{one.name}: fstat tells {size} bytes of version {check.version}, which has {check.size}"
        return size

    def _read_whole(self, one: Try, fd: int, check: Check) -> None:
        size, at = self._size(one, fd, check), 0
        while data := one.time("read", os.read, fd, self._rng.choice([BLOCK, 4 * BLOCK, 16 * BLOCK, 1 << 20])):
            if not self._take(one, check, data, at):
                return
            at += len(data)
            if at % BLOCK and at != size:
                one.wrong = f"{one.name}: a read ended at {at} of {size}"
                return
        if at != size:
            one.wrong = f"{one.name}: the end came at {at} of {size}, version {check.version}"
        elif check.size != size and size >= BLOCK:
            one.wrong = f"{one.name}: {size} bytes of version {check.version}, which has {check.size}"

    def _read_pieces(self, one: Try, fd: int, check: Check) -> None:
        size = self._size(one, fd, check)
        for _ in range(4):
            at = BLOCK * self._rng.randrange(max(1, -(-size // BLOCK)))
            end = min(size, at + self._rng.choice([BLOCK, 10 * BLOCK, 40 * BLOCK]))
            while at < end and one.wrong is None:
                data = one.time("pread", os.pread, fd, end - at, at)
                if not data:
                    one.wrong = f"{one.name}: nothing at {at} of {size}, version {check.version}"
                    return
                if not self._take(one, check, data, at):
                    return
                at += len(data)
                if at % BLOCK and at != end:
                    one.wrong = f"{one.name}: a pread ended at {at} of {end}"

    def _read_map(self, lasting_s: float, one: Try, fd: int, check: Check) -> None:
        size = self._size(one, fd, check)
        if size == 0:
            return
        end = time.monotonic() + lasting_s
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as data:
            while one.wrong is None:
                at = BLOCK * self._rng.randrange(-(-size // BLOCK))
                self._take(one, check, one.time("touch", data.__getitem__, slice(at, at + 2 * BLOCK)), at)
                if time.monotonic() >= end and one.calls > 8:
                    return
                time.sleep(_PAUSE_S)

    # ---- many ------------------------------------------------------------------------------------------------------

    def everything(self) -> None:
        self._directories, directories = [], self._directories
        for directory in directories:
            self._directories = [directory]
            self.list()
        for name in self._known:
            self.whole(name)

    def run(self, how: str) -> None:
        self.list()
        # Each at least once, however slow the machine is.
        first = [self.whole, self.pieces, self.hold, self.stat]
        while not select.select([0], [], [], _PAUSE_S)[0]:
            # Also names that were there once: they may be gone, or back.
            name = self._rng.choice(self._known) if self._known else None
            if name is None or (how == "maps" and self._rng.random() < 0.1):
                self.list()
            elif how == "maps":
                self.mapped(name)
            else:
                every = [self.whole, self.pieces, self.hold, self.stat, None]
                what = first.pop() if first else self._rng.choices(every, [35, 25, 5, 12, 23])[0]
                if what is not None:
                    what(name)
                elif self._rng.random() < 0.15:
                    self.list()
                else:
                    self.again()
        for fd, _, _ in self._held:
            os.close(fd)


def main() -> None:
    root, how, seed, *directories = sys.argv[1:]
    reader = Reader(root, int(seed), directories)
    if how == "all":
        reader.everything()
        return
    # Whoever listened may be gone.
    with suppress(BrokenPipeError):
        reader.run(how)


if __name__ == "__main__":
    main()
