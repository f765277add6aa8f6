"""One connection without a socket: bytes in, events out, and buffers to write.

Reading costs no copy of payloads: `get_buffer` returns where the next bytes belong, the header's or the body's own
buffer, and `buffer_updated` says how many arrived. A body is allocated only after its header passed the limits.

States, per direction:   fresh --HELLO--> open --(malformed frame)--> broken
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from cachefs.model import LocalProtocolError, RemoteProtocolError
from cachefs.wire.errorcodes import ErrorMeta
from cachefs.wire.frames import HEADER, MAGIC, VERSION, Kind, Limits
from cachefs.wire.hello import Hello

Buffer = bytes | bytearray | memoryview


class Frame(NamedTuple):
    """Something arrived. `meta` is not decoded yet, except that it is complete and within the limits."""

    kind: Kind
    request_id: int
    meta: bytes | memoryview
    payload: bytes | memoryview
    descriptors: tuple[int, ...]
    """Open descriptors, now the receiver's to close."""


_NO_META = {Kind.CANCEL}
_FROM_ASKER = {Kind.REQUEST, Kind.CANCEL, Kind.CREDIT}
_FROM_ANSWERER = {Kind.REPLY, Kind.ITEM, Kind.ERROR}


class Connection:
    """`asking`: we send requests and the other side answers; else the other way round."""

    def __init__(self, *, asking: bool, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._accepted_kinds = _FROM_ANSWERER if asking else _FROM_ASKER
        self._sent_kinds = _FROM_ASKER if asking else _FROM_ANSWERER
        self.peer_hello: Hello | None = None
        self._hello_sent = False
        self._header = bytearray(HEADER.size)
        self._body: bytearray | None = None
        self._filled = 0
        self._fields: tuple[Kind, int, int, int] = (Kind.HELLO, 0, 0, 0)  # kind, descriptors, request id, meta length
        self._descriptors: deque[int] = deque()
        self._broken = False

    # ---- receiving -------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Where the next bytes from the socket go; never empty. Release it before calling `buffer_updated`."""
        target = self._header if self._body is None else self._body
        return memoryview(target)[self._filled :]

    def buffer_updated(self, count: int, descriptors: Sequence[int] = ()) -> list[Frame]:
        """`count` bytes were put into the last `get_buffer`, and these descriptors came with them.

        Returns the frame they complete, if they do. Raises RemoteProtocolError when the other side broke a rule; the
        connection is of no use then, and `drain_descriptors` has what must be closed.
        """
        if self._broken:
            raise LocalProtocolError("bytes given to a connection after its end")
        self._descriptors.extend(descriptors)
        self._filled += count
        try:
            if len(self._descriptors) > self.limits.descriptors:
                raise RemoteProtocolError(f"more than {self.limits.descriptors} descriptors at once")
            if self._body is None:
                if self._filled < HEADER.size:
                    return []
                self._body = bytearray(self._parse_header())
                self._filled = 0
            if self._filled < len(self._body):
                return []
            return self._complete()
        except RemoteProtocolError:
            self._broken = True
            raise

    def _parse_header(self) -> int:
        """Length of the body that follows."""
        magic, version, kind_number, descriptors, request_id, meta_length, payload_length = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise RemoteProtocolError("not a cachefs peer")
        if version != VERSION:
            raise RemoteProtocolError(f"peer speaks protocol version {version}, this side {VERSION}")
        try:
            kind = Kind(kind_number)
        except ValueError:
            raise RemoteProtocolError(f"frame of unknown kind {kind_number}") from None
        if self.peer_hello is None and kind is not Kind.HELLO:
            raise RemoteProtocolError(f"{kind.name} before HELLO")
        if self.peer_hello is not None and kind not in self._accepted_kinds:
            raise RemoteProtocolError(f"{kind.name} is not for this side to receive")
        if (request_id == 0) != (kind is Kind.HELLO):
            raise RemoteProtocolError(f"{kind.name} with request id {request_id}")
        if meta_length > self.limits.meta_bytes or payload_length > self.limits.payload_bytes:
            raise RemoteProtocolError(f"{kind.name} of {meta_length} + {payload_length} bytes is over the limit")
        if descriptors > self.limits.descriptors:
            raise RemoteProtocolError(f"{kind.name} with {descriptors} descriptors is over the limit")
        self._fields = (kind, descriptors, request_id, meta_length)
        return int(meta_length + payload_length)

    def _complete(self) -> list[Frame]:
        assert self._body is not None
        kind, count, request_id, meta_length = self._fields
        if len(self._descriptors) < count:
            raise RemoteProtocolError(f"{kind.name} announced {count} descriptors, {len(self._descriptors)} came")
        body = memoryview(self._body)
        descriptors = tuple(self._descriptors.popleft() for _ in range(count))
        frame = Frame(kind, request_id, body[:meta_length], body[meta_length:], descriptors)
        self._body, self._filled = None, 0
        if kind is Kind.HELLO:
            self._descriptors.extend(descriptors)
            try:
                self.peer_hello = msgspec.msgpack.decode(frame.meta, type=Hello)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise RemoteProtocolError(f"HELLO refused: {error}") from error
        return [frame]

    def drain_descriptors(self) -> list[int]:
        """Descriptors that belong to no complete frame: to be closed when the connection ends."""
        left = list(self._descriptors)
        self._descriptors.clear()
        return left

    # ---- sending ---------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello) -> bytes:
        if self._hello_sent:
            raise LocalProtocolError("HELLO is sent once")
        self._hello_sent = True
        meta = msgspec.msgpack.encode(hello)
        return HEADER.pack(MAGIC, VERSION, Kind.HELLO, 0, 0, len(meta), 0) + meta

    def head(
        self, kind: Kind, request_id: int, meta: object = None, payload_length: int = 0, descriptors: int = 0
    ) -> bytes:
        """Header and meta of a frame; the payload, so many bytes, is written right after it.

        Raises LocalProtocolError for what the other side would refuse.
        """
        if not self._hello_sent:
            raise LocalProtocolError("HELLO comes first")
        if kind not in self._sent_kinds:
            raise LocalProtocolError(f"{kind.name} is not for this side to send")
        encoded = msgspec.msgpack.encode(meta) if kind not in _NO_META else b""
        if len(encoded) > self.limits.meta_bytes or payload_length > self.limits.payload_bytes:
            raise LocalProtocolError(f"{kind.name} of {len(encoded)} + {payload_length} bytes is over the limit")
        if descriptors > self.limits.descriptors:
            raise LocalProtocolError(f"{kind.name} with {descriptors} descriptors is over the limit")
        return HEADER.pack(MAGIC, VERSION, kind, descriptors, request_id, len(encoded), payload_length) + encoded


def decode_error(meta: Buffer) -> ErrorMeta:
    """Raises RemoteProtocolError."""
    try:
        return msgspec.msgpack.decode(meta, type=ErrorMeta)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"ERROR refused: {error}") from error


def decode_credit(meta: Buffer) -> int:
    """Raises RemoteProtocolError."""
    try:
        credit = msgspec.msgpack.decode(meta, type=int)
    except msgspec.MsgspecError as error:
        raise RemoteProtocolError(f"CREDIT refused: {error}") from error
    if not 0 < credit <= 1024:
        raise RemoteProtocolError(f"CREDIT of {credit}")
    return credit
