"""Which contents count for which quotas, as the master tells it, put in force in the store; and asking it for more of
them before more is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import trio

from cachefs.model import CachefsError, TransportError
from cachefs.net import Peer
from cachefs.store import Quotas, Rule
from cachefs.wire.quotas import QuotasApplied, QuotaUse, ReportQuotas, WatchQuotas

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 3.0
_ASKED_AGAIN_S = 1.0
"""After the master had no more to give."""
_PATIENT_S = 5.0
"""For how long who can wait waits for what others may give back."""
_PAUSE_S = 0.25
_IN_VAIN_S = 30.0
"""After somebody waited so and got nothing, nobody else does."""


class _Answer(NamedTuple):
    """Of the master, to somebody who can wait, which was not enough."""

    until: float
    """The master is not asked again before."""
    wants: Mapping[int, int]
    soon: frozenset[int]

    def holds_for(self, wants: Mapping[int, int]) -> bool:
        """It would be the same: who wants no less is not told of room that there was not for less."""
        return trio.current_time() < self.until and all(
            quota in self.wants and (quota in self.soon or self.wants[quota] <= size) for quota, size in wants.items()
        )


class QuotaFollower:
    """What was told and granted last stays in force while the master is away: nothing more is taken then."""

    def __init__(self) -> None:
        self.quotas = Quotas()
        self.apply: Callable[[], None] = lambda: None
        """Called in a thread when other contents count than before."""
        self.idle: Callable[[], Mapping[int, int]] = dict
        """Called in a thread: what is idle of each quota."""
        self.trim: Callable[[], None] = lambda: None
        """Called in a thread when more is there than may be: to give up what is idle of it."""
        self.known = trio.Event()
        """The master has told the first time."""
        self._peer: Peer | None = None
        """The master, while it is there."""
        self._serial = 0
        """Of what it told last; 0: nothing yet."""
        self._disk = trio.CapacityLimiter(1)
        self._one = trio.Lock()
        self._counts = False
        self._denied: dict[int, float] = {}
        """Until when it makes no sense to ask for more of these."""
        self._in_vain: dict[int, float] = {}
        """Until when nobody waits for more of these."""
        self._helped: dict[int, float] = {}
        """When waiting brought something of these last."""
        self._answer = _Answer(0.0, {}, frozenset())
        self._silent = False
        """The master did not answer when it was asked last: only what is told it every second finds out whether it does
        again."""

    @property
    def can_grow(self) -> bool:
        """The master is there to be asked for more."""
        return self._peer is not None and not self._silent

    async def follow(self, peer: Peer) -> None:
        """Hear of quotas until the connection is lost, or cancelled."""
        keys = self.quotas.keys
        self._peer, self._serial, self._silent = peer, 0, False
        try:
            async with peer.stream(WatchQuotas()) as parts:
                begun = False
                async for part in parts:
                    if not begun and not part.same_keys:
                        keys.begin()
                        begun = True
                    if part.keys:
                        keys.collect(part.quota_id, part.keys)
                    if not part.last:
                        continue
                    if not part.same_keys:
                        keys.finish(await trio.to_thread.run_sync(keys.ordered, limiter=self._disk))
                    was_active, begun = self.quotas.active, False
                    rules = {each.quota_id: Rule(each.path, each.limit_bytes, each.outer) for each in part.rules}
                    self.quotas.put_in_force(rules)
                    if (was_active or rules) and not part.same_keys:
                        await trio.to_thread.run_sync(self.apply, limiter=self._disk)
                    self._serial = part.serial
                    self.known.set()
                    if rules:
                        # First: whoever waits to hear that it is in force is told how much there is, too.
                        await self._exchange()
                    await peer.call(QuotasApplied(part.serial))
        except TransportError as error:
            logger.debug("quotas not heard of error=%s", error)
        finally:
            if self._peer is peer:
                self._peer = None

    async def run(self) -> None:
        """Tell the master what is taken, every second if there are any. Runs until cancelled.

        Begun when the store has counted what it has: the master takes what it was not told of for room.
        """
        self._counts = True
        while True:
            if self.quotas.active:
                idle = await trio.to_thread.run_sync(self.idle, limiter=self._disk)
                await self._exchange(idle, gives_back=True)
                if self.quotas.over():
                    await trio.to_thread.run_sync(self.trim, limiter=self._disk)
            await trio.sleep(_REPORT_EVERY_S)

    async def grow(self, needs: Mapping[int, int]) -> None:
        """So many bytes are to be taken of quotas: ask for what of it was not granted. Returns when the answer is in
        force, if there is one. Where the master had no more to give, it is not asked again for a second.
        """
        if not self._silent and self._lacking(needs, self._denied):
            async with self._one:
                # Others may have asked, and got more than they need.
                wants = self._lacking(needs, self._denied)
                if wants:
                    await self._ask(wants, {})
                    self._deny(self._lacking(needs))

    async def wait(self, needs: Mapping[int, int]) -> None:
        """As `grow`, for who can wait for some seconds, as long as the master says that there may be more soon. Of many
        who wait, one asks at a time, and what it is told the others go by.
        """
        began = trio.current_time()
        waits_for = wants = self._lacking(needs)
        while wants:
            if not self._answer.holds_for(wants):
                async with self._one:
                    wants = self._lacking(needs)
                    if not self._answer.holds_for(wants):
                        soon = await self._ask(wants, {}) if wants else set()
                        wants = self._lacking(needs)
                        if wants:
                            until = trio.current_time() + _PAUSE_S
                            self._answer = _Answer(until, wants, frozenset(soon))
            now = trio.current_time()
            if not wants:
                break
            is_over = now >= began + _PATIENT_S
            if is_over:
                self._in_vain |= {
                    quota: now + _IN_VAIN_S for quota in wants if self._helped.get(quota, -math.inf) < began
                }
            is_in_vain = any(self._in_vain.get(quota, 0.0) > now for quota in wants)
            if is_over or is_in_vain or not wants.keys() & self._answer.soon:
                self._deny(wants)
                return
            await trio.sleep(_PAUSE_S)
            wants = self._lacking(needs)
        for quota in waits_for:
            self._in_vain.pop(quota, None)
            self._helped[quota] = trio.current_time()

    def _deny(self, short: Mapping[int, int]) -> None:
        self._denied = dict.fromkeys(short, trio.current_time() + _ASKED_AGAIN_S) | self._denied

    def _lacking(self, needs: Mapping[int, int], but: Mapping[int, float] | None = None) -> dict[int, int]:
        """`but`: of these nothing, until then."""
        now = trio.current_time()
        if self._denied:
            self._denied = {quota: until for quota, until in self._denied.items() if until > now}
        lacking = {
            quota: self.quotas.lacking(quota, need)
            for quota, need in needs.items()
            if but is None or but.get(quota, 0.0) <= now
        }
        return {quota: size for quota, size in lacking.items() if size > 0}

    async def _exchange(self, idle: Mapping[int, int] | None = None, *, gives_back: bool = False) -> None:
        # One at a time: an answer that is overtaken by another one would not be what the master knows.
        async with self._one:
            await self._ask({}, idle or {}, gives_back=gives_back)

    async def _ask(self, wants: Mapping[int, int], idle: Mapping[int, int], *, gives_back: bool = False) -> set[int]:
        """Returns those of which there may be more soon."""
        peer = self._peer
        if peer is None or not self._counts or (self._silent and wants):
            return set()
        uses = self.quotas.to_report(gives_back=gives_back)
        told = [QuotaUse(quota, *use, wants.get(quota, 0), idle.get(quota, 0)) for quota, use in uses.items()]
        told += [QuotaUse(quota, 0, 0, 0, size) for quota, size in wants.items() if quota not in uses]
        try:
            with trio.fail_after(_ANSWER_TIMEOUT_S):
                answer = (await peer.call(ReportQuotas(self._serial, told))).message
        except (CachefsError, trio.TooSlowError) as error:
            logger.debug("quotas not told of error=%r", error)
            self._silent = True
            return set()
        self._silent = False
        self.quotas.grant({each.quota_id: each.granted_bytes for each in answer.grants})
        return {each.quota_id for each in answer.grants if each.soon}
