"""Slots: so many at once, and no more memory than was allowed, whatever the size of pages."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.worker.slots import Slots


async def hold(slots: Slots, length: int, log: list[int], go: trio.Event) -> None:
    async with slots.one(length):
        log.append(length)
        await go.wait()


async def test_the_number_and_the_bytes_are_bounds() -> None:
    slots, log, go = Slots(3, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for length in (60, 50, 10, 1):
            nursery.start_soon(hold, slots, length, log, go)
            await wait_all_tasks_blocked()
        # 50 does not fit, 10 waits behind it, and 1 has no slot.
        assert log == [60] and slots.held_bytes == 60 and (slots.total, slots.taken, slots.waiting) == (3, 3, 3)
        go.set()
    assert sorted(log) == [1, 10, 50, 60] and slots.held_bytes == slots.taken == slots.waiting == 0


async def test_what_is_larger_than_all_there_is_comes_alone() -> None:
    slots, log, go = Slots(3, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for length in (500, 1):
            nursery.start_soon(hold, slots, length, log, go)
            await wait_all_tasks_blocked()
        assert log == [500]
        go.set()
    assert log == [500, 1]


async def test_whoever_is_cancelled_holds_nothing_and_lets_the_next_one_in() -> None:
    slots, log, first, go = Slots(4, 100), list[int](), trio.Event(), trio.Event()
    go.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, slots, 60, log, first)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as waiting:
                waiting.start_soon(hold, slots, 90, log, go)
                await wait_all_tasks_blocked()
                nursery.start_soon(hold, slots, 40, log, go)
                await wait_all_tasks_blocked()
                assert log == [60]
                scope.cancel()
        await wait_all_tasks_blocked()
        assert log == [60, 40]
        first.set()
    assert slots.held_bytes == 0


async def test_memory_that_was_handed_to_somebody_cancelled_is_given_back() -> None:
    slots, log, first = Slots(4, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, slots, 100, log, first)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, slots, 100, log, trio.Event())
        await wait_all_tasks_blocked()
        first.set()
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert slots.held_bytes == slots.taken == slots.waiting == 0
