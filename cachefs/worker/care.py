"""What keeps the store in good order while nobody waits: syncing, making room in upper tiers, the scrub, and trying
disks that failed.
"""

from __future__ import annotations

import logging

import trio

from cachefs.model import BlockCorruptError, CapacityError
from cachefs.store import Store, Tier
from cachefs.store.blame import is_of_the_process
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.suspects import Suspects

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
_PUT_OFF_S = 3600.0
_PROBE_TIMEOUT_S = 10.0


class Care:
    """`run` does everything, one thing at a time: background work never has more than one thread. Disks are tried in
    threads of their own, as a failing one may hang for good.
    """

    def __init__(self, store: Store, suspects: Suspects, counters: Counters, config: WorkerConfig) -> None:
        self._store = store
        self._suspects = suspects
        self._counters = counters
        self._config = config
        self._disk = trio.CapacityLimiter(1)
        self._probes = {tier: trio.CapacityLimiter(1) for tier in store.tiers}
        self._judging = trio.CapacityLimiter(1)
        self._fetched = 0

    async def run(self) -> None:
        """Until cancelled; what is under way then is finished first."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_room_and_sync)
            nursery.start_soon(self._try_disks)
            if self._config.scrub_bytes_per_s:
                nursery.start_soon(self._restore)
                nursery.start_soon(self._scrub)

    async def _keep_room_and_sync(self) -> None:
        while True:
            await trio.sleep(_EVERY_S)
            lost = await trio.to_thread.run_sync(self._store.sync_sealed, limiter=self._disk)
            self._counters.corrupt += len(lost)
            await trio.to_thread.run_sync(self._store.move_down, self._config.promote, limiter=self._disk)

    async def _try_disks(self) -> None:
        while True:
            await trio.sleep(_EVERY_S)
            async with trio.open_nursery() as nursery:
                for tier in self._store.to_probe():
                    nursery.start_soon(self._try_disk, tier)

    async def _try_disk(self, tier: Tier) -> None:
        good: bool | None = False
        reason: object = f"it does not answer within {_PROBE_TIMEOUT_S:g} s"
        # One that hangs keeps its thread, and the next probe waits for that one.
        with trio.move_on_after(_PROBE_TIMEOUT_S):
            try:
                await trio.to_thread.run_sync(tier.try_disk, limiter=self._probes[tier], abandon_on_cancel=True)
                good, reason = True, "it can be written and read"
            except CapacityError as error:
                good, reason = None, error
            except (BlockCorruptError, OSError) as error:
                good, reason = (None if is_of_the_process(error) else False), error
        await trio.to_thread.run_sync(self._store.probed, tier, good, reason, limiter=self._judging)

    async def _until_nothing_is_fetched(self) -> None:
        """What waits for the under-store needs the processor more; after an hour of that, go on anyway."""
        give_up = trio.current_time() + _PUT_OFF_S
        while trio.current_time() < give_up:
            fetched, self._fetched = self._fetched, self._counters.under_store_bytes
            if fetched == self._fetched:
                return
            await trio.sleep(_EVERY_S)

    async def _restore(self) -> None:
        """Blocks of an earlier boot, or of a disk that is back, at once: until they are verified, nobody reads them
        without waiting, and a drain waits for them.
        """
        while True:
            for block in self._store.suspects():
                await self._suspects.restore(block, self._disk)
            await trio.sleep(_EVERY_S)

    async def _scrub(self) -> None:
        while True:
            for block, size in self._store.blocks():
                # Slept before, so that what was sealed a moment ago is not read again at once.
                await trio.sleep(max(size / self._config.scrub_bytes_per_s, 0.001))
                await self._until_nothing_is_fetched()
                if not await trio.to_thread.run_sync(self._store.check, block, limiter=self._disk):
                    logger.warning("block dropped, it is damaged block=%s", block.filename)
                    self._counters.corrupt += 1
                    await trio.to_thread.run_sync(self._store.drop, block, limiter=self._disk)
            await trio.sleep(_EVERY_S)
