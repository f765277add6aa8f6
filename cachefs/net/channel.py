"""Frames over one socket: the driver below clients and servers alike."""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import trio

from cachefs.model import TransportError
from cachefs.wire import Connection, Frame

R = TypeVar("R")

_FD_SIZE = array.array("i").itemsize
_ROUNDS_WITHOUT_CHECKPOINT = 32
_WAIT_IN_THREAD_MS = 20
"""For room to send a file: longer, and one who does not read would keep a thread from others."""
_FILES_AT_ONCE = 16
"""Being sent by threads: with a disk that hangs they hang, and nothing else of this process does."""
_FINISH_S, _FINISH_ROUNDS, _FINISH_BYTES = 1.0, 16, 64 * 1024
STALL_TIMEOUT_S = 60.0
"""A side that reads nothing of what is being sent to it for so long is given up."""


_file_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("file_threads")


class FileSlice(NamedTuple):
    """Bytes of an open file, sent by the kernel without passing through us. The descriptor stays the caller's."""

    fd: int
    offset: int
    length: int


class StalledError(TransportError):
    """The connection is closed, because the other side does not read."""


Body = bytes | bytearray | memoryview | FileSlice


@dataclass(frozen=True)
class Answer(Generic[R]):
    """An answer with more than its message."""

    message: R
    payload: Body = b""
    """Received payloads are a memoryview."""
    fds: tuple[int, ...] = ()
    """Descriptors passed over a unix socket. Received ones belong to the caller."""
    close_fds: bool = False
    """Of the sender: close `fds` once they are sent, or cannot be."""
    on_sent: Callable[[], None] | None = None
    """Of the sender: called once it is sent, or cannot be."""


