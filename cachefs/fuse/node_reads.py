"""Reading without OPEN: a READ names the node alone, and nobody says when the last reader is gone.

What a READ needs is kept open for a few seconds, so that a large file is not opened for each of its pieces; then it is
closed, because an open sealed file cannot be evicted. What the kernel has read stays in its page cache.
"""

from __future__ import annotations

import os
from collections import OrderedDict

import trio

from cachefs.client import Client, ContentReader, View, read_exactly, read_exactly_nowait
from cachefs.model import Attr, Ino, StaleError

Data = bytes | bytearray | memoryview

_MAX_OPEN = 256
_IDLE_S = 2.0


class _Content:
    """One content that is being read: sealed, by its descriptor, or else through the worker."""

    def __init__(self, attr: Attr, fd: int, reader: ContentReader | None) -> None:
        self.attr = attr
        self.fd = fd
        self.reader = reader
        self.users = 0
        self.used_at = trio.current_time()
        self.is_retired = False

    def retire(self) -> None:
        """Close it, when nobody uses it any more."""
        self.is_retired = True
        if self.users == 0:
            if self.reader is not None:
                self.reader.close()
            if self.fd >= 0:
                os.close(self.fd)
            self.reader, self.fd = None, -1


class NodeReads:
    """Called from one trio thread."""

    def __init__(self, client: Client, open_wait_bytes: int) -> None:
        self._client = client
        self._open_wait_bytes = open_wait_bytes
        self._open: OrderedDict[tuple[int, Ino], _Content] = OrderedDict()

    def read_nowait(self, view: View, ino: Ino, offset: int, size: int) -> Data:
        """As `ContentReader.read_nowait`."""
        content = self._open.get((view.epoch, ino)) or self._open_sealed(view, view.metadata.attr_nowait(ino))
        if content is None:
            raise trio.WouldBlock
        content.used_at = trio.current_time()
        if content.reader is not None:
            return content.reader.read_nowait(offset, size)
        return read_exactly_nowait(content.fd, offset, _length(content.attr, offset, size))

    async def read(self, view: View, ino: Ino, offset: int, size: int) -> Data:
        """As `ContentReader.read`; raises as `Metadata.attr` too."""
        content = self._open.get((view.epoch, ino)) or await self._opened(view, await view.metadata.attr(ino))
        content.users += 1
        content.used_at = trio.current_time()
        try:
            if content.reader is not None:
                return await content.reader.read(offset, size)
            length = _length(content.attr, offset, size)
            return await trio.to_thread.run_sync(read_exactly, content.fd, offset, length)
        except StaleError:
            view.metadata.expire(ino)
            raise
        finally:
            content.users -= 1
            content.used_at = trio.current_time()
            if content.is_retired:
                content.retire()

    async def _opened(self, view: View, attr: Attr) -> _Content:
        content = self._found(view, attr)
        if content is None and 0 < attr.size_bytes <= self._open_wait_bytes and attr.key:
            await view.promote(attr.ino)
            content = self._found(view, attr)
        if content is None:
            content = self._keep(view, _Content(attr, -1, view.open_content(attr)))
            self._client.count_open(attr, passthrough=False)
        return content

    def _found(self, view: View, attr: Attr) -> _Content | None:
        # Another READ of the same file may have opened it while this one waited.
        return self._open.get((view.epoch, attr.ino)) or self._open_sealed(view, attr)

    def _open_sealed(self, view: View, attr: Attr) -> _Content | None:
        fd = view.open_sealed(attr)
        if fd is None:
            return None
        self._client.note_use(attr)
        return self._keep(view, _Content(attr, fd, None))

    def _keep(self, view: View, content: _Content) -> _Content:
        self._open[(view.epoch, content.attr.ino)] = content
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].retire()
        return content

    async def close_idle(self) -> None:
        """Runs until cancelled."""
        while True:
            await trio.sleep(_IDLE_S / 2)
            since = trio.current_time() - _IDLE_S
            for key in [key for key, content in self._open.items() if content.used_at < since and not content.users]:
                self._open.pop(key).retire()

    def close(self) -> None:
        """Gives the descriptors back."""
        for content in self._open.values():
            content.retire()
        self._open.clear()


def _length(attr: Attr, offset: int, size: int) -> int:
    return max(0, min(size, attr.size_bytes - offset))
