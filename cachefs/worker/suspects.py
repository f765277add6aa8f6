"""Blocks of an earlier boot, until they are verified."""

from __future__ import annotations

import math

import trio

from cachefs.model import BlockId
from cachefs.store import Store


class Suspects:
    """Called from one trio thread. Whatever verifies one does so by this: the store does not name those that it is
    reading, and whoever wants one of those waits, or it would be fetched, and what is here be of no use.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._under_way: dict[BlockId, trio.Event] = {}
        self._threads = trio.CapacityLimiter(math.inf)
        """Bounded by those of the callers."""

    def __contains__(self, block: BlockId) -> bool:
        """Whether it is to be verified, or is being verified now: `restore` tells what it is worth."""
        return block in self._under_way or self._store.is_suspect(block)

    async def restore(self, block: BlockId, limiter: trio.CapacityLimiter) -> bool:
        """As `Store.restore`, in a thread. Waits for whoever is verifying it already; whoever waits for `limiter` keeps
        nobody else from it.
        """
        while True:
            done = self._under_way.get(block)
            if done is not None:
                await done.wait()
                if block not in self:
                    break
                continue
            async with limiter:
                if block not in self._under_way:
                    return await self._restore(block)
        return self._store.is_sealed(block)

    async def _restore(self, block: BlockId) -> bool:
        self._under_way[block] = done = trio.Event()
        try:
            return await trio.to_thread.run_sync(self._store.restore, block, limiter=self._threads)
        finally:
            # What was found to be good is on the list of what is reported by now.
            del self._under_way[block]
            done.set()

    @property
    def left(self) -> int:
        """Those that may be sealed yet."""
        return len(self._under_way.keys() | set(self._store.suspects()))
