"""Trying again what may help, and slowing down when the store asks: one policy for all under-stores, and the only
place that repeats their requests."""

from __future__ import annotations

import email.utils
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import tenacity
import trio

from cachefs.model import CachefsError, ThrottledError, UnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
FIRST_SLOW_DOWN_S = 0.5
"""Pause of all requests of a store after a throttled answer that says no time; doubled with each in a row."""

_limit_s: ContextVar[float] = ContextVar("limit_s", default=math.inf)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Requests of the block's own task are given up after so long, whatever deadline and timeouts their store has."""
    token = _limit_s.set(seconds)
    try:
        yield
    finally:
        _limit_s.reset(token)


def retry_after_s(header: str) -> float:
    """Seconds that a header Retry-After asks for, by a number or a date; 0 for anything else."""
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


class Requests:
    """The requests to one store: how many at once, and when they are tried again.

    A throttled answer holds all of them back, for as long as the store asked or else for a growing pause, and halves
    how many there are at once. Answers after that let the number grow again by one for each round of them.
    """

    def __init__(self, deadline_s: float, most: int) -> None:
        self._deadline_s = deadline_s
        self._most = most
        self._allowed = float(most)
        self._slots = trio.CapacityLimiter(most)
        self._resume_at = 0.0
        self._cut_at = -math.inf
        self._in_a_row = 0
        self._answered_at = -math.inf

    @property
    def slowed(self) -> bool:
        """Whether the store asked for fewer requests, and has not yet shown that it is well again."""
        return self._allowed < self._most

    async def run(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, tried again after growing random pauses while it is throttled or fails to answer.

        Raises the last ThrottledError or UnavailableError when no further attempt fits into the deadline, and every
        other error at once. Waiting for a slot behind requests that are answered does not count. `what` is for the log.
        Within `at_most`, also an attempt under way is given up.
        """

        limit_s = _limit_s.get()
        trouble = "nothing came at all"

        def log(state: tenacity.RetryCallState) -> None:
            nonlocal trouble
            error = state.outcome.exception() if state.outcome is not None else None
            trouble = str(error)
            logger.info("trying again what=%s attempt=%d error=%s", what, state.attempt_number, error)

        backoff = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)

        def pause(state: tenacity.RetryCallState) -> float:
            return max(backoff(state), self._resume_at - trio.current_time())

        def stop(state: tenacity.RetryCallState) -> bool:
            return trio.current_time() + state.upcoming_sleep >= began + min(self._deadline_s, limit_s)

        began = trio.current_time()
        with trio.move_on_after(limit_s):
            try:
                # Nearly always the only attempt: the machinery of retries costs as much as the request.
                return await self._try(what, attempt)
            except (ThrottledError, UnavailableError) as error:
                first = error
            async for one in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type((ThrottledError, UnavailableError)),
                wait=pause,
                stop=stop,
                before_sleep=log,
                reraise=True,
            ):
                with one:
                    if one.retry_state.attempt_number == 1:
                        raise first
                    return await self._try(what, attempt)
        raise UnavailableError(f"{what}: no answer within {limit_s:g} s ({trouble})")

    async def together(
        self, what: str, most: int, attempt: Callable[[int], Awaitable[list[Exception | None]]]
    ) -> list[Exception | None]:
        """The outcomes of `attempt(at_once)`, which makes several requests once, `most` at a time. What comes of it
        is counted as by `run`, to which those are left that are worth trying again.

        Raises ThrottledError or UnavailableError when there is no slot for too long.
        """
        slots: list[object] = []
        try:
            slots.append(await self._take_slot(what, object()))
            while len(slots) < most and self._slots.available_tokens >= 1:
                slot = object()
                self._slots.acquire_on_behalf_of_nowait(slot)
                slots.append(slot)
            began = trio.current_time()
            outcomes = await attempt(len(slots))
        finally:
            for slot in slots:
                self._slots.release_on_behalf_of(slot)
        throttled = [error for error in outcomes if isinstance(error, ThrottledError)]
        if throttled:
            self._slow_down(began, max(error.retry_after_s for error in throttled))
        elif not all(isinstance(error, UnavailableError) for error in outcomes):
            self._answered()
        return outcomes

    async def _try(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        slot = await self._take_slot(what, object())
        try:
            return await self._attempt(attempt)
        finally:
            self._slots.release_on_behalf_of(slot)

    async def _take_slot(self, what: str, slot: object) -> object:
        """`slot`, taken outside of pauses. ThrottledError or UnavailableError: there is none for too long."""
        began = trio.current_time()
        if self._resume_at <= began:
            try:
                self._slots.acquire_on_behalf_of_nowait(slot)
            except trio.WouldBlock:
                pass
            else:
                return slot
        while True:
            if self._resume_at > began + self._deadline_s:
                raise ThrottledError(f"{what}: the store asks for a longer pause than the deadline allows")
            await trio.sleep_until(self._resume_at)
            with trio.move_on_after(self._deadline_s) as waiting:
                await self._slots.acquire_on_behalf_of(slot)
            if waiting.cancelled_caught:
                if self._answered_at < began:
                    raise UnavailableError(f"{what}: the store answers no requests")
            elif self._resume_at <= trio.current_time():
                return slot
            else:
                self._slots.release_on_behalf_of(slot)  # asked to pause meanwhile

    async def _attempt(self, attempt: Callable[[], Awaitable[T]]) -> T:
        began = trio.current_time()
        try:
            result = await attempt()
        except ThrottledError as error:
            self._slow_down(began, error.retry_after_s)
            raise
        except UnavailableError:
            raise
        except CachefsError:
            self._answered()
            raise
        self._answered()
        return result

    def _slow_down(self, began: float, retry_after_s: float) -> None:
        now = trio.current_time()
        if began >= self._cut_at:
            # Of those that were under way together, the first one counts.
            self._allowed = max(1.0, self._allowed / 2)
            self._slots.total_tokens = int(self._allowed)
            self._cut_at = now
            self._in_a_row += 1
            logger.info("slowing down requests=%d pause_s=%g", int(self._allowed), retry_after_s)
            usual_s = min(FIRST_SLOW_DOWN_S * 2 ** (self._in_a_row - 1), LONGEST_PAUSE_S)
            self._resume_at = max(self._resume_at, now + (retry_after_s or usual_s))
        elif retry_after_s:
            self._resume_at = max(self._resume_at, now + retry_after_s)

    def _answered(self) -> None:
        self._answered_at = trio.current_time()
        self._in_a_row = 0
        if self.slowed:
            self._allowed = min(self._allowed + 1 / self._allowed, self._most)
            self._slots.total_tokens = int(self._allowed)
