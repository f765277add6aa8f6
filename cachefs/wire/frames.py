"""The frame: a fixed header, MessagePack meta, raw payload.

| offset | bytes | what (little endian) |
|---|---|---|
| 0 | 2 | magic `cF` |
| 2 | 1 | version of the protocol, 1 |
| 3 | 1 | kind |
| 4 | 4 | number of descriptors that came with the first byte of the frame |
| 8 | 8 | request id: chosen by the asker, above 0; 0 in HELLO, AUTH, and the ERROR that refuses them |
| 16 | 4 | length of meta |
| 20 | 4 | length of payload |

What follows what, from the asker ( > ) and from the answerer ( < ):

    without tokens:   > HELLO   < HELLO                       and then requests and answers
    with tokens:      > HELLO   < HELLO   > AUTH   < AUTH     and then requests and answers; < ERROR refuses instead
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import msgspec

from cachefs.model import MiB

MAGIC = b"cF"
VERSION = 1
HEADER = struct.Struct("<2sBBIQII")


class Kind(enum.IntEnum):
    HELLO = 1
    """First frame in each direction: who I am."""
    REQUEST = 2
    REPLY = 3
    """The one answer, or, to a stream, its end."""
    ITEM = 4
    """One element of a stream."""
    ERROR = 5
    """The answer instead: code, message."""
    CANCEL = 6
    """From the asker: the answer is not wanted any more. It may come nevertheless."""
    CREDIT = 7
    """From the asker: so many more ITEMs may be sent."""
    AUTH = 8
    """Second frame in each direction where there are tokens: the proof that ours is the right one, see `auth`."""


@dataclass(frozen=True)
class Limits:
    """What a frame may be at most; anything larger closes the connection before it is read."""

    meta_bytes: int = MiB
    payload_bytes: int = 16 * MiB
    """Of a REPLY. Nothing else has a payload: no request needs one, and whoever answers must not be filled up."""
    hello_bytes: int = 4096
    auth_bytes: int = 64
    descriptors: int = 8


DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that somebody else encoded; the last for nesting, also in fields nobody asked for."""

STREAM_WINDOW = 4
"""ITEMs a stream may send before the first CREDIT, and what a receiver keeps it at."""
