"""Golden bytes of the kernel ABI, and requests that make no sense."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs import fusewire
from cachefs.fusewire import (
    DirEntry,
    InitFlag,
    InitOptions,
    Negotiated,
    attr_reply,
    data_header,
    dirent_limit,
    empty_reply,
    entry_reply,
    error_reply,
    init_reply,
    negative_entry_reply,
    negotiate,
    open_reply,
    pack_dirents,
    parse_batch_forget,
    parse_header,
    parse_init,
    parse_name,
    parse_open,
    parse_read,
    statfs_reply,
)
from cachefs.model import Attr, ConfigError, ContentKey, Ino, Kind, RemoteProtocolError

FILE = Attr(Ino(7), Kind.FILE, 1000, 5_000_000_009, 0o644, 1, 2, ContentKey(b""))
DIRECTORY = Attr(Ino(8), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))


def request(opcode: int, body: bytes = b"", node: int = 3, unique: int = 9) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0) + body


def test_headers() -> None:
    assert error_reply(9, 2) == struct.pack("<IiQ", 16, -2, 9)
    assert empty_reply(9) == struct.pack("<IiQ", 16, 0, 9)
    assert data_header(9, 100) == struct.pack("<IiQ", 116, 0, 9)
    header = parse_header(request(1, b"name\0"))
    assert (header.opcode, header.node, header.unique) == (1, 3, 9)


def test_entries_and_attributes() -> None:
    reply = entry_reply(9, 7, FILE, 1.5, 60.0)
    assert len(reply) == 16 + 40 + 88
    # nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
    assert struct.unpack_from("<QQQQII", reply, 16) == (7, 0, 60, 1, 0, 500_000_000)
    # ino, size, blocks; atime, mtime, ctime and their nanoseconds; mode, nlink, uid, gid
    assert struct.unpack_from("<QQQqqqIIIIIII", reply, 56) == (7, 1000, 2, 5, 5, 5, 9, 9, 9, 0o100644, 1, 1, 2)
    attr = attr_reply(9, 1, DIRECTORY, 2.0)
    assert len(attr) == 16 + 16 + 88 and struct.unpack_from("<QII", attr, 16) == (2, 0, 0)
    assert struct.unpack_from("<Q", attr, 32) == (1,) and struct.unpack_from("<I", attr, 32 + 60) == (0o040755,)
    negative = negative_entry_reply(9, 3.0)
    assert len(negative) == len(reply) and struct.unpack_from("<QQQ", negative, 16) == (0, 0, 3)


def test_open_and_statfs() -> None:
    assert open_reply(9, 5, 0xA0, 3) == struct.pack("<IiQQIi", 32, 0, 9, 5, 0xA0, 3)
    assert len(statfs_reply(9, 4096, 0, 0, 0, 255)) == 16 + 80


@pytest.mark.parametrize("plus", [False, True])
def test_listings_are_whole_records(plus: bool) -> None:
    entries = [DirEntry(b"n" * length, 10 + length, Kind.FILE, length, FILE, 1, 1) for length in range(1, 60)]
    data = pack_dirents(entries, 1000, plus)
    assert 0 < len(data) <= 1000 and len(data) % 8 == 0
    names, position = [], 0
    while position < len(data):
        position += 128 * plus
        node, offset, length, kind = struct.unpack_from("<QQII", data, position)
        names.append(data[position + 24 : position + 24 + length])
        assert (node, offset, kind) == (10 + length, length, 0o100000 >> 12)
        position += (24 + length + 7) // 8 * 8
    assert names == [b"n" * length for length in range(1, len(names) + 1)]
    assert len(names) <= dirent_limit(1000, plus)
    assert pack_dirents(entries, 8, plus) == b""


def init_request(major: int = 7, minor: int = 45, flags: int = 0xFFFFFFFFFFFFFFFF) -> bytes:
    return request(26, struct.pack("<IIIII44x", major, minor, 1 << 20, flags & 0xFFFFFFFF, flags >> 32))


def test_init_grants_only_what_is_offered() -> None:
    agreed = negotiate(parse_init(init_request()), InitOptions())
    assert agreed.passthrough and agreed.readdirplus and agreed.resend and not agreed.no_open
    assert not agreed.flags & InitFlag.WRITEBACK_CACHE
    assert agreed.max_read == 1 << 20
    assert len(init_reply(9, agreed)) == 16 + 64
    assert Negotiated.load(agreed.save()) == agreed
    offered = int(InitFlag.ASYNC_READ | InitFlag.INIT_EXT)
    little = negotiate(parse_init(init_request(flags=offered)), InitOptions())
    assert little.flags == offered and not little.passthrough and little.max_stack_depth == 0
    off = negotiate(parse_init(init_request()), InitOptions(passthrough=False, readdirplus=False))
    assert not off.passthrough and not off.readdirplus


def test_kernels_that_are_too_old() -> None:
    for major, minor in ((6, 45), (7, 22)):
        with pytest.raises(RemoteProtocolError, match="newer is needed"):
            negotiate(parse_init(init_request(major, minor)), InitOptions())


@pytest.mark.parametrize("wrong", [{"max_pages": 0}, {"max_stack_depth": 3}, {"max_background": 0}, {"no_open": True}])
def test_wrong_options(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        InitOptions(**wrong)  # type: ignore[arg-type]


def test_bodies() -> None:
    assert parse_name(request(1, b"some name\0")) == b"some name"
    assert parse_open(request(14, struct.pack("<II", 0o100000, 0))).flags == 0o100000
    read = parse_read(request(15, struct.pack("<QQIIQII", 5, 4096, 100, 0, 0, 0, 0)))
    assert (read.fh, read.offset, read.size) == (5, 4096, 100)
    forgotten = parse_batch_forget(request(42, struct.pack("<IIQQQQ", 2, 0, 5, 1, 6, 2)))
    assert [tuple(each) for each in forgotten] == [(5, 1), (6, 2)]
    with pytest.raises(RemoteProtocolError):
        parse_batch_forget(request(42, struct.pack("<IIQQ", 2, 0, 5, 1)))


PARSERS = [getattr(fusewire, name) for name in fusewire.__all__ if name.startswith("parse_") and name != "parse_forget"]


@given(st.binary(max_size=120))
def test_garbage_raises_nothing_else(garbage: bytes) -> None:
    for parse in PARSERS:
        try:
            parse(garbage)
        except RemoteProtocolError:
            pass
    try:
        fusewire.parse_forget(garbage, 1)
    except RemoteProtocolError:
        pass
