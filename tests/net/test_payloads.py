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
    done.pop()()
    (await payloads.take(FIRST, 1))()
    done.pop()()
    assert payloads.total_bytes == 0


async def test_whoever_has_none_gets_one_though_others_do_not_read() -> None:
    payloads = Payloads(100)
    held = await payloads.take(FIRST, 1000)
    other = await payloads.take(SECOND, 60)
    got = list[str]()

    async def take(name: str, session: int) -> None:
        sent = await payloads.take(session, 40)
        got.append(name)
        sent()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "second of the second", SECOND)
        await wait_all_tasks_blocked()
        nursery.start_soon(take, "third", THIRD)
        await wait_all_tasks_blocked()
        assert got == ["third"]
        other()  # the first is still where it was: one at a time
        await wait_all_tasks_blocked()
        assert got == ["third", "second of the second"]
    held()
    assert payloads.total_bytes == 0


async def test_whoever_is_cancelled_has_none_and_is_not_waited_for() -> None:
    payloads = Payloads(100)
    held = await payloads.take(FIRST, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(payloads.take, FIRST, 100)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    held()
    assert payloads.total_bytes == 0
    held = await payloads.take(FIRST, 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(payloads.take, FIRST, 100)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        held()  # handed over before the other one hears that it is cancelled
    assert payloads.total_bytes == 0
    (await payloads.take(FIRST, 100))()
