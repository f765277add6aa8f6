"""Shares of a quota against workers that do as they must: take what was granted, and give back what they do not use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.policy import Promote, Shares, fits_quota

NAMES = ("a", "b", "c")


class Workers:
    def __init__(self, limit: int) -> None:
        self.shares = Shares(limit)
        self.used = dict.fromkeys(NAMES, 0)
        self.granted = dict.fromkeys(NAMES, 0)

    def report(self, name: str, wanted: int = 0) -> None:
        self.shares.told(name, self.used[name], self.granted[name])
        self.granted[name] = self.shares.grant(name, wanted, len(NAMES))

    def take(self, name: str, size: int) -> bool:
        lacking = self.used[name] + size - self.granted[name]
        if lacking > 0:
            self.report(name, lacking)
        if self.used[name] + size > self.granted[name]:
            return False
        self.used[name] += size
        return True

    def give_up(self, name: str, size: int) -> None:
        self.used[name] = max(0, self.used[name] - size)

    def give_back(self, name: str) -> None:
        self.granted[name] = min(self.granted[name], self.used[name])
        self.report(name)

    @property
    def total(self) -> int:
        return sum(self.used.values())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "give up", "give back"]), st.sampled_from(NAMES), st.integers(1, 40)
    ),
    max_size=60,
)


def do(workers: Workers, what: str, name: str, size: int) -> None:
    if what == "take":
        workers.take(name, size)
    elif what == "give up":
        workers.give_up(name, size)
    else:
        workers.give_back(name)


@given(st.integers(0, 300), STEPS)
def test_all_together_never_take_more_than_the_quota_and_one_alone_gets_all_of_it(
    limit: int, steps: list[tuple[str, str, int]]
) -> None:
    workers = Workers(limit)
    for step in steps:
        do(workers, *step)
        assert workers.total <= limit
        assert workers.shares.promised_bytes <= limit
    for name in NAMES:
        workers.give_back(name)
    assert workers.shares.used_bytes == workers.total
    left = limit - workers.total
    assert workers.take("b", left) or not left
    assert workers.total == limit and not workers.take("c", 1)


@given(st.integers(0, 300), STEPS, st.integers(0, 300), STEPS)
def test_a_limit_that_is_lowered_lets_nobody_take_more_until_it_is_less(
    limit: int, before: list[tuple[str, str, int]], lower: int, after: list[tuple[str, str, int]]
) -> None:
    workers = Workers(limit)
    for step in before:
        do(workers, *step)
    workers.shares.limit_bytes = lower
    for name in (*NAMES, *NAMES):
        workers.report(name)
    most = max(lower, workers.total)
    for name in NAMES:
        assert workers.granted[name] >= 0
    if workers.total > lower:
        # Each is to get below it by the part it has.
        assert sum(workers.granted.values()) <= lower
    for what, name, size in after:
        was = workers.total
        do(workers, what, name, size)
        assert workers.total <= most
        assert workers.total <= max(was, lower)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 50), st.booleans()), max_size=20))
def test_what_is_dead_takes_no_room(steps: list[tuple[str, int, bool]]) -> None:
    shares, held = Shares(1000), dict[str, int]()
    for name, size, dies in steps:
        if dies:
            shares.gone(name)
            held.pop(name, None)
        else:
            shares.told(name, size, size + 1)
            held[name] = size
        assert shares.used_bytes == sum(held.values())
        assert shares.promised_bytes == sum(size + 1 for size in held.values())


def test_what_is_idle_on_one_worker_goes_to_those_that_need_it() -> None:
    workers = Workers(1000)
    assert workers.take("a", 990) and workers.take("b", 10) and not workers.take("c", 30)

    def idle(name: str, size: int) -> int:
        workers.shares.told(name, workers.used[name], workers.used[name])
        return workers.shares.grant(name, 0, 3, size)

    assert idle("b", 0) == 10
    assert idle("a", 500) == 960, "as much as is needed"
    assert idle("a", 500) == 990, "once"
    workers.give_up("a", 30)
    workers.give_back("a")
    assert workers.take("c", 30) and workers.total == 1000
    assert not workers.take("c", 1)
    assert idle("a", 4) == 956, "no more than is idle"
    assert not workers.take("c", 1)
    assert idle("a", 500) == 950, "and a hundredth of all at least"
    assert not workers.take("c", 1)
    workers.shares.gone("c")
    assert idle("a", 500) == 960, "nobody needs it any more"


def nothing() -> tuple[int, int]:
    raise AssertionError("it is not to be looked for")


@pytest.mark.parametrize(
    ("mode", "lacking", "used", "free", "first", "fits"),
    [
        (Promote.IF_SPACE, 0, 0, nothing, True, True),
        (Promote.ALWAYS, -5, 0, nothing, True, True),
        (Promote.NEVER, -5, 9, nothing, True, False),
        (Promote.ALWAYS, 5, 5, nothing, False, True),
        (Promote.ALWAYS, 6, 5, nothing, True, False),
        (Promote.IF_SPACE, 6, 5, nothing, True, False),
        (Promote.IF_SPACE, 5, 5, lambda: (5, 0), False, True),
        (Promote.IF_SPACE, 5, 5, lambda: (2, 3), True, True),
        (Promote.IF_SPACE, 5, 5, lambda: (2, 3), False, False),
        (Promote.IF_SPACE, 5, 9, lambda: (2, 2), True, False),
    ],
)
def test_what_fits(
    mode: Promote, lacking: int, used: int, free: Callable[[], tuple[int, int]], first: bool, fits: bool
) -> None:
    assert fits_quota(mode, lacking_bytes=lacking, used_bytes=used, free_bytes=free, first_copy=first) is fits
