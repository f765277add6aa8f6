"""Origin leases on the side of the worker: each that was granted is given back once."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from cachefs.model import Attr, BlockId, ContentKey, Geometry, Ino, Kind, ObjectInfo, TransportError
from cachefs.net import Answer
from cachefs.wire.cluster import AskBlocks, BlockPlace, BlockPlaces, Member
from cachefs.worker.counters import Counters
from cachefs.worker.members import Members
from cachefs.worker.places import Places
from cachefs.worker.sources import Source
from cachefs.worker.supply import Supply

pytestmark = pytest.mark.anyio

BLOCKS = [BlockId(ContentKey(number.to_bytes(16, "big")), 0) for number in range(1500)]


class Master:
    """Says `answers` in turn, for every block that is asked for; then that it is away."""

    def __init__(self, *answers: BlockPlace) -> None:
        self._answers = list(answers)
        self.may_answer = trio.Event()
        self.may_answer.set()

    async def call_now(self, request: Any) -> Any:
        assert isinstance(request, AskBlocks)
        await self.may_answer.wait()
        if not self._answers:
            raise TransportError("away")
        return Answer(BlockPlaces([self._answers.pop(0)] * len(request.blocks)))


class NoPeers:
    def is_usable(self, name: str) -> bool:
        return False


def scene(*answers: BlockPlace) -> tuple[Places, Supply]:
    members = Members("me", {})
    members.learn([Member("other", "h:1", {}, 1, 1, "active")])
    places = Places(Master(*answers), members, Counters())  # type: ignore[arg-type]
    slots = trio.CapacityLimiter(1)
    return places, Supply(Geometry(), members, places, NoPeers(), None, slots)  # type: ignore[arg-type]


MINE = BlockPlace([], "me")
GONE = BlockPlace(["other"], "")
ATTR = Attr(Ino(7), Kind.FILE, 1000, 5, 0o644, 0, 0, BLOCKS[0].key)
SOURCE = Source(ATTR, ObjectInfo("f", Kind.FILE, 1000, 5, "tag"), None)  # type: ignore[arg-type]


async def test_pages_that_ask_at_once_because_a_worker_died_keep_one_lease() -> None:
    # The holder of all pages is gone: each page asks again, and each is granted the same lease.
    places, supply = scene(GONE, *[MINE] * 6)
    (route,) = await supply.routes([(BLOCKS[0], SOURCE, 0)])
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(supply._whom_to_ask, route)
    assert places.fetching() == [BLOCKS[0]] and route.has_lease
    supply.end(route)
    supply.end(route)
    assert places.fetching() == [] and places.take_released() == [BLOCKS[0]]


async def test_a_page_that_asks_when_its_block_was_given_up_keeps_no_lease() -> None:
    places, supply = scene(GONE, MINE)
    (route,) = await supply.routes([(BLOCKS[0], SOURCE, 0)])
    go = places._link.may_answer = trio.Event()  # type: ignore[attr-defined]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supply._whom_to_ask, route)
        await trio.testing.wait_all_tasks_blocked()
        supply.end(route)
        go.set()
    assert places.fetching() == [] and not route.has_lease and places.take_released() == [BLOCKS[0]]


async def test_a_lease_that_was_asked_about_only_is_not_taken() -> None:
    places, _ = scene(MINE, MINE)
    assert await places.ask(BLOCKS[:1], lease=True) == [MINE]
    assert await places.ask(BLOCKS[:1], lease=False) == [MINE]
    places.end(BLOCKS[0])
    assert places.fetching() == []


async def test_of_an_answer_that_breaks_off_nothing_is_kept() -> None:
    places, _ = scene(MINE)
    assert await places.ask(BLOCKS, lease=True) is None
    assert places.fetching() == []
