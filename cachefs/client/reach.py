"""Whether the master answers, as one client knows it: so that what is remembered is served at once while it does not.

A connection that was lost tells by itself; a master that hangs, or a network that swallows what is sent, does not. So
whoever asks is watched: when an answer is long in coming, and now and then when nobody asks, the master is asked
something that it has at hand. While it is away that goes on, until it answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

from cachefs.client.patience import patiently
from cachefs.model import CachefsError, HandshakeError, TransportError, format_duration

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SLOW_S = 1.0
"""An answer that takes longer makes us ask whether the master is there: it may only be looking at a slow store."""
_ANSWER_S = 2.0
"""How long it may take to say so."""
_IDLE_S = 10.0
"""How often it is asked while nobody asks it anything."""
_AGAIN_S = 0.5
"""The same, while it is away."""
_WORTH_TELLING_S = 1.0
"""An outage that is shorter is a restart, and not in the log."""


class MasterReach:
    """Called from one trio thread. While the master is away, requests end as their patience says, hanging or not."""

    def __init__(self, probe: Callable[[], Awaitable[object]], patience_s: float) -> None:
        """`probe` asks the master something that it answers at once. `patience_s` is for the log."""
        self.outages = 0
        """How often it was found to be away."""
        self.served_stale = 0
        """Answers that were given from memory past their time, as it was away."""
        self.on_back: Callable[[], None] = lambda: None
        """Called when it answers again after answers past their time were given."""
        self._probe = probe
        self._patience_s = patience_s
        self._since: float | None = None
        """None: it answered the last time."""
        self._stale_before = 0
        self._is_told = False
        self._reason = ""
        self._waiting: dict[trio.CancelScope, tuple[float, float]] = {}
        """(when it began, patience in seconds) of each request under way, the oldest first."""
        self._doubts = trio.Event()

    @property
    def is_away(self) -> bool:
        return self._since is not None

    @property
    def away_s(self) -> float:
        """Seconds; 0: it is there."""
        return trio.current_time() - self._since if self._since is not None else 0.0

    def why(self) -> str:
        """Of an outage, for people."""
        return f"the master does not answer, for {format_duration(round(self.away_s))} now: {self._reason}"

    def count_stale(self) -> None:
        self.served_stale += 1

    async def ask(self, call: Callable[[], Awaitable[T]], patience_s: float) -> T:
        """As `patiently`. While the master is known to be away, TransportError comes after `patience_s` at the latest,
        whatever becomes of the request; at once with 0. A connection that was lost does not say that it is away: also
        with 0 the request is made again until that is known.
        """
        if self.is_away and patience_s <= 0:
            raise TransportError(self.why())

        async def doubting() -> T:
            try:
                return await call()
            except TransportError:
                self.doubt()
                raise

        with self.waiting(patience_s):
            found = await patiently(doubting, patience_s if patience_s > 0 else _SLOW_S + _ANSWER_S)
        self._answered()
        return found

    @contextmanager
    def waiting(self, patience_s: float) -> Iterator[None]:
        """The block is given up `patience_s` after the master went away: TransportError then."""
        now = trio.current_time()
        with trio.CancelScope() as scope:
            self._waiting[scope] = now, patience_s
            if self.is_away:
                scope.deadline = now + patience_s
            try:
                yield
            finally:
                del self._waiting[scope]
        if scope.cancelled_caught:
            raise TransportError(self.why() if self.is_away else "the master did not answer in time")

    def doubt(self) -> None:
        """A request failed: see whether it is there, and now."""
        self._doubts.set()

    async def follow(self) -> None:
        """Runs until cancelled."""
        asked = trio.current_time()
        while True:
            pause_s = _AGAIN_S if self.is_away else _SLOW_S / 2
            with trio.move_on_after(pause_s):
                await self._doubts.wait()
            is_doubted = self._doubts.is_set()
            self._doubts = trio.Event()
            now = trio.current_time()
            began = next(iter(self._waiting.values()), (now, 0.0))[0]
            is_due = max(began, asked) <= now - _SLOW_S or asked <= now - _IDLE_S
            if not (is_doubted or self.is_away or is_due):
                continue
            await self._look()
            asked = trio.current_time()
            if self.is_away or is_doubted:
                # Whatever fails meanwhile is known.
                await trio.sleep(_AGAIN_S / 5)

    async def _look(self) -> None:
        reason = f"no answer within {_ANSWER_S:g} s"
        try:
            with trio.move_on_after(_ANSWER_S):
                await self._probe()
                self._answered()
                return
        except HandshakeError as error:
            reason = str(error)
        except TransportError as error:
            reason = str(error)
        except CachefsError:
            # It says no, but says it.
            self._answered()
            return
        self._missed(reason)

    def _missed(self, reason: str) -> None:
        now = trio.current_time()
        self._reason = reason
        if self._since is None:
            self._since = now
            self.outages += 1
            for scope, (_, patience_s) in self._waiting.items():
                scope.deadline = now + patience_s
        if not self._is_told and self.away_s >= _WORTH_TELLING_S:
            self._is_told = True
            logger.warning(
                "the master is away, what is remembered is served and the rest waits patience_s=%g error=%s",
                *(self._patience_s, reason),
            )

    def _answered(self) -> None:
        # Some may have been given though it was there again already: whoever gave them had not heard of it yet.
        stale = self.served_stale - self._stale_before
        if self._since is None and not stale:
            return
        if self._is_told:
            logger.info("the master is back away_s=%.1f served_stale=%d", self.away_s, stale)
        self._since, self._is_told = None, False
        self._stale_before = self.served_stale
        for scope in self._waiting:
            scope.deadline = float("inf")
        if stale:
            self.on_back()
