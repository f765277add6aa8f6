"""Blocks of an earlier boot, until they are verified."""

from __future__ import annotations

import trio

from cachefs.model import BlockId
from cachefs.store import Store


class Suspects:
    """Called from one trio thread. Whatever verifies one does so by this: the store does not name those that it is
    reading.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._under_way: dict[BlockId, trio.Event] = {}

    def __contains__(self, block: BlockId) -> bool:
        """Whether it is to be verified, or is being verified now: it may be sealed yet, by `restore`."""
        return block in self._under_way or self._store.is_suspect(block)

    async def restore(self, block: BlockId, limiter: trio.CapacityLimiter) -> bool:
        """As `Store.restore`, in a thread; whoever asks for one that is being verified waits for that."""
        while (under_way := self._under_way.get(block)) is not None:
            await under_way.wait()
        if not self._store.is_suspect(block):
            return self._store.is_sealed(block)
        event = self._under_way[block] = trio.Event()
        try:
            return await trio.to_thread.run_sync(self._store.restore, block, limiter=limiter)
        finally:
            # What was found to be good is on the list of what is reported by now.
            del self._under_way[block]
            event.set()

    @property
    def left(self) -> int:
        """Those that may be sealed yet."""
        return len(self._under_way.keys() | set(self._store.suspects()))
