"""The limiter against a logger and a clock that the test moves."""

from __future__ import annotations

import logging

import pytest

from cachefs.model import LogLimiter

logger = logging.getLogger("tests.log_limit")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock, caplog: pytest.LogCaptureFixture) -> LogLimiter:
    caplog.set_level(logging.INFO, logger.name)
    return LogLimiter(logger, limit=3, period_s=10, clock=clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_each_kind_has_its_own_limit(limiter: LogLimiter, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        limiter.log(logging.WARNING, "a", "first %d", number)
        limiter.log(logging.WARNING, ("b", 5), "second %d", number)
    assert lines(caplog) == [
        *("first 0", "second 0", "first 1", "second 1"),
        "first 2 (more of these are counted and not shown for 10 s)",
        "second 2 (more of these are counted and not shown for 10 s)",
    ]


def test_what_was_kept_back_is_counted(limiter: LogLimiter, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        limiter.log(logging.ERROR, ("failed", "READ"), "x")
    lines(caplog)
    clock.now_s += 10
    limiter.log(logging.INFO, "another", "y")
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.INFO]
    assert lines(caplog) == ["not shown count=97 kind=failed READ seconds=10", "y"]
    limiter.log(logging.ERROR, ("failed", "READ"), "x")
    assert lines(caplog) == ["x"]


def test_what_is_rare_is_all_shown(limiter: LogLimiter, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        limiter.log(logging.WARNING, "a", "x")
        clock.now_s += 12
    assert lines(caplog) == ["x"] * 20


def test_levels_that_are_off_cost_nothing(limiter: LogLimiter, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        limiter.log(logging.DEBUG, "a", "x")
    clock.now_s += 12
    limiter.log(logging.WARNING, "b", "y")
    assert lines(caplog) == ["y"]


def test_tracebacks_are_passed_on(limiter: LogLimiter, caplog: pytest.LogCaptureFixture) -> None:
    limiter.log(logging.ERROR, "a", "x", exc_info=ValueError("bug"))
    assert caplog.records[0].exc_info is not None
