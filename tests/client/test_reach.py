"""A master that is away, as a client sees it: what is waited for, for how long, and what is told."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.client import DirReader
from cachefs.client.reach import MasterReach
from cachefs.model import NO_INO, ROOT_INO, Entry, Ino, NotFoundError, TransportError
from cachefs.net import open_background
from tests.client.test_metadata import scene

PATIENCE_S = 5.0
NOTICED_S = 3.6
"""A second until an answer is slow, two for the question whether it is there, and the steps in between."""
TOLD = pytest.mark.expect_warnings("the outage is told")


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Time goes as fast as nobody has anything to do."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class Master:
    """Answers while `is_there`; else it hangs, or is known to be gone."""

    def __init__(self) -> None:
        self.is_there = trio.Event()
        self.is_there.set()
        self.is_gone = False
        self.asked = 0

    async def answer(self) -> str:
        self.asked += 1
        if self.is_gone:
            raise TransportError("cannot connect")
        await self.is_there.wait()
        return "answer"

    def hang(self) -> None:
        self.is_there = trio.Event()


@asynccontextmanager
async def reach_of(master: Master) -> AsyncIterator[MasterReach]:
    async with trio.open_nursery() as nursery:
        reach = MasterReach(master.answer, PATIENCE_S)
        nursery.start_soon(reach.follow)
        yield reach
        nursery.cancel_scope.cancel()


@TOLD
def test_what_hangs_is_given_up_after_patience_and_at_once_where_something_is_remembered() -> None:
    async def main() -> None:
        master = Master()
        async with reach_of(master) as reach:
            assert await reach.ask(master.answer, PATIENCE_S) == "answer"
            master.hang()
            for patience_s in (0.0, PATIENCE_S, 0.0, PATIENCE_S):
                began = trio.current_time()
                is_known = reach.is_away
                with pytest.raises(TransportError, match="the master does not answer, for"):
                    await reach.ask(master.answer, patience_s)
                took = trio.current_time() - began
                assert patience_s <= took <= patience_s + (0 if is_known else NOTICED_S)
            assert reach.outages == 1

    run(main)


def test_one_that_looks_at_a_slow_store_is_waited_for() -> None:
    async def main() -> None:
        master = Master()

        async def slow() -> str:
            await trio.sleep(100)
            return "at last"

        async with reach_of(master) as reach:
            assert await reach.ask(slow, 0.0) == "at last"
            assert reach.outages == 0
            # While it lasted, it was asked now and then whether it is there, and not all the time.
            assert master.asked <= 110

    run(main)


def test_a_connection_that_is_lost_is_no_outage() -> None:
    """What is remembered is not served past its time by a master that is there."""

    async def main() -> None:
        master = Master()
        failures = ["lost", "lost again"]

        async def lost() -> str:
            if failures:
                raise TransportError(failures.pop())
            return "the answer"

        async with reach_of(master) as reach:
            assert await reach.ask(lost, 0.0) == "the answer"
            assert reach.outages == 0 and not reach.is_away and master.asked

    run(main)


def test_what_was_served_past_its_time_just_when_it_was_back_is_doubted_too() -> None:
    async def main() -> None:
        master = Master()
        async with reach_of(master) as reach:
            backs = list[int]()
            reach.on_back = lambda: backs.append(reach.served_stale)
            reach.count_stale()
            for _ in range(2):
                await reach.ask(master.answer, 0.0)
                assert backs == [1]

    run(main)


@TOLD
def test_who_began_to_wait_before_it_was_back_gets_an_answer() -> None:
    async def main() -> None:
        master = Master()
        async with reach_of(master) as reach, trio.open_nursery() as nursery:
            master.hang()
            found = []

            async def ask() -> None:
                found.append(await reach.ask(master.answer, 60.0))

            nursery.start_soon(ask)
            await trio.sleep(30)
            assert reach.is_away and reach.away_s > 20
            master.is_there.set()
            nursery.start_soon(trio.sleep, 100)
            await trio.sleep(2)
            assert found == ["answer"] and not reach.is_away and reach.away_s == 0.0

    run(main)


@TOLD
def test_an_outage_is_two_lines_and_a_restart_is_none(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        caplog.set_level(logging.INFO, "cachefs.client.reach")
        master = Master()
        backs = []
        async with reach_of(master) as reach:
            reach.on_back = lambda: backs.append(trio.current_time())

            async def fail_for(seconds: float) -> None:
                master.is_gone = True
                reach.doubt()
                await trio.sleep(seconds)
                master.is_gone = False
                reach.doubt()
                await trio.sleep(1)
                assert not reach.is_away

            await fail_for(0.4)
            assert caplog.messages == []
            reach.count_stale()  # just before it is known to be away
            master.is_gone = True
            reach.doubt()
            await trio.sleep(1)
            reach.count_stale()
            await fail_for(100)
            told = [message.partition(",")[0].partition(" away_s")[0] for message in caplog.messages]
            assert told == ["the master is away", "the master is back"]
            assert "error=cannot connect" in caplog.messages[0] and "served_stale=2" in caplog.messages[1]
            assert len(backs) == 1 and reach.served_stale == 2 and reach.outages == 2

    run(main)


def test_a_refusal_is_an_answer() -> None:
    async def main() -> None:
        async def refuse() -> str:
            raise NotFoundError("no such thing")

        async with trio.open_nursery() as nursery:
            reach = MasterReach(refuse, PATIENCE_S)
            nursery.start_soon(reach.follow)
            with pytest.raises(NotFoundError):
                await reach.ask(refuse, PATIENCE_S)
            await trio.sleep(60)
            assert reach.outages == 0
            nursery.cancel_scope.cancel()

    run(main)


# ---- with a real master ----------------------------------------------------------------------------------------------


async def listed(reader: DirReader) -> list[Entry]:
    entries: list[Entry] = []
    after = NO_INO
    while found := await reader.read(after, 700):
        entries += found
        after = found[-1].attr.ino
    return entries


async def until_away(reach: MasterReach, away: bool = True) -> None:
    with trio.fail_after(60):
        while reach.is_away is not away:
            await trio.sleep(0.01)


@pytest.mark.expect_warnings("the outage may be told")
async def test_a_directory_that_was_listed_is_listed_again_without_the_master(tmp_path: Path) -> None:
    async with (
        scene(tmp_path, files=1500, sync_interval_s=0, patience_s=0.3) as (cluster, client, data),
        open_background() as nursery,
    ):
        metadata = client.metadata

        def reader(ino: Ino = ROOT_INO) -> DirReader:
            return DirReader(metadata, ino, nursery)

        before = await listed(reader())
        assert len(before) == 1501
        inner = next(entry.attr.ino for entry in before if entry.name == "dir")
        half = reader()
        first = await half.read(NO_INO, 500)
        await cluster.stop("master")
        await until_away(client.reach)
        stale = client.reach.served_stale
        assert await listed(reader()) == before
        assert client.reach.served_stale > stale
        # From any position, and by whoever was in the middle of it.
        again = reader()
        assert await again.read(before[999].attr.ino, 3) == before[1000:1003]
        rest = [entry.attr.ino for entry in await half.read(first[-1].attr.ino, 5)]
        assert rest == [entry.attr.ino for entry in before[500:505]]
        # What was never listed to its end is not known to be complete.
        with pytest.raises(TransportError), trio.fail_after(20):
            await listed(reader(inner))
        # Nor is one of which a name was forgotten.
        metadata._remembered.forget_name(ROOT_INO, "00007")
        metadata.distrust()
        with pytest.raises(TransportError), trio.fail_after(20):
            await listed(reader())
        (data / "new").write_bytes(b"new")
        await cluster.start_master()
        await until_away(client.reach, away=False)
        assert len(await listed(reader())) == 1502


@pytest.mark.expect_warnings("the outage may be told")
async def test_what_was_served_past_its_time_is_asked_for_anew(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0, patience_s=0.3) as (cluster, client, data):
        told: list[None] = []
        attr = await client.metadata.lookup(ROOT_INO, "00001")
        assert attr is not None and await client.metadata.lookup(ROOT_INO, "absent") is None
        await cluster.stop("master")
        await until_away(client.reach)
        client.on_everything = lambda: told.append(None)
        assert await client.metadata.lookup(ROOT_INO, "00001") == attr
        assert await client.metadata.lookup(ROOT_INO, "absent") is None
        assert client.reach.served_stale == 2
        (data / "absent").write_bytes(b"not any more")
        await cluster.start_master()
        await until_away(client.reach, away=False)
        assert told
        found = await client.metadata.lookup(ROOT_INO, "absent")
        assert found is not None and found.size_bytes == len(b"not any more")
