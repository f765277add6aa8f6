"""Whether the other side does anything at all: slow, busy, silent and stopped ones over real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.model import MiB, TransportError
from cachefs.net import (
    Address,
    Answer,
    Hello,
    Pool,
    Service,
    Session,
    UnixAddress,
    answer_ping,
    is_silent,
    open_background,
    open_pool,
    serve,
)
from cachefs.net.peer import MAX_CALLS
from cachefs.wire import Request
from cachefs.wire.messages import Ping

HELLO = Hello(role="client")


class Never(Request[str], frozen=True):
    pass


class Much(Request[str], frozen=True):
    pass


async def never(request: Never, session: Session) -> str:
    await trio.sleep_forever()
    raise AssertionError


async def much(request: Much, session: Session) -> Answer[str]:
    return Answer("", bytes(16 * MiB))


@asynccontextmanager
async def asking(service: Service, path: Path) -> AsyncIterator[Pool]:
    address: Address = UnixAddress(str(path / "s"))
    async with open_background() as nursery:
        await nursery.start(lambda task_status: serve(service, [address], hello=HELLO, task_status=task_status))
        async with open_pool(address, HELLO) as pool:
            yield pool


async def test_one_that_lets_requests_wait_is_not_silent_however_many(tmp_path: Path) -> None:
    service = Service()
    service.on(Never, never)
    service.on_at_once(Ping, answer_ping)
    async with asking(service, tmp_path) as pool, open_background() as nursery:
        for _ in range(MAX_CALLS + 10):
            nursery.start_soon(pool.call, Never())
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not await is_silent(pool, 3.0)
        assert not await is_silent(pool, 3.0)


async def test_one_that_knows_no_ping_is_not_silent(tmp_path: Path) -> None:
    service = Service()
    service.on(Never, never)
    async with asking(service, tmp_path) as pool:
        assert not await is_silent(pool, 3.0)


async def test_one_whose_answers_keep_coming_is_not_silent(tmp_path: Path) -> None:
    """Also when no ping gets through, as those are large."""
    service = Service()
    service.on(Much, much)

    async def unanswered(request: Ping, session: Session) -> str:
        await trio.sleep_forever()
        raise AssertionError

    service.on(Ping, unanswered)  # type: ignore[arg-type]
    async with asking(service, tmp_path) as pool:
        await pool.peer()
        assert await is_silent(pool, 0.5)
        async with open_background() as nursery:

            async def ask_on() -> None:
                while True:
                    await pool.call(Much())

            nursery.start_soon(ask_on)
            assert not await is_silent(pool, 3.0)


async def test_one_that_refuses_is_lost_and_not_silent(tmp_path: Path) -> None:
    async with open_pool(UnixAddress(str(tmp_path / "nobody")), HELLO) as pool:
        with pytest.raises(TransportError):
            await is_silent(pool, 3.0)


SERVER = """
import sys, trio
from functools import partial
from cachefs.net import Hello, Service, UnixAddress, answer_ping, serve
from cachefs.wire.messages import Ping

service = Service()
service.on_at_once(Ping, answer_ping)

async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, service, [UnixAddress(sys.argv[1])], hello=Hello(role="worker")))
        print("ready", flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("connected", [True, False])
async def test_one_that_is_stopped_is_silent_until_it_goes_on(tmp_path: Path, connected: bool) -> None:
    path = str(tmp_path / "s")
    with subprocess.Popen([sys.executable, "-c", SERVER, path], stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
        try:
            assert process.stdout is not None
            await trio.to_thread.run_sync(process.stdout.readline)
            async with open_pool(UnixAddress(path), HELLO) as pool:
                if connected:
                    await pool.call(Ping())
                os.kill(process.pid, signal.SIGSTOP)
                assert await is_silent(pool, 0.5)
                os.kill(process.pid, signal.SIGCONT)
                with trio.fail_after(120):
                    while await is_silent(pool, 3.0):
                        pass
        finally:
            process.kill()
