"""Reading a content that is not sealed here: through descriptors the worker passes, page by confirmed page."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable

import trio

from cachefs.client.passed import PassedFile, PassedFiles
from cachefs.model import Attr, BlockSlice, Geometry, MiB, RemoteProtocolError
from cachefs.net import Answer
from cachefs.store import page_checksum
from cachefs.wire.messages import Fetch, FetchReply, PromoteMode

logger = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview

_ATTEMPTS = 3
_INLINE_BYTES = MiB
"""Summed up without a thread: a tenth of a millisecond."""
MAX_FETCH = 8 * MiB
"""Bytes asked for in one request: well below the wire's largest payload, for what comes as payload."""

_NOT_WITHOUT_WAITING = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL)
_DISK_FAILS = (errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT)
"""What file systems say of a medium that cannot be read or is damaged. Not EBADF: that would be our own mistake."""


class _BlockView:
    """What is known to be readable of one block, and through which descriptor."""

    def __init__(self) -> None:
        self.serial = 0
        self.file: PassedFile | None = None
        self.present: set[int] = set()
        """Pages. They never become absent again as long as the descriptor is the same."""

    def forget(self) -> None:
        """Nothing is known to be readable. The file is somebody else's to close, or closed."""
        self.file, self.serial = None, 0
        self.present.clear()


class ContentReader:
    """One content open in cached mode, shared by all its handles. Close it once, when nobody reads any more.

    A page is read through the descriptor that came with its confirmation, never through a path: what was confirmed
    stays readable, whatever becomes of the file's name. When the disk fails to read it, the bytes come from the
    under-store, and that descriptor is not used again.
    """

    def __init__(
        self,
        attr: Attr,
        geometry: Geometry,
        fetch: Callable[[Fetch], Awaitable[Answer[FetchReply]]],
        promote: PromoteMode | None = None,
        files: PassedFiles | None = None,
    ) -> None:
        """`promote`: other than what the worker was told. `files`: shared by the readers of a process."""
        self.attr = attr
        self._geometry = geometry
        self._fetch = fetch
        self._promote = promote
        self._views: dict[int, _BlockView] = {}
        self._files = files if files is not None else PassedFiles()

    def read_nowait(self, offset: int, size: int) -> Data:
        """The bytes, `size` of them or up to the end of the content, if that needs neither the worker nor the disk.

        Raises trio.WouldBlock otherwise. As of `read_exactly_nowait`, overwritten by the next read of this process.
        """
        slices = self._geometry.split(self.attr.size_bytes, offset, size)
        if not slices:
            return b""
        piece = slices[0]
        view = self._views.get(piece.block_index)
        if len(slices) > 1 or view is None or view.file is None or not self._covers(view, piece):
            raise trio.WouldBlock
        self._files.touch(view.file)
        return read_exactly_nowait(view.file.fd, piece.offset, piece.length)

    async def read(self, offset: int, size: int) -> Data:
        """The bytes, `size` of them or up to the end of the content; never fewer.

        Raises StaleError when they are of a version that is gone and are not cached; UnderStoreError and its kinds;
        TransportError when the worker stays away.
        """
        slices = [
            part
            for piece in self._geometry.split(self.attr.size_bytes, offset, size)
            for part in _cut(piece, MAX_FETCH)
        ]
        if len(slices) == 1:
            return await self._read_slice(slices[0])
        return b"".join([await self._read_slice(piece) for piece in slices])

    async def _read_slice(self, piece: BlockSlice) -> Data:
        view = self._views.setdefault(piece.block_index, _BlockView())
        while not self._covers(view, piece):
            request = Fetch(
                self.attr.ino, piece.block_index, piece.offset, piece.length, view.serial, promote=self._promote
            )
            answer = await self._ask(request)
            serial = answer.message.serial
            if serial == 0:
                return answer.payload  # type: ignore[return-value]
            if not answer.fds and serial == request.held != view.serial:
                continue  # what we had when we asked was given up meanwhile, for want of descriptors
            self._learn(view, answer)
            if not self._covers(view, piece):
                raise RemoteProtocolError("worker confirmed other pages than those asked for")
        serial, file = view.serial, view.file
        assert file is not None
        self._files.touch(file)
        try:
            with file as fd:
                return await trio.to_thread.run_sync(read_exactly, fd, piece.offset, piece.length)
        except OSError as error:
            if error.errno not in _DISK_FAILS:
                raise
            logger.info("cached file cannot be read, reading through ino=%d error=%s", self.attr.ino, error)
        if view.serial == serial:
            self._forget(view)
        return await self._read_through(piece, serial)

    async def _read_through(self, piece: BlockSlice, serial: int) -> Data:
        """The bytes from the under-store, as those of that descriptor cannot be read."""
        request = Fetch(
            *(self.attr.ino, piece.block_index, piece.offset, piece.length, serial),
            unreadable=True,
            promote=self._promote,
        )
        answer = await self._ask(request)
        if answer.message.serial:
            for fd in answer.fds:
                os.close(fd)
            raise RemoteProtocolError("worker confirmed what cannot be read instead of sending it")
        return answer.payload  # type: ignore[return-value]

    async def _ask(self, request: Fetch) -> Answer[FetchReply]:
        """What the worker says; bytes are as many as were asked for, and what it sent. Raises RemoteProtocolError."""
        for _ in range(_ATTEMPTS):
            answer = await self._fetch(request)
            if answer.message.serial:
                return answer
            if len(answer.payload) != request.length:
                raise RemoteProtocolError(f"worker sent other than the {request.length} bytes asked for")
            checksum = answer.message.checksum
            if checksum is None or checksum == await _checksum_of(answer.payload):  # type: ignore[arg-type]
                return answer
            logger.warning("bytes from the worker arrived damaged, asked for again ino=%d", request.ino)
        raise RemoteProtocolError("what the worker sends arrives damaged again and again")

    def _forget(self, view: _BlockView) -> None:
        """What was passed is not used again."""
        if view.file is not None:
            self._files.drop(view.file)
        view.forget()

    def _covers(self, view: _BlockView, piece: BlockSlice) -> bool:
        return view.present.issuperset(self._geometry.pages_covering(piece.offset, piece.length))

    def _learn(self, view: _BlockView, answer: Answer[FetchReply]) -> None:
        reply = answer.message
        if reply.serial != view.serial:
            if not answer.fds:
                raise RemoteProtocolError("worker confirmed pages without a descriptor to read them through")
            self._forget(view)
            view.file, view.serial = self._files.add(answer.fds[0], view.forget), reply.serial
            extra = answer.fds[1:]
        else:
            extra = answer.fds
        for fd in extra:
            os.close(fd)
        for start, end in reply.present:
            view.present.update(range(start, end))

    def close(self) -> None:
        """Gives the descriptors back. Idempotent."""
        for view in self._views.values():
            self._forget(view)
        self._views.clear()


