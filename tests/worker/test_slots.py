"""Slots: so many at once, and no more memory than was allowed, whatever the size of pages."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.worker.slots import ABOVE, Slots


async def hold(slots: Slots, length: int, log: list[int], go: trio.Event, store: str = "") -> None:
    async with slots.one(length, store):
        log.append(length)
        await go.wait()


async def test_the_number_and_the_bytes_are_bounds() -> None:
    slots, log, go = Slots(3, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for length in (60, 50, 10, 1):
            nursery.start_soon(hold, slots, length, log, go)
            await wait_all_tasks_blocked()
        # 50 does not fit, the others wait behind it.
        assert log == [60] and slots.held_bytes == 60 and (slots.total, slots.taken, slots.waiting) == (3, 1, 3)
        go.set()
    assert sorted(log) == [1, 10, 50, 60] and slots.held_bytes == slots.taken == slots.waiting == 0


async def test_no_more_than_the_number() -> None:
    slots, log, go = Slots(2, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for length in (1, 2, 3):
            nursery.start_soon(hold, slots, length, log, go)
            await wait_all_tasks_blocked()
        assert log == [1, 2] and (slots.taken, slots.waiting) == (2, 1)
        go.set()
    assert log == [1, 2, 3]


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


async def test_a_store_that_has_none_does_not_wait_for_those_that_do_not_answer() -> None:
    slots, log, silent, go = Slots(4, 400), list[int](), trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(hold, slots, 50, log, silent, "silent")
            await wait_all_tasks_blocked()
        assert slots.taken == 4
        for number in range(ABOVE + 1):
            nursery.start_soon(hold, slots, 10 + number, log, go, f"well {number}")
            await wait_all_tasks_blocked()
        # One each, and so many of them.
        assert log[4:] == [10 + number for number in range(ABOVE)] and slots.waiting == 5
        go.set()
        await wait_all_tasks_blocked()
        assert log[-1] == 10 + ABOVE and (slots.taken, slots.waiting) == (4, 4)
        silent.set()
    assert slots.held_bytes == slots.taken == slots.waiting == 0


async def test_a_free_slot_goes_to_the_store_that_has_the_fewest() -> None:
    slots, order = Slots(2, 100), list[str]()
    go = [trio.Event() for _ in range(3)]

    async def read(store: str, until: trio.Event) -> None:
        async with slots.one(1, store):
            order.append(store)
            await until.wait()

    async with trio.open_nursery() as nursery:
        for until in go[:2]:
            nursery.start_soon(read, "much read", until)
            await wait_all_tasks_blocked()
        for _ in range(2):
            nursery.start_soon(read, "much read", go[2])
        nursery.start_soon(read, "other", go[2])
        await wait_all_tasks_blocked()
        nursery.start_soon(read, "other", go[2])
        await wait_all_tasks_blocked()
        assert order == ["much read", "much read", "other"]
        go[0].set()  # what is above the bounds is not handed on
        await wait_all_tasks_blocked()
        assert len(order) == 3
        go[1].set()
        await wait_all_tasks_blocked()
        assert order[3:] == ["much read"]
        go[2].set()
    assert sorted(order) == ["much read"] * 4 + ["other"] * 2 and slots.taken == 0


async def test_memory_above_the_bounds_is_a_quarter_or_one_page() -> None:
    slots, log, go = Slots(4, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for number, length in enumerate((100, 20, 10, 300)):
            nursery.start_soon(hold, slots, length, log, go, f"{number}")
            await wait_all_tasks_blocked()
        assert log == [100, 20] and slots.held_bytes == 120
        go.set()
    slots, log, go = Slots(4, 100), list[int](), trio.Event()
    async with trio.open_nursery() as nursery:
        for number, length in enumerate((100, 300, 1)):
            nursery.start_soon(hold, slots, length, log, go, f"{number}")
            await wait_all_tasks_blocked()
        assert log == [100, 300]
        go.set()
    assert slots.held_bytes == 0
