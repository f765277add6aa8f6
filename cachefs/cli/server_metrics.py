"""What the mount servers of a node count, asked for by the mount service, which answers for all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import trio

from cachefs.metrics import Labelled
from cachefs.model import LogLimiter

logger = logging.getLogger(__name__)

LISTEN = "127.0.0.1:0"
"""`--http` of each server: nobody else asks it, and a port that is chosen is always free."""
ANSWER_S = 1.5
"""One that hangs is left out; who asks for the metrics waits no longer than Prometheus does by default (10 s)."""
_MOST_BYTES = 4 * 1024 * 1024
_log = LogLimiter(logger)


async def ask_servers(servers: Iterable[tuple[Mapping[str, str], str]]) -> list[Labelled]:
    """`servers`: (labels, HOST:PORT that it serves /metrics at) of each. Those that do not answer are left out."""
    found: list[tuple[int, Labelled]] = []

    async def ask(number: int, labels: Mapping[str, str], address: str) -> None:
        text = await _text_of(address)
        if text is not None:
            found.append((number, (labels, text)))

    async with trio.open_nursery() as nursery:
        for number, (labels, address) in enumerate(servers):
            nursery.start_soon(ask, number, labels, address)
    return [each for _, each in sorted(found, key=lambda each: each[0])]


async def _text_of(address: str) -> bytes | None:
    host, _, port = address.rpartition(":")
    received = bytearray()
    try:
        with trio.fail_after(ANSWER_S):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(f"GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
                async for data in stream:
                    received += data
                    if len(received) > _MOST_BYTES:
                        raise OSError(f"more than {_MOST_BYTES} bytes")
    except (OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
        why = str(error) or f"no answer within {ANSWER_S:g} s"
        _log.log(logging.INFO, "no answer", "metrics of a mount server are missing address=%s error=%s", address, why)
        return None
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return body if head.split(b" ", 2)[1:2] == [b"200"] else None
