"""Files that a worker passed for reading: no more of them open than there are descriptors for."""

from __future__ import annotations

import itertools
import os
import resource
from collections import OrderedDict
from collections.abc import Callable

_ALL = 1 << 20
"""Where the system sets no limit."""


class PassedFile:
    """An open file of ours. Made by `PassedFiles.add`."""

    __slots__ = ("_dropped", "_on_unused", "_users", "fd", "on_drop")

    def __init__(self, fd: int, on_drop: Callable[[], None], on_unused: Callable[[], None]) -> None:
        self.fd = fd
        self.on_drop = on_drop
        self._on_unused = on_unused
        self._users = 0
        self._dropped = False

    @property
    def in_use(self) -> bool:
        return self._users > 0

    def __enter__(self) -> int:
        """While a thread reads through it, it stays open."""
        self._users += 1
        return self.fd

    def __exit__(self, *args: object) -> None:
        self._users -= 1
        self._close_if_done()
        if not self._users:
            self._on_unused()

    def close(self) -> None:
        """As soon as nobody reads through it. Called once."""
        self._dropped = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._dropped and not self._users:
            os.close(self.fd)


class PassedFiles:
    """The one that was used longest ago goes first; whoever needs it again asks the worker, who passes it again.

    As long as more are read through than may be open, there are more; those that are too many go as soon as they are
    not read through any more.
    """

    def __init__(self, most: int | None = None) -> None:
        """`most`: by default half of what the process may open. The other half is for those that are on their way,
        one for each request that waits, and for all else.
        """
        self.most = most if most is not None else most_passed()
        self._files: OrderedDict[PassedFile, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._files)

    def add(self, fd: int, on_drop: Callable[[], None]) -> PassedFile:
        """`fd` is ours from now on. `on_drop` is called when the file makes room for others, and not after `drop`."""
        file = PassedFile(fd, on_drop, self._make_room)
        self._files[file] = None
        self._make_room(file)
        return file

    def _make_room(self, new: PassedFile | None = None) -> None:
        surplus = len(self._files) - self.most
        if surplus <= 0:
            return
        unused = (file for file in self._files if file is not new and not file.in_use)
        for file in list(itertools.islice(unused, surplus)):
            self.drop(file)
            file.on_drop()

    def touch(self, file: PassedFile) -> None:
        self._files.move_to_end(file)

    def drop(self, file: PassedFile) -> None:
        """Not used any more: closed as soon as no thread reads through it."""
        del self._files[file]
        file.close()


def most_passed() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (_ALL if soft == resource.RLIM_INFINITY else soft) // 2
