"""Blocks of an earlier boot, until they are verified."""

from __future__ import annotations

from collections import Counter

import trio

from cachefs.model import BlockId
from cachefs.store import Store


class Suspects:
    """Called from one trio thread. Whatever verifies one does so by this: the store does not name those that it is
    reading.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._under_way: Counter[BlockId] = Counter()

    async def restore(self, block: BlockId, limiter: trio.CapacityLimiter) -> bool:
        """As `Store.restore`, in a thread."""
        self._under_way[block] += 1
        try:
            return await trio.to_thread.run_sync(self._store.restore, block, limiter=limiter)
        finally:
            # What was found to be good is on the list of what is reported by now.
            self._under_way[block] -= 1
            if not self._under_way[block]:
                del self._under_way[block]

    @property
    def left(self) -> int:
        """Those that may be sealed yet."""
        return len(self._under_way.keys() | set(self._store.suspects()))
