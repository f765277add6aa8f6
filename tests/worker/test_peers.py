"""Connections to other workers: one for each, and none that is of no use any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from cachefs.model import BlockId, ContentKey
from cachefs.net import Hello, Service, Session, TcpAddress, serve
from cachefs.testing.cluster import LOOPBACK
from cachefs.wire.cluster import Member
from cachefs.wire.control import BlockLength, MeasureBlock
from cachefs.worker.counters import Counters
from cachefs.worker.members import Members
from cachefs.worker.peers import Peers

pytestmark = pytest.mark.anyio

SLOW, QUICK = BlockId(ContentKey(b"s" * 16), 0), BlockId(ContentKey(b"q" * 16), 0)


class Other:
    """A worker that answers of one block at once, and of another when it may."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.asked, self.may = trio.Event(), trio.Event()
        self.address: TcpAddress = LOOPBACK

    async def measure(self, request: MeasureBlock, session: Session) -> BlockLength:
        if session not in self.sessions:
            self.sessions.append(session)
        if request.key == SLOW.key:
            self.asked.set()
            await self.may.wait()
        return BlockLength(len(self.sessions))

    @property
    def open(self) -> list[bool]:
        """Of its connections, in the order in which they were made."""
        return [not session.closed.is_set() for session in self.sessions]

    async def until_open(self, expected: list[bool]) -> None:
        with trio.fail_after(60):
            while self.open != expected:
                await trio.sleep(0.005)


class Scene:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.other = Other()
        self.namespace_id = "one"
        self.members = Members("me", {})
        self.peers = Peers(self.members, lambda: Hello("worker", "me", self.namespace_id), Counters(), nursery)

    def learn(self, *addresses: TcpAddress) -> None:
        self.members.learn([Member(f"w{n}", str(each), {}, 1, 1, "active") for n, each in enumerate(addresses)])


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    async with trio.open_nursery() as nursery:
        each = Scene(nursery)
        service = Service()
        service.on(MeasureBlock, each.other.measure)

        async def run(task_status: trio.TaskStatus[list[TcpAddress]]) -> None:
            await serve(service, [LOOPBACK], hello=Hello("worker"), task_status=task_status)  # type: ignore[arg-type]

        (each.other.address,) = await nursery.start(run)
        each.learn(each.other.address)
        yield each
        nursery.cancel_scope.cancel()


async def test_a_connection_that_was_replaced_is_closed_once_nobody_uses_it() -> None:
    async with scene() as each, trio.open_nursery() as nursery:
        found: list[int] = []

        async def measure() -> None:
            found.append(await each.peers.length(["w0"], SLOW))

        nursery.start_soon(measure)
        await each.other.asked.wait()
        # The master was given another database.
        each.namespace_id = "two"
        assert await each.peers.length(["w0"], QUICK) == 2
        assert each.other.open == [True, True] and not found
        each.other.may.set()
        await each.other.until_open([False, True])
        assert found == [2]
        # And again with nothing under way.
        each.namespace_id = "three"
        assert await each.peers.length(["w0"], QUICK) == 3
        await each.other.until_open([False, False, True])


async def test_the_connection_to_a_worker_that_left_is_closed() -> None:
    async with scene() as each:
        assert await each.peers.length(["w0"], QUICK) == 1
        each.members.learn([Member("new", str(each.other.address), {}, 1, 1, "active")])
        assert await each.peers.length(["new"], QUICK) == 2
        await each.other.until_open([False, True])
