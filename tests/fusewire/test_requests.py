"""Requests, byte by byte, and what does not parse."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachefs import fusewire
from cachefs.fusewire import (
    UNIQUE_RESEND,
    Forget,
    GetattrRequest,
    GetxattrRequest,
    InterruptRequest,
    OpenRequest,
    ReadRequest,
    ReleaseRequest,
    parse_batch_forget,
    parse_forget,
    parse_getattr,
    parse_getxattr,
    parse_header,
    parse_init,
    parse_interrupt,
    parse_name,
    parse_open,
    parse_read,
    parse_release,
    parse_start,
)
from cachefs.model import RemoteProtocolError

HEADER = bytes.fromhex(
    "32000000"  # length: 50
    "01000000"  # LOOKUP
    "0700000000000080"  # unique 7, sent again
    "0500000000000000"  # node 5
    "e8030000"  # uid 1000
    "64000000"  # gid 100
    "39300000"  # pid 12345
    "0000"  # no extensions
    "0000"
)
LOOKUP = HEADER + b"data.bin\0\0"[:10]

READ = bytes.fromhex(
    "0900000000000000"  # handle 9
    "0000100000000000"  # offset 1 MiB
    "00000200"  # 128 KiB
    "02000000"  # read flags
    "0000000000000000"  # lock owner
    "00800000"  # open flags: O_LARGEFILE
    "00000000"
)


def request(body: bytes) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), 0, 1, 1, 0, 0, 0, 0, 0) + body


PARSERS: dict[str, tuple[Callable[[bytes], object], bytes, object]] = {
    "name": (parse_name, b"data.bin\0", b"data.bin"),
    "open": (parse_open, bytes.fromhex("0080010000000000"), OpenRequest(0x18000, 0)),
    "read": (parse_read, READ, ReadRequest(9, 1 << 20, 128 << 10, 2)),
    "release": (
        parse_release,
        bytes.fromhex("0900000000000000 00800000 00000000 0000000000000000"),
        ReleaseRequest(9),
    ),
    "getattr": (parse_getattr, bytes.fromhex("01000000 00000000 0900000000000000"), GetattrRequest(1, 0, 9)),
    "forget": (lambda data: parse_forget(data, 5), bytes.fromhex("0300000000000000"), Forget(5, 3)),
    "batch_forget": (
        parse_batch_forget,
        bytes.fromhex(
            "02000000 00000000"  # 2 of them
            "0500000000000000 0100000000000000"  # node 5, one lookup
            "0600000000000000 0300000000000000"  # node 6, three
        ),
        [Forget(5, 1), Forget(6, 3)],
    ),
    "getxattr": (
        parse_getxattr,
        bytes.fromhex("0001000000000000") + b"user.cachefs.key\0",
        GetxattrRequest(256, b"user.cachefs.key"),
    ),
    "interrupt": (parse_interrupt, bytes.fromhex("0700000000000080"), InterruptRequest(UNIQUE_RESEND | 7)),
}
ALL = pytest.mark.parametrize("what", sorted(PARSERS))


def test_header() -> None:
    header = parse_header(LOOKUP)
    assert parse_start(LOOKUP) == (header.opcode, header.unique, header.node)
    assert header == (50, 1, UNIQUE_RESEND | 7, 5, 1000, 100, 12345, 0, 0)
    assert header.unique & ~UNIQUE_RESEND == 7


@pytest.mark.parametrize("data", [HEADER[:39], b"", LOOKUP[:-1], LOOKUP + b"\0"])
def test_a_header_that_does_not_fit_its_request(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_header(data)
    with pytest.raises(RemoteProtocolError):
        parse_start(data)


@ALL
def test_body(what: str) -> None:
    parse, body, expected = PARSERS[what]
    assert parse(request(body)) == expected


@ALL
def test_more_than_we_know_follows(what: str) -> None:
    """Newer kernels append to bodies."""
    parse, body, expected = PARSERS[what]
    assert parse(request(body + b"\0newer")) == expected


@ALL
def test_every_truncation(what: str) -> None:
    """Cut anywhere, it is parsed to the same (only the unused tail was cut) or refused: never to something else."""
    parse, body, expected = PARSERS[what]
    whole = request(body)
    refused = 0
    for length in range(len(whole)):
        try:
            assert parse(whole[:length]) == expected
        except RemoteProtocolError:
            refused += 1
    assert refused > 40


@pytest.mark.parametrize("body", [b"", b"\0", b"no end"])
def test_no_name(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_name(request(body))


def test_a_name_need_not_be_text() -> None:
    assert parse_name(request(b"\xff\xfe\0")) == b"\xff\xfe"


def test_a_count_of_forgets_that_lies() -> None:
    with pytest.raises(RemoteProtocolError):
        parse_batch_forget(request(struct.pack("<II", 2**32 - 1, 0) + bytes(160)))


@given(st.binary(max_size=200))
@example(b"")
@example(struct.pack("<II", 2**31, 0).rjust(48, b"\1"))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    for parse in (parse_header, parse_start, parse_init, *(parser for parser, _, _ in PARSERS.values())):
        try:
            parse(data)
        except RemoteProtocolError:
            pass


def test_every_parser_has_its_golden_bytes() -> None:
    parsers = {name.removeprefix("parse_") for name in fusewire.__all__ if name.startswith("parse_")}
    assert parsers == {*PARSERS, "header", "start", "init"}


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A legal request with bytes flipped, cut out, put in, or said twice."""
    data = bytearray(request(draw(st.sampled_from([body for _, body, _ in PARSERS.values()]))))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, len(data)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if at < len(data):
                data[at] ^= draw(st.integers(1, 255))
            case "cut":
                del data[at:end]
            case "insert":
                data[at:at] = draw(st.binary(max_size=40))
            case "repeat":
                data[at:at] = data[at:end]
    return bytes(data)


@given(damaged())
def test_damage_is_a_protocol_error_or_a_request(data: bytes) -> None:
    for parse in (parse_header, parse_init, *(parser for parser, _, _ in PARSERS.values())):
        try:
            parsed = parse(data)
        except RemoteProtocolError:
            continue
        if isinstance(parsed, list):
            assert len(parsed) * 16 <= len(data)
