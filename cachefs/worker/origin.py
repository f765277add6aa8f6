"""Reading the under-store: counted, bounded, and with changes reported."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

from cachefs.model import BlockId, CachefsError, ContentChangedError, NotFoundError
from cachefs.store import Store
from cachefs.ufs.files import Claim, Data, Keep
from cachefs.worker.counters import Counters
from cachefs.worker.sources import Source, Sources


class Origin:
    """`on_changed` returns when the master has looked at an object again of which there is another version."""

    def __init__(
        self, store: Store, sources: Sources, counters: Counters, on_changed: Callable[[Source], Awaitable[None]]
    ) -> None:
        self._store = store
        self._sources = sources
        self._counters = counters
        self._on_changed = on_changed

    async def read(self, source: Source, offset: int, length: int) -> Data:
        """One range of a content. Raises ContentChangedError, UnderStoreError and its kinds."""
        began = perf_counter()
        try:
            data = await self._sources.read(source, offset, length)
        except (ContentChangedError, NotFoundError) as error:
            raise await self._changed(source, error) from error
        self.count("range", length, perf_counter() - began)
        return data

    async def read_files(
        self, wanted: Sequence[Source], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        """As `UnderStore.read_files`, of objects of one under-store; `keep` has to count what it gets."""
        outcomes = await self._sources.read_files(wanted, keep, at_once, claim)
        for number, error in enumerate(outcomes):
            if isinstance(error, (ContentChangedError, NotFoundError)):
                outcomes[number] = await self._changed(wanted[number], error)
        return outcomes

    def count(self, kind: str, length: int, seconds: float) -> None:
        """A read is done: of a "range" of an object, or a small "file" as a whole."""
        self._counters.under_store_times.observe(kind, seconds)
        self._counters.under_store_reads += 1
        self._counters.under_store_bytes += length

    async def _changed(self, source: Source, error: CachefsError) -> ContentChangedError:
        """What to tell whoever wanted to read an object of which there is another version now, or none."""
        self._counters.changed += 1
        if source.attr.key:
            self._store.retire(BlockId(source.attr.key, 0))
        # Before the reader hears of it: when it looks the name up again, it must find what there is now.
        await self._on_changed(source)
        changed = ContentChangedError(f"{source.info.path}: changed or removed in the under-store")
        changed.__cause__ = error
        return changed