async def _checksum_of(data: Data) -> int:
    if len(data) <= _INLINE_BYTES:
        return page_checksum(data)
    return await trio.to_thread.run_sync(page_checksum, data)


_scratch = memoryview(bytearray(MiB))


def read_exactly_nowait(fd: int, offset: int, length: int) -> memoryview:
    """`length` bytes of a file that has them in the page cache, in memory that the next call overwrites: new memory,
    which the kernel has to clear first, would cost as much as the reading. Called from one thread only.

    Raises trio.WouldBlock where it would have to wait, or the disk fails: that belongs into a thread; OSError.
    """
    global _scratch
    if length > len(_scratch):
        _scratch = memoryview(bytearray(length))
    buffer = _scratch[:length]
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (*_NOT_WITHOUT_WAITING, *_DISK_FAILS):
            raise trio.WouldBlock from None
        raise
    if count != length:
        raise trio.WouldBlock
    return buffer


def read_exactly(fd: int, offset: int, length: int) -> bytearray:
    """`length` bytes of a file that has them. Blocks on the disk. Raises OSError (EIO for a file that is too short)."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    filled = 0
    while filled < length:
        count = os.preadv(fd, [view[filled:]], offset + filled)
        if count == 0:
            raise OSError(errno.EIO, "a cached file is shorter than its content")
        filled += count
    return buffer


def _cut(piece: BlockSlice, limit: int) -> list[BlockSlice]:
    return [
        BlockSlice(piece.block_index, piece.offset + start, min(limit, piece.length - start))
        for start in range(0, piece.length, limit)
    ]
