"""One connection without a socket: bytes in, events out, and buffers to write.

Reading costs no copy of payloads: `get_buffer` returns where the next bytes belong, the header's or the body's own
buffer, and `buffer_updated` says how many arrived. A body is allocated only after its header passed the limits, and on
the answering side, where anybody may connect, only as it arrives.

States, per direction:   fresh --HELLO--> open --(malformed frame)--> broken
with a `Handshake`:      fresh --HELLO--> greeted --AUTH--> open; whatever else comes while greeted is malformed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from cachefs.model import AuthenticationError, LocalProtocolError, RemoteProtocolError
from cachefs.wire.auth import PROOF_BYTES, Handshake, Role
from cachefs.wire.bodies import Bodies
from cachefs.wire.errorcodes import ErrorMeta, to_wire
from cachefs.wire.frames import DECODE_ERRORS, HEADER, MAGIC, VERSION, Kind, Limits
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
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
"""First bytes of an alert and of a handshake."""
_MAX_CREDIT = 1024
_FIRST_BYTES = 64 * 1024
"""Of a body that an unknown side announces; the rest of the room is made as it fills."""
_bodies = Bodies()
_FROM_ASKER = {Kind.REQUEST, Kind.CANCEL, Kind.CREDIT}
_FROM_ANSWERER = {Kind.REPLY, Kind.ITEM, Kind.ERROR}


class Connection:
    """`asking`: we send requests and the other side answers; else the other way round."""

    def __init__(self, *, asking: bool, limits: Limits | None = None, handshake: Handshake | None = None) -> None:
        """`handshake`: both sides must prove themselves; without one, neither."""
        self.limits = limits or Limits()
        self.handshake = handshake
        self._asking = asking
        self._accepted_kinds = _FROM_ANSWERER if asking else _FROM_ASKER
        self._sent_kinds = _FROM_ASKER if asking else _FROM_ANSWERER
        self.peer_hello: Hello | None = None
        self._hello_sent = False
        self._auth_sent = False
        self._header = bytearray(HEADER.size)
        self._body: bytearray | None = None
        self._body_length = 0
        self._filled = 0
        self._fields: tuple[Kind, int, int, int] = (Kind.HELLO, 0, 0, 0)  # kind, descriptors, request id, meta length
        self._descriptors: deque[int] = deque()
        self._broken = False

    @property
    def is_open(self) -> bool:
        """The other side has said who it is, and proved it where it must."""
        return self.peer_hello is not None and (self.handshake is None or self.handshake.proved)

    @property
    def role(self) -> Role | None:
        """What the asker has proved to be; None where no proof is needed."""
        return self.handshake.role if self.handshake is not None and self.handshake.proved else None

    @property
    def met_tls(self) -> bool:
        """What has come of a first frame is the begin of a TLS record."""
        return (
            self.peer_hello is None and self._filled >= 2 and self._header[1] == 3 and 0x14 <= self._header[0] <= 0x17
        )

    # ---- receiving -------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Where the next bytes from the socket go; never empty. Release it before calling `buffer_updated`."""
        target = self._header if self._body is None else self._body
        return memoryview(target)[self._filled :]

    def buffer_updated(self, count: int, descriptors: Sequence[int] = ()) -> list[Frame]:
        """`count` bytes were put into the last `get_buffer`, and these descriptors came with them.

        Returns the frame they complete, if they do. Raises RemoteProtocolError when the other side broke a rule, and
        AuthenticationError when it does not prove what it must, or refuses our proof; the connection is of no use then,
        and `drain_descriptors` has what must be closed.
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
                self._body_length = self._parse_header()
                self._body = (
                    _bodies.take(self._body_length) if self._asking else bytearray(min(self._body_length, _FIRST_BYTES))
                )
                self._filled = 0
            if self._filled < self._body_length:
                if self._filled == len(self._body):
                    self._body += bytes(min(self._filled, self._body_length - self._filled))
                return []
            return self._complete()
        except (RemoteProtocolError, AuthenticationError):
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
        if self.peer_hello is not None and not self.is_open and kind is not Kind.AUTH:
            if kind is not Kind.ERROR or not self._asking:
                raise RemoteProtocolError(f"{kind.name} before AUTH")
        elif self.is_open and kind not in self._accepted_kinds:
            raise RemoteProtocolError(f"{kind.name} is not for this side to receive")
        if (request_id == 0) == self.is_open:
            raise RemoteProtocolError(f"{kind.name} with request id {request_id}")
        most_meta, most_payload, most_descriptors = self._most(kind)
        if not self.is_open:
            most_meta = min(most_meta, self.limits.hello_bytes)
        if meta_length > most_meta or payload_length > most_payload:
            raise RemoteProtocolError(f"{kind.name} of {meta_length} + {payload_length} bytes is over the limit")
        if descriptors > most_descriptors:
            raise RemoteProtocolError(f"{kind.name} with {descriptors} descriptors is over the limit")
        self._fields = (kind, descriptors, request_id, meta_length)
        return int(meta_length + payload_length)

    def _most(self, kind: Kind) -> tuple[int, int, int]:
        """(bytes of meta, bytes of payload, descriptors) a frame of this kind may have."""
        if kind is Kind.REPLY:
            return self.limits.meta_bytes, self.limits.payload_bytes, self.limits.descriptors
        if kind is Kind.HELLO:
            return self.limits.hello_bytes, 0, 0
        if kind is Kind.AUTH:
            return self.limits.auth_bytes, 0, 0
        return 0 if kind in _NO_META else self.limits.meta_bytes, 0, 0

    def _complete(self) -> list[Frame]:
        assert self._body is not None
        kind, count, request_id, meta_length = self._fields
        # A frame's descriptors come with its first byte, and no read goes over its end: none can be the next one's.
        if len(self._descriptors) != count:
            raise RemoteProtocolError(f"{kind.name} announced {count} descriptors, {len(self._descriptors)} came")
        body = memoryview(self._body)
        if self._asking:
            _bodies.give(self._body)
        if not self.is_open:
            self._greeted(kind, body)
        descriptors = tuple(self._descriptors)
        self._descriptors.clear()
        self._body, self._filled = None, 0
        return [Frame(kind, request_id, body[:meta_length], body[meta_length:], descriptors)]

    def _greeted(self, kind: Kind, body: memoryview) -> None:
        """One of the frames before anything else was whole."""
        if kind is Kind.HELLO:
            try:
                self.peer_hello = msgspec.msgpack.decode(body, type=Hello)
            except DECODE_ERRORS as error:
                raise RemoteProtocolError(f"HELLO refused: {error}") from error
            if self.handshake is not None:
                self.handshake.received(self.peer_hello, bytes(self._header) + body)
            elif self._asking and self.peer_hello.nonce:
                raise AuthenticationError("the other side demands a token, see --tokens")
        elif kind is Kind.ERROR:
            # What it says is not shown: whoever says it has proved nothing.
            raise AuthenticationError("the other side does not accept our token")
        else:
            assert self.handshake is not None
            try:
                proof = msgspec.msgpack.decode(body, type=bytes)
            except DECODE_ERRORS as error:
                raise RemoteProtocolError(f"AUTH refused: {error}") from error
            if len(proof) != PROOF_BYTES:
                raise RemoteProtocolError(f"AUTH with a proof of {len(proof)} bytes")
            self.handshake.check(proof)

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
        meta = msgspec.msgpack.encode(hello if self.handshake is None else self.handshake.greeting(hello))
        if len(meta) > self.limits.hello_bytes:
            raise LocalProtocolError(f"HELLO of {len(meta)} bytes is over the limit")
        frame = _unnumbered(Kind.HELLO, meta)
        if self.handshake is not None:
            self.handshake.sent(frame)
        return frame

    def auth(self) -> bytes:
        """After both HELLOs, and for the answering side after the asker's AUTH."""
        if self.handshake is None or self._auth_sent:
            raise LocalProtocolError("AUTH is sent once, where there are tokens")
        if not self._asking and not self.handshake.proved:
            raise LocalProtocolError("the asker proves itself first")
        proof = self.handshake.proof()
        self._auth_sent = True
        return _unnumbered(Kind.AUTH, msgspec.msgpack.encode(proof))

    def refusal(self, error: AuthenticationError) -> bytes:
        """From the answering side, in the place of AUTH: the last frame it sends."""
        if self._asking or not self._hello_sent or self._auth_sent:
            raise LocalProtocolError("a refusal comes in the place of the answering side's AUTH")
        return _unnumbered(Kind.ERROR, msgspec.msgpack.encode(to_wire(error)))

    def head(
        self, kind: Kind, request_id: int, meta: object = None, payload_length: int = 0, descriptors: int = 0
    ) -> bytes:
        """Header and meta of a frame; the payload, so many bytes, is written right after it.

        Raises LocalProtocolError for what the other side would refuse.
        """
        if not self._hello_sent:
            raise LocalProtocolError("HELLO comes first")
        if self.handshake is not None and not (self._auth_sent and self.handshake.proved):
            raise LocalProtocolError("AUTH comes first")
        if kind not in self._sent_kinds:
            raise LocalProtocolError(f"{kind.name} is not for this side to send")
        encoded = msgspec.msgpack.encode(meta) if kind not in _NO_META else b""
        most_meta, most_payload, most_descriptors = self._most(kind)
        if len(encoded) > most_meta or payload_length > most_payload:
            raise LocalProtocolError(f"{kind.name} of {len(encoded)} + {payload_length} bytes is over the limit")
        if descriptors > most_descriptors:
            raise LocalProtocolError(f"{kind.name} with {descriptors} descriptors is over the limit")
        return HEADER.pack(MAGIC, VERSION, kind, descriptors, request_id, len(encoded), payload_length) + encoded


def _unnumbered(kind: Kind, meta: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, 0, 0, len(meta), 0) + meta


def decode_error(meta: Buffer) -> ErrorMeta:
    """Raises RemoteProtocolError."""
    try:
        return msgspec.msgpack.decode(meta, type=ErrorMeta)
    except DECODE_ERRORS as error:
        raise RemoteProtocolError(f"ERROR refused: {error}") from error


def decode_credit(meta: Buffer) -> int:
    """Raises RemoteProtocolError."""
    try:
        credit = msgspec.msgpack.decode(meta, type=int)
    except DECODE_ERRORS as error:
        raise RemoteProtocolError(f"CREDIT refused: {error}") from error
    if not 0 < credit <= _MAX_CREDIT:
        raise RemoteProtocolError(f"CREDIT of {credit}")
    return credit
