"""Listing a whole tree, many directories at a time: `cachefs load --metadata`."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from cachefs.model import CachefsError, Entry, Ino
from cachefs.wire.messages import LoadProgress

logger = logging.getLogger(__name__)

PARALLEL = 16
"""Directories listed at once. The under-store's own limits hold below that."""


class Load:
    """One walk. `run` does it, in a task; the rest is to be looked at meanwhile.

    What waits to be listed is remembered by inode number: some ten bytes for each directory found and not done.
    """

    def __init__(
        self,
        root: Ino,
        list_directory: Callable[[Ino], Awaitable[None]],
        children: Callable[[Ino, Ino], list[Entry]],
        path_of: Callable[[Ino], str],
    ) -> None:
        self.done = trio.Event()
        self._list_directory = list_directory
        self._children = children
        self._path_of = path_of
        self._scope = trio.CancelScope()
        self._send, self._receive = trio.open_memory_channel[Ino](math.inf)
        self._found = 0
        self._done = 0
        self._files = 0
        self._bytes = 0
        self._failed: list[tuple[str, str]] = []
        self._add(root)

    def progress(self) -> LoadProgress:
        """So far, with the failures since the last call."""
        failed, self._failed = self._failed, []
        return LoadProgress(self._found, self._done, self._files, self._bytes, failed)

    def cancel(self) -> None:
        """Nobody wants to know any more; listings that run go on, as others may follow them."""
        self._scope.cancel()

    async def run(self) -> None:
        """Raises nothing: directories that fail are told by `progress`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(PARALLEL):
                        nursery.start_soon(self._work)
        finally:
            self.done.set()

    def _add(self, ino: Ino) -> None:
        self._found += 1
        self._send.send_nowait(ino)

    async def _work(self) -> None:
        async for ino in self._receive:
            try:
                await self._one(ino)
            except CachefsError as error:
                self._failed.append((self._path_of(ino), str(error)))
            except Exception as error:
                logger.exception("loading failed dir=%d", ino)
                self._failed.append((self._path_of(ino), repr(error)))
            self._done += 1
            if self._done == self._found:
                self._send.close()

    async def _one(self, ino: Ino) -> None:
        await self._list_directory(ino)
        after = Ino(0)
        while entries := self._children(ino, after):
            for entry in entries:
                if entry.attr.is_dir:
                    self._add(entry.attr.ino)
                else:
                    self._files += 1
                    self._bytes += entry.attr.size_bytes
            after = entries[-1].attr.ino
            await trio.lowlevel.checkpoint()
