"""Which contents count for which quotas, as the master tells it, put in force in the store; and asking it for more of
them before more is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

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

    async def follow(self, peer: Peer) -> None:
        """Hear of quotas until the connection is lost, or cancelled."""
        keys = self.quotas.keys
        self._peer, self._serial = peer, 0
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

    async def grow(self, needs: Mapping[int, int], *, patient: bool = False) -> None:
        """So many bytes are to be taken of quotas: ask for what of it was not granted. Returns when the answer is in
        force, if there is one. Where the master had no more to give, it is not asked again for a second; `patient`:
        it is, for some seconds, as long as it says that there may be more soon.
        """
        give_up = trio.current_time() + (_PATIENT_S if patient else 0.0)
        while self._lacking(needs, patient=patient):
            async with self._one:
                # Others may have asked, and got more than they need.
                wants = self._lacking(needs, patient=patient)
                soon = await self._ask(wants, {}) if wants else set()
                short = self._lacking(needs, patient=patient)
                now = trio.current_time()
                if not short.keys() & soon or now >= give_up:
                    self._denied = dict.fromkeys(short, now + _ASKED_AGAIN_S) | self._denied
                    return
            await trio.sleep(_PAUSE_S)

    def _lacking(self, needs: Mapping[int, int], *, patient: bool) -> dict[int, int]:
        now = trio.current_time()
        if self._denied:
            self._denied = {quota: until for quota, until in self._denied.items() if until > now}
        lacking = {
            quota: self.quotas.lacking(quota, need)
            for quota, need in needs.items()
            if patient or quota not in self._denied
        }
        return {quota: size for quota, size in lacking.items() if size > 0}

    async def _exchange(self, idle: Mapping[int, int] | None = None, *, gives_back: bool = False) -> None:
        # One at a time: an answer that is overtaken by another one would not be what the master knows.
        async with self._one:
            await self._ask({}, idle or {}, gives_back=gives_back)

    async def _ask(self, wants: Mapping[int, int], idle: Mapping[int, int], *, gives_back: bool = False) -> set[int]:
        """Returns those of which there may be more soon."""
        peer = self._peer
        if peer is None or not self._counts:
            return set()
        uses = self.quotas.to_report(gives_back=gives_back)
        told = [QuotaUse(quota, *use, wants.get(quota, 0), idle.get(quota, 0)) for quota, use in uses.items()]
        told += [QuotaUse(quota, 0, 0, 0, size) for quota, size in wants.items() if quota not in uses]
        try:
            with trio.fail_after(_ANSWER_TIMEOUT_S):
                answer = (await peer.call(ReportQuotas(self._serial, told))).message
        except (CachefsError, trio.TooSlowError) as error:
            logger.debug("quotas not told of error=%r", error)
            return set()
        self.quotas.grant({each.quota_id: each.granted_bytes for each in answer.grants})
        return {each.quota_id for each in answer.grants if each.soon}
