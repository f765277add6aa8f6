"""Answers, byte by byte."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.fusewire import (
    UNIQUE_RESEND,
    DirEntry,
    OpenFlag,
    attr_reply,
    data_header,
    dirent_limit,
    empty_reply,
    entry_reply,
    error_reply,
    inc_epoch_notification,
    inval_entry_notification,
    negative_entry_reply,
    open_reply,
    pack_dirents,
    resend_notification,
    statfs_reply,
)
from cachefs.fusewire.replies import split_ttl
from cachefs.model import Attr, ContentKey, Ino, Kind

FILE = Attr(Ino(5), Kind.FILE, 1000, 1_700_000_000_000_000_005, 0o644, 1000, 100, ContentKey(b"k" * 16))
DIRECTORY = Attr(Ino(6), Kind.DIRECTORY, 0, 0, 0o755, 0, 0, ContentKey(b""))

FILE_ATTR = bytes.fromhex(
    "0500000000000000"  # inode number
    "e803000000000000"  # size 1000
    "0200000000000000"  # blocks of 512
    "00f1536500000000"  # atime
    "00f1536500000000"  # mtime
    "00f1536500000000"  # ctime
    "05000000 05000000 05000000"  # their nanoseconds
    "a4810000"  # mode 0100644
    "01000000"  # links
    "e8030000"  # uid
    "64000000"  # gid
    "00000000"  # device
    "00100000"  # block size
    "00000000"  # flags
)
ENTRY = (
    bytes.fromhex(
        "0500000000000000"  # node
        "0000000000000000"  # generation
        "0100000000000000"  # entry valid: 1.5 s
        "0200000000000000"  # attributes valid: 2 s
        "0065cd1d"
        "00000000"
    )
    + FILE_ATTR
)


def test_entry() -> None:
    header = bytes.fromhex("90000000 00000000 0700000000000000")
    assert entry_reply(7, 5, FILE, attr_ttl_s=2.0, entry_ttl_s=1.5) == header + ENTRY


def test_negative_entry() -> None:
    reply = negative_entry_reply(7, 1.5)
    assert reply[:16] == bytes.fromhex("90000000 00000000 0700000000000000")
    assert struct.unpack_from("<QQQQII", reply, 16) == (0, 0, 1, 0, 500_000_000, 0)
    assert reply[56:] == bytes(88)


def test_attr() -> None:
    assert attr_reply(7, 5, FILE, 2.5) == (
        bytes.fromhex(
            "78000000 00000000 0700000000000000"
            "0200000000000000"  # valid: 2.5 s
            "0065cd1d"
            "00000000"
        )
        + FILE_ATTR
    )


def test_the_root_shows_the_number_the_kernel_knows() -> None:
    assert struct.unpack_from("<Q", attr_reply(7, 1, DIRECTORY, 0), 32) == (1,)
    assert struct.unpack_from("<I", attr_reply(7, 1, DIRECTORY, 0), 92) == (0o40755,)


def test_times_before_1970_round_down() -> None:
    attr = Attr(Ino(5), Kind.FILE, 0, -1, 0o644, 0, 0, ContentKey(b""))
    assert struct.unpack_from("<qqqIII", attr_reply(1, 5, attr, 0), 56) == (*[-1] * 3, *[999_999_999] * 3)


def test_open_passthrough() -> None:
    flags = OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH
    assert open_reply(7, 9, flags, 3) == bytes.fromhex(
        "20000000 00000000 0700000000000000"
        "0900000000000000"  # handle
        "a0000000"  # flags
        "03000000"  # backing id
    )


def test_open_cached() -> None:
    assert open_reply(7, 2**64 - 1, OpenFlag.KEEP_CACHE)[16:] == bytes.fromhex("ffffffffffffffff 02000000 00000000")


def test_errors_and_empty() -> None:
    assert error_reply(UNIQUE_RESEND | 7, errno.ENOENT) == bytes.fromhex("10000000 feffffff 0700000000000080")
    assert empty_reply(7) == bytes.fromhex("10000000 00000000 0700000000000000")
    assert data_header(7, 5) == bytes.fromhex("15000000 00000000 0700000000000000")
    assert resend_notification() == bytes.fromhex("10000000 07000000 0000000000000000")


def test_statfs() -> None:
    reply = statfs_reply(7, 4096, 100, 60, 10, 255)
    assert reply[:16] == bytes.fromhex("60000000 00000000 0700000000000000")
    assert struct.unpack_from("<QQQQQIIII", reply, 16) == (100, 60, 60, 10, 0, 4096, 255, 4096, 0)
    assert len(reply) == 96


def test_dirent() -> None:
    record = bytes.fromhex(
        "0500000000000000"  # inode number
        "0200000000000000"  # where to go on
        "08000000"  # length of the name
        "08000000"  # DT_REG
    )
    assert pack_dirents([DirEntry(b"data.bin", 5, Kind.FILE, 2)], 4096, plus=False) == record + b"data.bin"
    # 9 bytes are padded to 16
    assert pack_dirents([DirEntry(b"data.bins", 5, Kind.DIRECTORY, 2)], 4096, plus=False)[20:] == (
        b"\4\0\0\0data.bins" + bytes(7)
    )


def test_direntplus() -> None:
    entry = DirEntry(b"a", 5, Kind.FILE, 2, FILE, attr_ttl_s=2.0, entry_ttl_s=1.5)
    dirent = bytes.fromhex("0500000000000000 0200000000000000 01000000 08000000") + b"a" + bytes(7)
    assert pack_dirents([entry], 4096, plus=True) == ENTRY + dirent


def test_direntplus_without_attributes_gives_no_node() -> None:
    data = pack_dirents([DirEntry(b"a", 5, Kind.FILE, 2)], 4096, plus=True)
    assert data[:128] == bytes(128)
    assert data[128:136] == b"\5" + bytes(7)


def unpack_names(data: bytes, plus: bool) -> list[bytes]:
    names = []
    skip = 128 if plus else 0
    at = 0
    while at < len(data):
        _, _, length, _ = struct.unpack_from("<QQII", data, at + skip)
        start = at + skip + 24
        names.append(data[start : start + length])
        at = (start + length + 7) & ~7
    assert at == len(data)
    return names


@given(
    names=st.lists(st.binary(min_size=1, max_size=255), max_size=40),
    size=st.integers(0, 8192),
    plus=st.booleans(),
)
def test_a_listing_is_as_many_whole_records_as_fit(names: list[bytes], size: int, plus: bool) -> None:
    data = pack_dirents([DirEntry(name, 5, Kind.FILE, 1, FILE) for name in names], size, plus)
    assert len(data) <= size
    packed = unpack_names(data, plus)
    assert packed == names[: len(packed)]
    assert len(packed) <= dirent_limit(size, plus)
    if len(packed) < len(names):
        next_name = names[len(packed)]
        assert len(data) + (24 + 128 * plus + len(next_name) + 7) // 8 * 8 > size


@pytest.mark.parametrize(
    ("ttl_s", "expected"),
    [
        (-1.0, (0, 0)),
        (0.25, (0, 250_000_000)),
        (float("inf"), (1 << 31, 0)),
        (3600, (3600, 0)),
    ],
)
def test_ttls(ttl_s: float, expected: tuple[int, int]) -> None:
    assert split_ttl(ttl_s) == expected


def test_notifications() -> None:
    assert inval_entry_notification(5, b"ab", expire_only=False) == bytes.fromhex(
        "23000000 03000000 0000000000000000 0500000000000000 02000000 00000000 616200"
    )
    assert inval_entry_notification(5, b"ab", expire_only=True)[28:32] == b"\1\0\0\0"
    assert inc_epoch_notification() == bytes.fromhex("10000000 08000000 0000000000000000")
