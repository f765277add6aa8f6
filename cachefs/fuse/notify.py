"""Telling the kernel that names it believes in have changed, from a thread of its own.

Such a write waits for the lock of the directory, which the kernel holds while it waits for our answer about another
name in it: whoever answers must never wait for one. When it hangs, nothing else does; with the connection it ends.

What is waiting to be told is bounded: with too much of it, the kernel is told to believe nothing at all.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

from cachefs.fusewire import inc_epoch_notification, inval_entry_notification

logger = logging.getLogger(__name__)

_WAITING = 10_000
"""Names; some 200 bytes each."""
_IS_GONE = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)

KnownNames = Callable[[], list[tuple[int, bytes]]]


class Notifier:
    """Started by the first thing to tell; `close` it. Called from one thread."""

    def __init__(self, fd: int, *, inc_epoch: bool, known_names: KnownNames) -> None:
        """`fd`, the connection's device, stays the caller's.

        `inc_epoch`: the kernel can be told to believe nothing; else `known_names`, (parent node, name), are all told.
        """
        self._fd = fd
        self._inc_epoch = inc_epoch
        self._known_names = known_names
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._known: Iterator[bytes] | None = None
        """The rest of all names known, where they have to be told one by one."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def entry(self, parent: int, name: bytes, *, expire_only: bool) -> None:
        """As `inval_entry_notification`. Never waits."""
        if len(self._waiting) >= _WAITING:
            self.everything()
        else:
            self._add(inval_entry_notification(parent, name, expire_only=expire_only))

    def everything(self) -> None:
        """Never waits."""
        known: Iterator[bytes] | None = None
        if not self._inc_epoch:
            # Made one by one as they are told: there may be half a million.
            known = (inval_entry_notification(*each, expire_only=True) for each in self._known_names())
        with self._changed:
            self._waiting.clear()
            self._known = known
        if self._inc_epoch:
            self._add(inc_epoch_notification())
        else:
            self._start()

    def _add(self, message: bytes) -> None:
        with self._changed:
            self._waiting.append(message)
        self._start()

    def _start(self) -> None:
        with self._changed:
            self._changed.notify()
        if self._thread is None and not self._closed:
            # A descriptor of its own: one that is closed under a write would soon be another file's. A daemon: a write
            # that hangs must not keep the process from ending.
            own = os.dup(self._fd)
            self._thread = threading.Thread(target=self._run, args=(own,), name="fuse notify", daemon=True)
            self._thread.start()

    def _run(self, fd: int) -> None:
        try:
            while (message := self._next()) is not None:
                try:
                    os.write(fd, message)
                except OSError as error:
                    if error.errno in _IS_GONE:
                        return
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # the kernel does not have it
                        logger.warning("the kernel was not told of a change error=%s", error)
        finally:
            os.close(fd)

    def _next(self) -> bytes | None:
        with self._changed:
            while True:
                if self._closed:
                    return None
                if self._waiting:
                    return self._waiting.popleft()
                if self._known is not None:
                    message = next(self._known, None)
                    if message is not None:
                        return message
                    self._known = None
                self._changed.wait()

    def close(self) -> None:
        """Tell nothing more. Does not wait for a write that hangs. Idempotent."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._known = None
            self._changed.notify()
