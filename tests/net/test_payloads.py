"""Memory for answers: bounded for all connections together, and never all of it for those who do not read."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from cachefs.net.payloads import Payloads

FIRST, SECOND, THIRD = 1, 2, 3


async def test_one_connection_takes_no_more_than_all_there_is() -> None:
    payloads = Payloads(100)
    done = [await payloads.take(FIRST, 50), await payloads.take(FIRST, 50)]
    with trio.move_on_after(0.01) as scope:
        await payloads.take(FIRST, 1)
    assert scope.cancelled_caught and payloads.total_bytes == 100
    done.pop().give_back()
    (await payloads.take(FIRST, 1)).give_back()
    done.pop().give_back()
    assert payloads.total_bytes == 0


async def test_whoever_has_none_gets_one_though_others_do_not_read() -> None:
    payloads = Payloads(100)
    held = await payloads.take(FIRST, 1000)
    other = await payloads.take(SECOND, 60)
    got = list[str]()

    async def take(name: str, session: int) -> None:
        sent = await payloads.take(session, 40)
        got.append(name)
        sent.give_back()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "second of the second", SECOND)
        await wait_all_tasks_blocked()
        nursery.start_soon(take, "third", THIRD)
        await wait_all_tasks_blocked()
        assert got == ["third"]
        other.give_back()  # the first is still where it was: one at a time
        await wait_all_tasks_blocked()
        assert got == ["third", "second of the second"]
    held.give_back()
    assert payloads.total_bytes == 0


async def test_whoever_is_cancelled_has_none_and_is_not_waited_for() -> None:
    payloads = Payloads(100)
    held = await payloads.take(FIRST, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(payloads.take, FIRST, 100)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    held.give_back()
    assert payloads.total_bytes == 0
    held = await payloads.take(FIRST, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(payloads.take, FIRST, 100)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        held.give_back()  # handed over before the other one hears that it is cancelled
    assert payloads.total_bytes == 0
    (await payloads.take(FIRST, 100)).give_back()


async def test_half_of_it_may_be_waited_for_of_one_store() -> None:
    payloads = Payloads(100)
    rooms = [await payloads.take(FIRST, 25, "silent") for _ in range(2)]
    got = list[str]()

    async def take(name: str, store: str) -> None:
        rooms.append(await payloads.take(FIRST, 25, store))
        got.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "more of the silent one", "silent")
        await wait_all_tasks_blocked()
        assert got == []
        for name in ("one of the other", "two of the other"):
            nursery.start_soon(take, name, "other")
            await wait_all_tasks_blocked()
        assert got == ["one of the other", "two of the other"] and payloads.total_bytes == 100
        rooms[0].made()
        await wait_all_tasks_blocked()
        assert len(got) == 2  # what has come takes its room until it is sent
        rooms.pop(2).give_back()
        await wait_all_tasks_blocked()
        assert got[2:] == ["more of the silent one"]
    for room in rooms:
        room.give_back()
    assert payloads.total_bytes == 0


async def test_a_connection_gets_one_answer_of_a_store_though_others_are_silent() -> None:
    payloads = Payloads(100)
    rooms = [await payloads.take(FIRST, 50, store) for store in ("silent", "hanging", "well")]
    with trio.move_on_after(0.01) as scope:
        await payloads.take(FIRST, 50, "well")
    assert scope.cancelled_caught and payloads.total_bytes == 150
    for room in rooms:
        room.give_back()
    assert payloads.total_bytes == 0


async def test_whoever_is_cancelled_waits_for_no_store() -> None:
    payloads = Payloads(100)
    held = await payloads.take(FIRST, 100, "silent")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(payloads.take, FIRST, 50, "silent")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        held.give_back()  # handed over before the other one hears that it is cancelled
    with trio.fail_after(60):
        rooms = [await payloads.take(FIRST, 25, "silent") for _ in range(2)]
    for room in rooms:
        room.give_back()
    assert payloads.total_bytes == 0
