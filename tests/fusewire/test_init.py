"""INIT: what is offered, wanted and agreed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.fusewire import (
    InitFlag,
    InitOptions,
    InitRequest,
    Negotiated,
    init_reply,
    major_reply,
    negotiate,
    parse_init,
)
from cachefs.model import ConfigError, RemoteProtocolError

EVERYTHING = InitFlag((1 << 43) - 1)


def request(body: bytes) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body


def test_parse() -> None:
    body = bytes.fromhex(
        "07000000 2d000000"  # 7.45
        "00000200"  # read-ahead of 128 KiB
        "01000040"  # ASYNC_READ, INIT_EXT
        "a0000000"  # flags2: PASSTHROUGH, HAS_RESEND
    ) + bytes(44)
    init = parse_init(request(body))
    assert init[:3] == (7, 45, 128 << 10)
    assert init.flags == (InitFlag.ASYNC_READ | InitFlag.INIT_EXT | InitFlag.PASSTHROUGH | InitFlag.HAS_RESEND)


def test_parse_before_flags2() -> None:
    """Kernels before 5.17 send 16 bytes; those between may send more without meaning it."""
    body = struct.pack("<IIII", 7, 31, 1 << 17, 1)
    assert parse_init(request(body)).flags == InitFlag.ASYNC_READ
    assert parse_init(request(body + b"\xff" * 48)).flags == InitFlag.ASYNC_READ


@pytest.mark.parametrize("length", [0, 15, 16, 19])
def test_parse_too_short(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_init(request(struct.pack("<IIIII", 7, 45, 0, 1 << 30, 0)[:length]))


def test_reply() -> None:
    agreed = Negotiated(
        minor=40,
        flags=int(InitFlag.ASYNC_READ | InitFlag.MAX_PAGES | InitFlag.INIT_EXT | InitFlag.PASSTHROUGH),
        max_readahead=4 << 20,
        max_background=64,
        max_write=4096,
        max_pages=256,
        max_stack_depth=1,
    )
    assert init_reply(2, agreed) == bytes.fromhex(
        "50000000 00000000 0200000000000000"
        "07000000 28000000"  # 7.40
        "00004000"  # read-ahead of 4 MiB
        "01004040"  # ASYNC_READ, MAX_PAGES, INIT_EXT
        "4000 3000"  # 64 in the background, congested at 48
        "00100000"  # WRITEs of 4 KiB
        "01000000"  # times to the nanosecond
        "0001"  # 256 pages
        "0000"
        "20000000"  # flags2: PASSTHROUGH
        "01000000"  # stack depth
    ) + bytes(24)


def test_major_reply() -> None:
    assert major_reply(2) == bytes.fromhex("18000000 00000000 0200000000000000 07000000 28000000")


@given(
    offered=st.integers(0, 2**43 - 1),
    minor=st.integers(23, 60),
    readdirplus=st.booleans(),
    passthrough=st.booleans(),
    depth=st.integers(1, 2),
    readahead=st.integers(0, 2**32 - 1),
)
def test_nothing_that_was_not_offered(
    offered: int, minor: int, readdirplus: bool, passthrough: bool, depth: int, readahead: int
) -> None:
    options = InitOptions(readdirplus=readdirplus, passthrough=passthrough, max_stack_depth=depth)
    agreed = negotiate(InitRequest(7, minor, readahead, InitFlag(offered)), options)
    assert agreed.flags & ~offered == 0
    assert agreed.passthrough == (passthrough and bool(offered & InitFlag.PASSTHROUGH))
    assert agreed.max_stack_depth == (depth if agreed.passthrough else 0)
    assert agreed.readdirplus == (readdirplus and bool(offered & InitFlag.DO_READDIRPLUS))
    assert agreed.max_readahead <= readahead
    assert agreed.minor <= minor
    assert Negotiated.load(agreed.save()) == agreed
    assert len(init_reply(2, agreed)) == 80


def test_what_we_want_of_a_kernel_that_has_it_all() -> None:
    agreed = negotiate(InitRequest(7, 45, 1 << 20, EVERYTHING), InitOptions())
    flag = InitFlag
    assert InitFlag(agreed.flags) == (
        flag.ASYNC_READ
        | flag.BIG_WRITES
        | flag.PARALLEL_DIROPS
        | flag.DO_READDIRPLUS
        | flag.READDIRPLUS_AUTO
        | flag.MAX_PAGES
        | flag.NO_OPENDIR_SUPPORT
        | flag.INIT_EXT
        | flag.PASSTHROUGH
        | flag.NO_EXPORT_SUPPORT
        | flag.HAS_RESEND
    )
    assert agreed.resend
    assert not agreed.no_open
    assert agreed.max_read == 1 << 20
    assert agreed.buffer_size == 8192


def test_no_open() -> None:
    options = InitOptions(passthrough=False, no_open=True)
    assert negotiate(InitRequest(7, 45, 0, EVERYTHING), options).no_open
    assert not negotiate(InitRequest(7, 45, 0, InitFlag(0)), options).no_open


def test_without_max_pages_the_kernel_reads_128_kib() -> None:
    assert negotiate(InitRequest(7, 27, 1 << 20, InitFlag(1)), InitOptions()).max_read == 128 << 10


@pytest.mark.parametrize(("major", "minor"), [(6, 99), (7, 22), (8, 1)])
def test_too_old(major: int, minor: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{major}.{minor}"):
        negotiate(InitRequest(major, minor, 0, EVERYTHING), InitOptions())


@pytest.mark.parametrize(
    "values",
    [
        {"max_readahead": -1},
        {"max_background": 0},
        {"max_write": 100},
        {"max_pages": 1 << 16},
        {"max_stack_depth": 3},
        {"no_open": True},
    ],
)
def test_options_out_of_range(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        InitOptions(**values)  # type: ignore[arg-type]
