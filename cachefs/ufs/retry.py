"""Trying again what may help: one policy for all under-stores, and the only place that repeats their requests."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import tenacity
import trio

from cachefs.model import ThrottledError, UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_limit_s: ContextVar[float] = ContextVar("limit_s", default=math.inf)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Requests of the block's own task are given up after so long, whatever deadline and timeouts their store has."""
    token = _limit_s.set(seconds)
    try:
        yield
    finally:
        _limit_s.reset(token)


async def retrying(what: str, attempt: Callable[[], Awaitable[T]], deadline_s: float) -> T:
    """The result of `attempt`, tried again after growing random pauses while it is throttled or the store unavailable.

    Raises the last ThrottledError or UnavailableError when no further attempt fits into `deadline_s` seconds, and every
    other error at once. `what` is for the log. Within `at_most`, also an attempt under way is given up.
    """
    limit_s = _limit_s.get()
    trouble = "nothing came at all"

    def log(state: tenacity.RetryCallState) -> None:
        nonlocal trouble
        error = state.outcome.exception() if state.outcome is not None else None
        trouble = str(error)
        logger.info("trying again what=%s attempt=%d error=%s", what, state.attempt_number, error)

    with trio.move_on_after(limit_s):
        async for one in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((ThrottledError, UnavailableError)),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
            stop=tenacity.stop_before_delay(min(deadline_s, limit_s)),
            before_sleep=log,
            reraise=True,
        ):
            with one:
                return await attempt()
    raise UnavailableError(f"{what}: no answer within {limit_s:g} s ({trouble})")
