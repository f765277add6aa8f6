"""Frames over TLS. It is made and undone in this process, so there is no sendfile, and there are no descriptors."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from collections.abc import Sequence
from typing import cast

import trio

from cachefs.model import KiB, TransportError
from cachefs.net.channel import Body, Channel, FileSlice
from cachefs.wire import Connection

_RECEIVE_BYTES = 256 * KiB
_SEND_BYTES = 256 * KiB
"""Encrypted at a time: some 0.1 ms in which nobody else runs."""
_JOINED_BYTES = 16 * KiB
"""A payload up to this is sent in one record with its head."""

_ROUNDS_WITHOUT_BYTES = 8
_NOT_TLS_ALERT = bytes.fromhex("15 0303 0002 02 46")
"""Fatal, protocol_version. A plain asker knows by it what it has met."""


class TlsChannel(Channel):
    """`handshake` comes first."""

    def __init__(
        self, sock: socket.socket, connection: Connection, context: ssl.SSLContext, server_hostname: str | None = None
    ) -> None:
        """`server_hostname`: whom the other side must be, on the side that connected."""
        super().__init__(sock, connection)
        self._is_server = server_hostname is None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=self._is_server, server_hostname=server_hostname
        )

    async def handshake(self) -> None:
        """Raises TransportError when there can be no TLS with the other side. The caller has the clock."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush_handshake()
                await self._wait_for_more()
            except ssl.SSLError as error:
                # The other side is told why; OpenSSL tells nothing to who does not begin with TLS at all.
                if self._is_server and not self._outgoing.pending:
                    self._outgoing.write(_NOT_TLS_ALERT)
                await self._flush_handshake()
                raise TransportError(explained(error)) from error
            else:
                await self._flush_handshake()
                return

    def peer_certificate_sha256(self) -> bytes:
        """Empty if the other side showed none."""
        certificate = self._tls.getpeercert(binary_form=True)
        return hashlib.sha256(certificate).digest() if certificate else b""

    async def _flush_handshake(self) -> None:
        try:
            await self._flush()
        except (OSError, trio.ClosedResourceError) as error:
            raise TransportError(f"connection lost: {error}") from error

    async def _wait_for_more(self) -> None:
        while True:
            try:
                if not self._feed():
                    raise TransportError("the other side closed the connection in the TLS handshake")
                return
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                except trio.ClosedResourceError:
                    raise TransportError("connection closed") from None
            except OSError as error:
                raise TransportError(f"connection lost: {error.strerror}") from error

    def _feed(self) -> bool:
        """False: nothing will come any more. Raises BlockingIOError while there is nothing."""
        if self.closed:
            raise TransportError("connection closed")
        data = self._sock.recv(_RECEIVE_BYTES)
        self._incoming.write(data)
        return bool(data)

    def _receive_nowait(self) -> tuple[int, Sequence[int]]:
        if self.closed:
            raise TransportError("connection closed")
        rounds = 0
        with self.connection.get_buffer() as buffer:
            while True:
                try:
                    # With a buffer it returns how many bytes it has put there.
                    return cast(int, self._tls.read(len(buffer), buffer)), ()
                except ssl.SSLWantReadError:
                    rounds += 1
                    if rounds > _ROUNDS_WITHOUT_BYTES:
                        # Records that carry nothing for us must not keep everybody else from running.
                        raise BlockingIOError from None
                    if not self._feed():
                        return 0, ()
                except ssl.SSLZeroReturnError:
                    return 0, ()
                except ssl.SSLError as error:
                    raise TransportError(explained(error)) from error

    async def _send_frame(self, head: bytes, payload: Body, fds: Sequence[int]) -> None:
        if fds:
            raise OSError("descriptors cannot be sent over TLS")
        if isinstance(payload, FileSlice):
            await self._send_all(head)
            await self._send_file(payload)
        elif len(payload) <= _JOINED_BYTES:
            await self._send_all(head + bytes(payload))
        else:
            await self._send_all(head)
            await self._send_all(payload)

    async def _send_all(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view), _SEND_BYTES):
                part = view[start : start + _SEND_BYTES]
                while part:
                    part = part[self._tls.write(part) :]
                await self._flush()

    async def _send_file(self, part: FileSlice) -> None:
        offset, end = part.offset, part.offset + part.length
        while offset < end:
            with trio.CancelScope(shield=True):
                # In a thread: the file's pages may have to come from the disk.
                data = await trio.to_thread.run_sync(os.pread, part.fd, min(_SEND_BYTES, end - offset), offset)
            if not data:
                raise OSError("a file to be sent is shorter than announced")
            await self._send_all(data)
            offset += len(data)

    async def _flush(self) -> None:
        """One task at a time: the handshake's, and later whoever has the turn to send."""
        waiting = memoryview(self._outgoing.read())
        while waiting:
            try:
                waiting = waiting[self._sock.send(waiting) :]
            except BlockingIOError:
                await self._wait_writable()


def explained(error: ssl.SSLError) -> str:
    """What went wrong, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other side's certificate is refused: {error.verify_message}"
    reason = (error.reason or "").replace("_", " ").lower()
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_MESSAGE", "RECORD_LAYER_FAILURE"):
        return f"the other side does not speak TLS ({reason})"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the other side shows no certificate"
    if "alert" in reason:
        return f"the other side refuses this side's TLS, or its certificate ({reason})"
    return f"TLS failed ({reason or error})"
