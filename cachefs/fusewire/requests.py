"""Requests from the kernel: a 40-byte header, then a body that depends on the opcode. Little endian, one per read(2).

Every function takes the whole request as read from the device and raises RemoteProtocolError if it is too short or
does not make sense. Layouts are those of `abi.OLDEST_MINOR` and later, which no longer differ for what is parsed here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cachefs.fusewire.abi import IN_HEADER_SIZE, Opcode
from cachefs.model import RemoteProtocolError

_HEADER = struct.Struct("<IIQQIIIHH")
_START = struct.Struct("<IIQQ")
_OPEN = struct.Struct("<II")
_READ = struct.Struct("<QQII")
_RELEASE = struct.Struct("<Q")
_GETATTR = struct.Struct("<IIQ")
_GETXATTR = struct.Struct("<II")
_FORGET = struct.Struct("<Q")
_BATCH_FORGET = struct.Struct("<II")
_FORGET_ONE = struct.Struct("<QQ")
_INTERRUPT = struct.Struct("<Q")


class RequestHeader(NamedTuple):
    length: int
    """Of the whole request, this header included."""
    opcode: int
    """An `abi.Opcode`, or a number a newer kernel uses."""
    unique: int
    """Names the request in its answer, which must carry all 64 bits as they came."""
    node: int
    uid: int
    gid: int
    pid: int
    """Thread id of the caller in the server's pid namespace; 0 if it has none there, or the kernel itself asks."""
    extensions: int
    """Length of what follows the body, in units of 8 bytes."""
    padding: int


class OpenRequest(NamedTuple):
    """OPEN and OPENDIR."""

    flags: int
    """As in open(2), without O_CREAT, O_EXCL and O_NOCTTY."""
    open_flags: int


class ReadRequest(NamedTuple):
    """READ, READDIR and READDIRPLUS. (Lock owner and open(2) flags follow; nobody needs them.)"""

    fh: int
    offset: int
    size: int
    read_flags: int


class ReleaseRequest(NamedTuple):
    """RELEASE and RELEASEDIR. (Flags and lock owner follow; nobody needs them.)"""

    fh: int


class GetattrRequest(NamedTuple):
    flags: int
    """1: fh is valid."""
    padding: int
    fh: int


class GetxattrRequest(NamedTuple):
    """GETXATTR, and LISTXATTR, which has no name."""

    size: int
    """Of the caller's buffer; 0 asks how much there is."""
    name: bytes
    """Empty for LISTXATTR."""


class Forget(NamedTuple):
    node: int
    lookups: int


class InterruptRequest(NamedTuple):
    unique: int
    """Of the request whose caller no longer wants to wait."""


def parse_header(request: bytes) -> RequestHeader:
    try:
        header = RequestHeader._make(_HEADER.unpack_from(request))
    except struct.error as exc:
        raise RemoteProtocolError(f"request of {len(request)} bytes is shorter than its header") from exc
    if header.length != len(request):
        raise RemoteProtocolError(f"request of {len(request)} bytes says that it has {header.length}")
    return header


def parse_start(request: bytes) -> tuple[int, int, int]:
    """(opcode, unique, node): of the header what every request needs, and no more. Raises as `parse_header`."""
    if len(request) < IN_HEADER_SIZE:
        parse_header(request)
    length, opcode, unique, node = _START.unpack_from(request)
    if length != len(request):
        parse_header(request)
    return opcode, unique, node


def parse_name(request: bytes) -> bytes:
    """LOOKUP: one name, ended by a zero byte."""
    end = request.find(b"\0", IN_HEADER_SIZE)
    if end <= IN_HEADER_SIZE:
        raise RemoteProtocolError("request without a name")
    return request[IN_HEADER_SIZE:end]


def parse_open(request: bytes) -> OpenRequest:
    try:
        return OpenRequest._make(_OPEN.unpack_from(request, IN_HEADER_SIZE))
    except struct.error as exc:
        raise _too_short("OPEN", request) from exc


def parse_read(request: bytes) -> ReadRequest:
    try:
        return ReadRequest._make(_READ.unpack_from(request, IN_HEADER_SIZE))
    except struct.error as exc:
        raise _too_short("READ", request) from exc


def parse_release(request: bytes) -> ReleaseRequest:
    try:
        return ReleaseRequest._make(_RELEASE.unpack_from(request, IN_HEADER_SIZE))
    except struct.error as exc:
        raise _too_short("RELEASE", request) from exc


def parse_getattr(request: bytes) -> GetattrRequest:
    try:
        return GetattrRequest._make(_GETATTR.unpack_from(request, IN_HEADER_SIZE))
    except struct.error as exc:
        raise _too_short("GETATTR", request) from exc


def parse_getxattr(request: bytes) -> GetxattrRequest:
    try:
        size, _ = _GETXATTR.unpack_from(request, IN_HEADER_SIZE)
    except struct.error as exc:
        raise _too_short("GETXATTR", request) from exc
    start = IN_HEADER_SIZE + _GETXATTR.size
    if parse_header(request).opcode == Opcode.LISTXATTR:
        return GetxattrRequest(size, b"")
    end = request.find(b"\0", start)
    if end <= start:
        raise RemoteProtocolError("request without a name")
    return GetxattrRequest(size, request[start:end])


def parse_forget(request: bytes, node: int) -> Forget:
    """FORGET: the node is the header's."""
    try:
        return Forget(node, _FORGET.unpack_from(request, IN_HEADER_SIZE)[0])
    except struct.error as exc:
        raise _too_short("FORGET", request) from exc


def parse_batch_forget(request: bytes) -> list[Forget]:
    try:
        count, _ = _BATCH_FORGET.unpack_from(request, IN_HEADER_SIZE)
    except struct.error as exc:
        raise _too_short("BATCH_FORGET", request) from exc
    start = IN_HEADER_SIZE + _BATCH_FORGET.size
    end = start + count * _FORGET_ONE.size
    if end > len(request):
        raise RemoteProtocolError(f"BATCH_FORGET of {len(request)} bytes says that it has {count} entries")
    return [Forget._make(one) for one in _FORGET_ONE.iter_unpack(memoryview(request)[start:end])]


def parse_interrupt(request: bytes) -> InterruptRequest:
    try:
        return InterruptRequest._make(_INTERRUPT.unpack_from(request, IN_HEADER_SIZE))
    except struct.error as exc:
        raise _too_short("INTERRUPT", request) from exc


def _too_short(what: str, request: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"{what} of {len(request)} bytes is too short")
