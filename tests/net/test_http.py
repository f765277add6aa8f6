"""The HTTP server that monitoring asks: right answers, and everything that is no proper question."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from cachefs.model import ConfigError
from cachefs.net import TcpAddress, http, serving_http

LOOPBACK = TcpAddress("127.0.0.1", 0)


async def page(path: str) -> tuple[int, str, bytes] | None:
    if path == "/bug":
        raise RuntimeError("a bug")
    return (200, "text/plain", b"hello " * 1000) if path == "/page" else None


@asynccontextmanager
async def server(timeout_s: float = 10.0) -> AsyncIterator[TcpAddress]:
    with trio.fail_after(60):
        async with serving_http(LOOPBACK, page, timeout_s=timeout_s) as address:
            yield address


async def ask(address: TcpAddress, data: bytes) -> tuple[int, bytes, bytes]:
    """(status, headers, body) of what comes until the server closes."""
    stream = await trio.open_tcp_stream(*address)
    async with stream:
        await stream.send_all(data)
        answer = b"".join([part async for part in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    line, _, headers = head.partition(b"\r\n")
    return int(line.split()[1]), headers, body


async def is_closed(stream: trio.SocketStream) -> bool:
    try:
        return await stream.receive_some() == b""
    except trio.BrokenResourceError:
        return True


def request(path: str, method: str = "GET", headers: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()


async def test_pages_are_answered() -> None:
    async with server() as address:
        status, headers, body = await ask(address, request("/page?of=something"))
        assert (status, body) == (200, b"hello " * 1000)
        assert b"content-length: 6000" in headers.lower()
        assert (await ask(address, b"GET /page HTTP/1.0\r\n\r\n"))[0] == 200


async def test_head_has_no_body() -> None:
    async with server() as address:
        status, headers, body = await ask(address, request("/page", "HEAD"))
        assert (status, body) == (200, b"")
        assert b"content-length: 6000" in headers.lower()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("/other"), 404),
        (request("/page", "POST", "Content-Length: 3\r\n") + b"abc", 405),
        (request("/page", "DELETE"), 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /page HTTP/1.1\r\n\r\n", 400),
        (request("/page", headers="Content-Length: many\r\n"), 400),
        (request("/page", headers=f"X: {'x' * 100_000}\r\n"), 431),
        (request("/" + "x" * 100_000), 431),
    ],
)
async def test_what_is_no_question_gets_an_error(data: bytes, status: int) -> None:
    async with server() as address:
        assert (await ask(address, data))[0] == status
        assert (await ask(address, request("/page")))[0] == 200


@pytest.mark.expect_warnings("a page that fails is logged")
async def test_a_page_that_fails_is_an_error_of_that_request_alone() -> None:
    async with server() as address:
        assert (await ask(address, request("/bug")))[0] == 500
        assert (await ask(address, request("/page")))[0] == 200


async def test_a_slow_client_is_told_so_and_keeps_nobody_waiting() -> None:
    async with server(timeout_s=1.0) as address, await trio.open_tcp_stream(*address) as slow:
        await slow.send_all(b"GET /page HTTP/1.1\r\n")
        while (status := (await ask(address, request("/page")))[0]) == 408:
            pass  # a machine that stood still has made this one slow, too
        assert status == 200
        answer = b"".join([part async for part in slow])
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_with_too_many_connections_the_oldest_ones_go() -> None:
    async with server(timeout_s=60.0) as address, trio.open_nursery() as nursery:
        silent = [await trio.open_tcp_stream(*address) for _ in range(http.MAX_CONNECTIONS + 3)]
        for stream in silent:
            nursery.start_soon(stream.send_all, b"GET /")
        assert (await ask(address, request("/page")))[0] == 200
        for stream in silent[:4]:
            assert await is_closed(stream)
        await silent[-1].send_all(b"page HTTP/1.0\r\n\r\n")
        assert (await silent[-1].receive_some()).startswith(b"HTTP/1.1 200 ")
        for stream in silent:
            await stream.aclose()


async def test_an_address_that_is_taken_is_named_by_its_flag() -> None:
    async with server() as address:
        with pytest.raises(ConfigError, match="--http"):
            async with serving_http(address, page):
                pass
