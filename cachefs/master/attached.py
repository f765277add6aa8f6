"""Which under-stores are attached, as workers are told of it that have them open."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable

import trio

from cachefs.wire.messages import StoresInUse

TOLD_EVERY_S = 0.2
"""At most so often, to each who follows: a hundred volumes that are removed at once are one change, or a few."""


class Attached:
    """Told of what is written, and never of what may yet fail to be: whoever hears that a store is gone closes it."""

    def __init__(self, store_ids: Iterable[int], newest: int) -> None:
        """`newest`: the largest number that was ever given to one."""
        self._store_ids = set(store_ids)
        self._newest = newest
        self._renewed = 0
        self._changed = trio.Event()

    def added(self, store_id: int) -> None:
        self._store_ids.add(store_id)
        self._newest = max(self._newest, store_id)
        self._tell()

    def removed(self, store_id: int) -> None:
        self._store_ids.discard(store_id)
        self._tell()

    def renewed(self) -> None:
        """One has other options."""
        self._renewed += 1
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def watch(self) -> AsyncGenerator[StoresInUse, None]:
        """At once, and again whenever it changes."""
        while True:
            changed = self._changed
            yield StoresInUse(sorted(self._store_ids), self._newest, self._renewed)
            await changed.wait()
            await trio.sleep(TOLD_EVERY_S)
