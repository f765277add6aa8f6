"""`cachefs verify`: every sealed block read back from its disk and compared, because somebody asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import trio

from cachefs.store import Store
from cachefs.wire.messages import VerifyProgress
from cachefs.worker.counters import Counters
from cachefs.worker.suspects import Suspects

_TELL_EVERY_S = 0.5


async def verify(
    store: Store, suspects: Suspects, counters: Counters, *, repair: bool
) -> AsyncGenerator[VerifyProgress, None]:
    """How far it is, now and then; the last one is complete. Nothing is changed without `repair`.

    One thread, as readers come first. Cancelling ends it after the block that is being read.
    """
    disk = trio.CapacityLimiter(1)
    if repair:
        for block in store.suspects():
            await suspects.restore(block, disk)
    unverified = len(store.suspects())
    blocks = store.blocks()
    total = sum(size for _, size in blocks)
    done = 0
    damaged: list[str] = []
    told = trio.current_time()
    for number, (block, size) in enumerate(blocks):
        if not await trio.to_thread.run_sync(store.check, block, limiter=disk):
            damaged.append(block.filename)
            counters.corrupt += 1
            if repair:
                await trio.to_thread.run_sync(store.drop, block, limiter=disk)
        done += size
        if trio.current_time() - told >= _TELL_EVERY_S:
            told = trio.current_time()
            yield VerifyProgress(number + 1, len(blocks), done, total, unverified, damaged)
            damaged = []
    yield VerifyProgress(len(blocks), len(blocks), done, total, unverified, damaged)
