"""A channel that sends a file."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.model import MiB, TransportError
from cachefs.net.channel import Channel, FileSlice
from cachefs.wire import Connection

SIZE = 32 * MiB


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(os.urandom(MiB) * (SIZE // MiB))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def connected() -> tuple[Channel, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    return Channel(ours, Connection(asking=False)), theirs


async def test_a_slow_reader_gets_every_byte(file: int) -> None:
    channel, theirs = connected()
    received = bytearray()

    def read() -> None:
        # Longer than a thread waits for room.
        with theirs:
            while len(received) < SIZE - 10 and (data := theirs.recv(3 * MiB)):
                received.extend(data)
                pause()

    def pause() -> None:
        if len(received) < 4 * MiB:
            trio.from_thread.run(trio.sleep, 0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, read)
        await channel.send(b"", FileSlice(file, 10, SIZE - 10))
    channel.close()
    assert received == os.pread(file, SIZE - 10, 10)


async def test_closing_ends_what_nobody_reads(file: int) -> None:
    channel, theirs = connected()
    with theirs:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(TransportError):
                    await channel.send(b"", FileSlice(file, 0, SIZE))

            nursery.start_soon(send)
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(theirs)
                channel.close()
        # What was under way still comes, and then the end.
        received = 0
        while data := theirs.recv(MiB):
            received += len(data)
        assert 0 < received < SIZE


async def test_a_file_that_is_too_short_ends_the_connection(file: int) -> None:
    channel, theirs = connected()
    with theirs, pytest.raises(TransportError, match="shorter"):
        await channel.send(b"", FileSlice(file, SIZE - 10, 20))
    assert channel.closed


async def test_a_file_is_sent_when_everybody_else_waits_for_threads(file: int) -> None:
    channel, theirs = connected()
    limiter = trio.to_thread.current_default_thread_limiter()
    others = [object() for _ in range(int(limiter.total_tokens))]
    for each in others:
        limiter.acquire_on_behalf_of_nowait(each)
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send, b"", FileSlice(file, 10, 1000))
            try:
                with trio.fail_after(60):
                    await trio.lowlevel.wait_readable(theirs)
            finally:
                for each in others:
                    limiter.release_on_behalf_of(each)
        assert theirs.recv(2000) == os.pread(file, 1000, 10)
    channel.close()
