"""One reader's walk through a directory, a little ahead of the reader and never the whole of it in memory."""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack

import trio

from cachefs.client.metadata import Following, Metadata
from cachefs.model import NO_INO, CachefsError, Entry, Ino, TransportError

_BUFFER_CHUNKS = 2
_PAUSE_S = 0.1


class DirReader:
    """Entries after any position, where a position is the inode number of the entry before: 0 is the start.

    A reader that goes on where it was gets entries from the running stream; one that jumps (rewinddir, seekdir) gets a
    new stream from there. Close it when the directory is closed.
    """

    def __init__(self, metadata: Metadata, ino: Ino, nursery: trio.Nursery) -> None:
        self.ino = ino
        self._metadata = metadata
        self._nursery = nursery
        self._follow = ExitStack()
        self._following: Following | None = None
        self._since = 0.0
        self._names = 0
        """Got since the stream began."""
        self._is_news = True
        """Whether they came from the master."""
        self._began = NO_INO
        self._entries: deque[Entry] = deque()
        """What follows `_position`."""
        self._position = NO_INO
        self._scope: trio.CancelScope | None = None
        self._chunks: trio.MemoryReceiveChannel[list[Entry]] | None = None
        self._at_end = False
        self._error: CachefsError | None = None
        self._lock = trio.Lock()

    def read_nowait(self, after: Ino, limit: int) -> list[Entry]:
        """Up to `limit` entries after `after`, without consuming them: they go when a later position is asked for.

        Empty at the end. Raises trio.WouldBlock when they have to be waited for.
        """
        if self._lock.locked():
            raise trio.WouldBlock
        self._advance(after)
        if self._position != after:
            raise trio.WouldBlock
        if not self._entries and not self._at_end:
            raise trio.WouldBlock
        return [self._entries[index] for index in range(min(limit, len(self._entries)))]

    async def read(self, after: Ino, limit: int) -> list[Entry]:
        """As `read_nowait`, waiting for the master. Raises as `Metadata.list_dir`."""
        async with self._lock:
            self._advance(after)
            if self._position != after:
                self._stop()
                self._position = after
            while not self._entries and not self._at_end:
                if self._chunks is None:
                    self._start()
                assert self._chunks is not None
                try:
                    entries = await self._chunks.receive()
                    self._entries.extend(entries)
                    self._names += len(entries)
                except trio.EndOfChannel:
                    self._chunks = None
                    if self._error is not None:
                        error, self._error = self._error, None
                        raise error from None
                    self._at_end = True
                    if self._is_news and self._began == NO_INO and self._following is not None:
                        self._metadata.told_whole(self.ino, self._following, self._since, self._names)
            return [self._entries[index] for index in range(min(limit, len(self._entries)))]

    def is_outdated(self, name: str) -> bool:
        """Whether this name has changed since its entry may have been read."""
        return self._following is not None and self._following.is_outdated(name)

    def _advance(self, after: Ino) -> None:
        """Drop what lies at or before `after`, if that is where the reader has come to."""
        if after < self._position:
            return
        while self._entries and self._entries[0].attr.ino <= after:
            self._position = self._entries.popleft().attr.ino

    def _start(self) -> None:
        send, self._chunks = trio.open_memory_channel[list[Entry]](_BUFFER_CHUNKS)
        self._scope = trio.CancelScope()
        self._follow.close()
        self._following = self._follow.enter_context(self._metadata.follow(self.ino))
        self._since = trio.current_time()
        self._began = self._position
        self._names = 0
        self._is_news = True
        self._nursery.start_soon(self._stream, send, self._scope, self._position)

    async def _stream(self, send: trio.MemorySendChannel[list[Entry]], scope: trio.CancelScope, after: Ino) -> None:
        metadata = self._metadata
        patience_s = metadata.patience_s
        give_up = trio.current_time() + patience_s
        with scope, send:
            while True:
                known = metadata.stale_listing(self.ino, after)
                if known is not None:
                    if self._scope is scope:
                        self._is_news = False
                    for entries in known:
                        await send.send(entries)
                    return
                try:
                    with metadata.reach.waiting(0.0 if metadata.was_told_whole(self.ino) else patience_s):
                        async with metadata.list_dir(self.ino, after, self._following) as chunks:
                            async for entries in chunks:
                                await send.send(entries)
                                after = entries[-1].attr.ino
                                give_up = trio.current_time() + patience_s
                    return
                except TransportError as error:
                    # The master restarts: what was read is a place to go on from.
                    metadata.reach.doubt()
                    if trio.current_time() >= give_up:
                        self._fail(scope, error)
                        return
                    await trio.sleep(_PAUSE_S)
                except CachefsError as error:
                    self._fail(scope, error)
                    return

    def _fail(self, scope: trio.CancelScope, error: CachefsError) -> None:
        # Unless the reader has jumped meanwhile, and waits for another stream.
        if self._scope is scope:
            self._error = error

    def _stop(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            self._scope = None
        self._follow.close()
        self._following = None
        self._chunks = None
        self._entries.clear()
        self._at_end = False
        self._error = None

    def close(self) -> None:
        """Stops the stream. Idempotent."""
        self._stop()
