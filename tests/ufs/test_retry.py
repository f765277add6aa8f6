"""How requests to a store wait, pause and come back. trio's time jumps over every sleep here."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from cachefs.model import NotFoundError, ThrottledError, UnavailableError
from cachefs.ufs.retry import FIRST_SLOW_DOWN_S, Requests, retry_after_s

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class Store:
    """Takes a second for every answer and a moment to refuse, which it does while it is told to."""

    def __init__(self) -> None:
        self.refuses = False
        self.retry_after_s = 0.0
        self.asked_at: list[float] = []
        self.most_at_once = 0
        self._at_once = 0

    async def ask(self) -> str:
        self.asked_at.append(trio.current_time())
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.refuses:
                await trio.sleep(0.01)
                error = ThrottledError("too many")
                error.retry_after_s = self.retry_after_s
                raise error
            await trio.sleep(1)
            return "answer"
        finally:
            self._at_once -= 1


async def ask_many(requests: Requests, store: Store, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(requests.run, "test", store.ask)


async def throttle_once(requests: Requests, store: Store) -> float:
    """Returns when it was."""
    store.refuses = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(requests.run, "test", store.ask)
        await trio.sleep(0.02)
        store.refuses = False
        return store.asked_at[-1]


async def test_no_more_than_allowed_are_under_way() -> None:
    store = Store()
    await ask_many(Requests(60, 5), store, 20)
    assert store.most_at_once == 5
    assert trio.current_time() == pytest.approx(4)


async def test_several_at_once_take_as_many_slots_as_there_are() -> None:
    requests, store = Requests(60, 5), Store()
    granted: list[int] = []

    async def attempt(slots: int) -> list[Exception | None]:
        granted.append(slots)
        await trio.sleep(1)
        return [None] * 8

    async with trio.open_nursery() as nursery:
        nursery.start_soon(requests.run, "test", store.ask)
        await trio.sleep(0.5)
        nursery.start_soon(requests.together, "test", 8, attempt)
        await trio.sleep(0.1)
        nursery.start_soon(requests.together, "test", 2, attempt)
    assert granted == [4, 1]
    await ask_many(requests, store, 20)
    assert store.most_at_once == 5


async def test_of_several_at_once_the_throttled_slow_all_down() -> None:
    requests, store = Requests(60, 8), Store()
    error = ThrottledError("too many")
    error.retry_after_s = 7.0

    async def attempt(slots: int) -> list[Exception | None]:
        return [None, error, error]

    assert await requests.together("test", 3, attempt) == [None, error, error]
    assert requests.slowed
    await ask_many(requests, store, 1)
    assert store.asked_at == [7.0]


async def test_a_queue_is_not_an_outage() -> None:
    """The last of them waits for fifty seconds with a deadline of two."""
    store = Store()
    await ask_many(Requests(2, 1), store, 50)
    assert len(store.asked_at) == 50


async def test_a_store_that_answers_nobody_is_unavailable_to_those_who_wait() -> None:
    requests = Requests(2, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(requests.run, "hangs", trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(UnavailableError):
            await requests.run("waits", Store().ask)
        assert trio.current_time() == pytest.approx(2)
        nursery.cancel_scope.cancel()


async def test_the_deadline_ends_the_repeats_with_the_last_error() -> None:
    requests, store = Requests(30, 8), Store()
    store.refuses = True
    with pytest.raises(ThrottledError, match="too many"):
        await requests.run("test", store.ask)
    # Pauses of 0.5, 1, 2, 4, 5, 5, 5, 5 seconds.
    assert len(store.asked_at) == 9
    assert trio.current_time() < 30


async def test_all_pause_for_as_long_as_the_store_asks() -> None:
    requests, store = Requests(60, 8), Store()
    store.retry_after_s = 7.0
    throttled_at = await throttle_once(requests, store)
    await ask_many(requests, store, 10)
    assert min(store.asked_at[1:]) >= throttled_at + 7


async def test_those_who_waited_for_a_slot_pause_too() -> None:
    requests, store = Requests(60, 1), Store()
    store.retry_after_s = 7.0
    store.refuses = True
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(requests.run, "test", store.ask)
        await trio.sleep(0.02)
        assert len(store.asked_at) == 1
        store.refuses = False
    assert store.asked_at[1] >= 7


async def test_one_burst_halves_once_and_every_further_one_again() -> None:
    requests, store = Requests(60, 16), Store()
    store.refuses = True
    with trio.move_on_after(FIRST_SLOW_DOWN_S * 0.9):
        await ask_many(requests, store, 16)
    assert len(store.asked_at) == 16
    store.refuses = False
    store.most_at_once = 0
    await ask_many(requests, store, 16)
    assert store.most_at_once in (8, 9)
    await ask_many(requests, store, 400)
    assert not requests.slowed
    assert store.most_at_once == 16


async def test_a_pause_longer_than_the_deadline_is_told_at_once() -> None:
    requests, store = Requests(5, 8), Store()
    store.refuses = True
    store.retry_after_s = 3600.0
    for _ in range(2):
        with pytest.raises(ThrottledError):
            await requests.run("test", store.ask)
        assert trio.current_time() == pytest.approx(0.01)
    assert len(store.asked_at) == 1


async def test_a_missing_file_is_an_answer_and_not_asked_again() -> None:
    calls = []

    async def missing() -> None:
        calls.append(1)
        raise NotFoundError("x")

    with pytest.raises(NotFoundError):
        await Requests(60, 1).run("test", missing)
    assert len(calls) == 1


def test_retry_after() -> None:
    assert retry_after_s("7") == 7
    assert retry_after_s("Tue, 14 Nov 2023 22:13:20 GMT") == 0
    assert retry_after_s("Tue, 14 Nov 2090 22:13:20 GMT") > 0
    assert retry_after_s("") == retry_after_s("soon") == retry_after_s("-1") == 0
