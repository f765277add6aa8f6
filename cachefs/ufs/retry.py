"""Trying again what may help: one policy for all under-stores, and the only place that repeats their requests."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from cachefs.model import ThrottledError, UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


async def retrying(what: str, attempt: Callable[[], Awaitable[T]], deadline_s: float) -> T:
    """The result of `attempt`, tried again after growing random pauses while it is throttled or the store unavailable.

    Raises the last ThrottledError or UnavailableError when no further attempt fits into `deadline_s` seconds, and every
    other error at once. `what` is for the log.
    """

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        logger.info("trying again what=%s attempt=%d error=%s", what, state.attempt_number, error)

    async for one in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((ThrottledError, UnavailableError)),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=tenacity.stop_before_delay(deadline_s),
        before_sleep=log,
        reraise=True,
    ):
        with one:
            return await attempt()
    raise AssertionError("unreachable: the last attempt raises")
