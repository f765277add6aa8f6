"""The protocol between our processes, without I/O: frames, typed requests, errors, and `messages`."""

from cachefs.wire.auth import Handshake, Role, Tokens
from cachefs.wire.connection import Buffer, Connection, Frame, decode_credit, decode_error
from cachefs.wire.errorcodes import ErrorMeta, from_wire, to_wire
from cachefs.wire.frames import STREAM_WINDOW, Kind, Limits
from cachefs.wire.hello import Hello
from cachefs.wire.requests import (
    AnyRequest,
    ReplyDecoders,
    Request,
    RequestDecoder,
    StreamRequest,
    reply_type,
)

__all__ = [
    "STREAM_WINDOW",
    "AnyRequest",
    "Buffer",
    "Connection",
    "ErrorMeta",
    "Frame",
    "Handshake",
    "Hello",
    "Kind",
    "Limits",
    "ReplyDecoders",
    "Request",
    "RequestDecoder",
    "Role",
    "StreamRequest",
    "Tokens",
    "decode_credit",
    "decode_error",
    "from_wire",
    "reply_type",
    "to_wire",
]