class Channel:
    """Owns a connected, non-blocking socket. One task receives; any number send."""

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        self.connection = connection
        self._sock = sock
        self._unix = sock.family == socket.AF_UNIX
        self._ancillary = socket.CMSG_SPACE(connection.limits.descriptors * _FD_SIZE) if self._unix else 0
        self._sending = trio.StrictFIFOLock()
        self._rounds = 0
        self._sends_file = False
        self.arrivals = 0
        """Grows with whatever comes from the other side, half a frame too."""
        self.closed = False

    # ---- receiving -------------------------------------------------------------------------------------------------

    async def receive(self) -> Frame | None:
        """The next frame; None when the other side has closed. Cancel-safe: nothing is lost.

        Raises RemoteProtocolError for a malformed frame, TransportError when the connection breaks or was closed here.
        """
        while True:
            try:
                count, descriptors = self._receive_nowait()
            except BlockingIOError:
                self._rounds = 0
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                except trio.ClosedResourceError:
                    raise TransportError("connection closed") from None
                continue
            except OSError as error:
                raise TransportError(f"connection lost: {error.strerror}") from error
            if count == 0:
                return None
            self.arrivals += 1
            self._rounds += 1
            if self._rounds > _ROUNDS_WITHOUT_CHECKPOINT:
                # A peer that always has more for us must not keep everybody else from running.
                self._rounds = 0
                frames = self.connection.buffer_updated(count, descriptors)
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                frames = self.connection.buffer_updated(count, descriptors)
            if frames:
                return frames[0]

    def _receive_nowait(self) -> tuple[int, Sequence[int]]:
        if self.closed:
            raise TransportError("connection closed")
        with self.connection.get_buffer() as buffer:
            if not self._unix:
                return self._sock.recv_into(buffer), ()
            count, ancillary, _, _ = self._sock.recvmsg_into([buffer], self._ancillary, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % _FD_SIZE])
        return count, descriptors

    # ---- sending ---------------------------------------------------------------------------------------------------

    async def send(self, head: bytes, payload: Body = b"", fds: Sequence[int] = ()) -> None:
        """Write one whole frame. Returns without a checkpoint when the socket takes it at once.

        Cancelled while it waits for its turn, nothing was sent; once begun, a frame is sent to its end, and only
        closing the channel stops it, or that the other side reads nothing of it for a minute. Raises TransportError.
        """
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if self.closed:
                raise TransportError("connection closed")
            try:
                await self._send_frame(head, payload, fds)
            except (OSError, trio.ClosedResourceError) as error:
                # Half a frame may be out there: nothing can follow it.
                self.close()
                raise TransportError(f"connection lost: {error}") from error
        finally:
            self._sending.release()

    async def _send_frame(self, head: bytes, payload: Body, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        is_file = isinstance(payload, FileSlice)
        buffers = [memoryview(head)]
        if not isinstance(payload, FileSlice) and len(payload):
            buffers.append(memoryview(payload).cast("B"))
        flags = socket.MSG_MORE if is_file else 0
        while buffers:
            try:
                sent = self._sock.sendmsg(buffers, ancillary, flags)
            except BlockingIOError:
                await self._wait_writable()
                continue
            ancillary = []
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][sent:]
        if isinstance(payload, FileSlice):
            await self._send_file(payload)

    async def _send_file(self, part: FileSlice) -> None:
        offset, end = part.offset, part.offset + part.length
        # The socket is one of its own, since ours may be closed meanwhile, and its number be another file's then.
        with trio.CancelScope(shield=True), self._sock.dup() as sock:
            self._sends_file = True
            try:
                while offset < end:
                    # In a thread: the file's pages may have to come from the disk.
                    offset = await trio.to_thread.run_sync(
                        _send_pages, sock, part.fd, offset, end, limiter=_file_limiter()
                    )
                    if self.closed:
                        raise OSError("closed while a file was sent")
                    if offset < end:
                        await self._wait_writable()
            finally:
                self._sends_file = False

    async def _wait_writable(self) -> None:
        with trio.CancelScope(deadline=trio.current_time() + STALL_TIMEOUT_S, shield=True) as scope:
            await trio.lowlevel.wait_writable(self._sock)
        if scope.cancelled_caught:
            self.close()
            raise StalledError(f"the other side has read nothing for {STALL_TIMEOUT_S:g} s")

    async def finish(self) -> None:
        """Nothing more is sent; what is under way is read and dropped, for up to a second.

        Closed with bytes unread, the kernel would throw away what the other side has not read yet: why it is refused.
        """
        with trio.move_on_after(_FINISH_S):
            try:
                self._sock.shutdown(socket.SHUT_WR)
                for _ in range(_FINISH_ROUNDS):
                    await trio.lowlevel.wait_readable(self._sock)
                    if not self._sock.recv(_FINISH_BYTES):
                        return
            except (OSError, trio.ClosedResourceError):
                pass

    # ---- end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Whoever waits in `receive` or `send` gets TransportError. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._sends_file:
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        for fd in self.connection.drain_descriptors():
            os.close(fd)

    def peer_credentials(self) -> tuple[int, int, int] | None:
        """(pid, uid, gid) of the process that connected to a unix socket."""
        if not self._unix:
            return None
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = array.array("i", raw)
        return pid, uid, gid

    def peer_host(self) -> str:
        """For logs; empty on unix sockets."""
        try:
            return "" if self._unix else str(self._sock.getpeername()[0])
        except OSError:
            return "unknown"


def _file_limiter() -> trio.CapacityLimiter:
    """The one of this event loop."""
    try:
        return _file_threads.get()
    except LookupError:
        _file_threads.set(trio.CapacityLimiter(_FILES_AT_ONCE))
        return _file_threads.get()


def _send_pages(sock: socket.socket, fd: int, offset: int, end: int) -> int:
    """Send a file up to `end`, or until the other side does not take anything for a while; returns how far.

    Waiting here for the next room takes the wake-up of one thread, and that of two where the event loop waits.
    """
    writable = select.poll()
    writable.register(sock, select.POLLOUT)
    while offset < end:
        try:
            sent = os.sendfile(sock.fileno(), fd, offset, end - offset)
        except BlockingIOError:
            if not writable.poll(_WAIT_IN_THREAD_MS):
                break
            continue
        if sent == 0:
            raise OSError("a file to be sent is shorter than announced")
        offset += sent
    return offset


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
