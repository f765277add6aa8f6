"""Blocks that are being filled: from the first page somebody asks for to the seal.

A `Job` owns one open partial. It ends when the block is sealed, when the content turns out to be gone, or when nobody
has asked for it for a while; what a partial has on disk survives that.

    ask -> pages missing?  -> fetch each once (single-flight per page; readers first, then read-ahead and filling)
                           -> write into the partial, with the checksum made from what the under-store sent
           all present?    -> seal once: every page is read back and compared, then renamed into place
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import trio

from cachefs.model import (
    BlockCorruptError,
    BlockId,
    CachefsError,
    CapacityError,
    ContentChangedError,
    NotFoundError,
)
from cachefs.net.flights import Flights
from cachefs.policy import Promote, Readahead, ReadaheadConfig
from cachefs.store import Partial, Store, page_checksum
from cachefs.ufs.files import Claim, Data
from cachefs.worker.counters import Counters
from cachefs.worker.sources import Source, Sources

logger = logging.getLogger(__name__)


class Job:
    """One block being filled."""

    def __init__(self, partial: Partial, source: Source, content_offset: int) -> None:
        self.partial = partial
        self.source = source
        self.content_offset = content_offset
        """Where the block starts in its content."""
        self.last_asked = trio.current_time()
        self.users = 0
        self.filling = False
        self.ended = False
        """Nobody new joins it."""
        self.closed = False
        self._demanded: set[int] = set()
        self._readers: dict[int, Readahead] = {}

    @property
    def block(self) -> BlockId:
        return self.partial.block

    def demand(self, reader: int, pages: range, config: ReadaheadConfig) -> range:
        """Note that a reader needs these pages; returns those to fetch ahead of it."""
        self.last_asked = trio.current_time()
        self._demanded.update(pages)
        readahead = self._readers.get(reader)
        if readahead is None:
            readahead = self._readers[reader] = Readahead(self.partial.page_count, config)
        return readahead.access(pages.start, pages.stop)

    @property
    def worth_filling(self) -> bool:
        """Somebody reads it, rather than having looked at its head only (`file`, `head`): fetch the rest as well."""
        return len(self._demanded) > 1 or self.partial.page_count <= 2


class Filler:
    """Fetches pages into partials, and seals. Tasks run in `nursery`."""

    def __init__(
        self,
        store: Store,
        sources: Sources,
        counters: Counters,
        *,
        demand_slots: int,
        background_slots: int,
        load_slots: int,
        on_changed: Callable[[Source], Awaitable[None]],
        on_sealed: Callable[[BlockId, int], None],
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._sources = sources
        self._counters = counters
        self._nursery = nursery
        self._demand = trio.CapacityLimiter(demand_slots)
        self._background = trio.CapacityLimiter(background_slots)
        self._load = trio.CapacityLimiter(load_slots)
        self._disk = trio.CapacityLimiter(4)
        self._pages: Flights[tuple[int, int], None] = Flights(nursery)
        self._seals: Flights[int, None] = Flights(nursery)
        self._on_changed = on_changed
        self._on_sealed = on_sealed

    @property
    def slots(self) -> dict[str, trio.CapacityLimiter]:
        """What is fetched at once, by who waits for it."""
        return {"demand": self._demand, "background": self._background, "load": self._load}

    async def fetch(self, job: Job, pages: Iterable[int], *, loading: bool = False) -> None:
        """Return when all these pages are present. `loading`: in the slots of those that nobody waits to read.

        Raises ContentChangedError, NotFoundError, UnderStoreError and its kinds, CapacityError. Cancelling gives up
        what nobody else waits for.
        """
        missing = [page for page in pages if not job.partial.has(page)]
        if len(missing) == 1:
            await self._join(job, missing[0], self._load if loading else self._demand)
        elif missing:
            try:
                async with trio.open_nursery() as nursery:
                    for page in missing:
                        nursery.start_soon(self._join, job, page, self._load if loading else self._demand)
            except* CachefsError as group:
                raise _first(group) from None

    def fetch_ahead(self, job: Job, pages: Iterable[int]) -> None:
        """Start fetching these pages for nobody in particular."""
        for page in pages:
            if not job.partial.has(page):
                self._pages.start((job.partial.serial, page), lambda page=page: self._fetch_quietly(job, page))  # type: ignore[misc]

    async def fill(self, job: Job) -> None:
        """Fetch what is missing, in order, and seal. Ends early, without an error, when the under-store fails."""
        try:
            for page in list(job.partial.missing()):
                if not job.partial.has(page):
                    await self._join(job, page, self._background)
            await self.seal(job)
        except CachefsError as error:
            logger.info("filling stopped block=%s error=%s", job.block.filename, error)

    async def seal(self, job: Job) -> None:
        """Return when the block, of which every page is present, is sealed.

        Raises BlockCorruptError when a page read back is not what was written (the partial is gone then), and
        CapacityError.
        """
        if not job.partial.sealed:
            await self._seals.join(job.partial.serial, lambda: self._seal(job))

    async def keep_whole(self, block: BlockId, source: Source, promote: Promote, *, loading: bool = False) -> None:
        """As `keep_files`, of one. `loading`: in the slots of those that nobody waits to read.

        Raises as `fetch` and `seal`.
        """
        async with self._load if loading else self._demand:
            (error,) = await self.keep_files([(block, source)], promote, at_once=1)
        if error is not None:
            raise error

    async def keep_files(
        self,
        wanted: Sequence[tuple[BlockId, Source]],
        promote: Promote,
        *,
        at_once: int,
        claim: Claim = lambda number: True,
        on_kept: Callable[[int], None] = lambda number: None,
    ) -> list[Exception | None]:
        """Fetch contents of at most one page each, of one under-store, and seal them: all that the disk has to do for
        one in one go, and in the thread that gets the bytes. Most of what a small file costs are wake-ups of threads.

        `claim` as of `UnderStore.read_files`; `on_kept` is called with the number of each that is sealed, at once. The
        caller bounds how many there are. Returns what kept each from being kept: errors as of `fetch` and `seal`.
        """
        token = trio.lowlevel.current_trio_token()
        began: dict[int, float] = {}

        def claimed(number: int) -> bool:
            began[number] = perf_counter()
            return claim(number)

        def kept(number: int, length: int, seconds: float, sealed: bool) -> None:
            self._counters.under_store_times.observe("file", seconds)
            self._counters.under_store_reads += 1
            self._counters.under_store_bytes += length
            if sealed:
                self._counters.pages_fetched += 1
                self._counters.blocks_sealed += 1
                self._on_sealed(wanted[number][0], length)
                on_kept(number)

        def keep(number: int, data: Data) -> None:
            seconds = perf_counter() - began[number]
            sealed = False
            try:
                self._keep(wanted[number][0], data, promote)
                sealed = True
            finally:
                token.run_sync_soon(kept, number, len(data), seconds, sealed)

        outcomes = await self._sources.read_files([source for _, source in wanted], keep, at_once, claimed)
        for number, error in enumerate(outcomes):
            if isinstance(error, (ContentChangedError, NotFoundError)):
                outcomes[number] = await self._changed(wanted[number][1], error)
            elif isinstance(error, BlockCorruptError):
                self._counters.corrupt += 1
        return outcomes

    def _keep(self, block: BlockId, data: bytes | bytearray | memoryview, promote: Promote) -> None:
        partial = self._store.open_partial(block, len(data), promote)
        if partial is None:
            return
        try:
            if partial.page_count:
                self._write(partial, 0, data)
            self._seal_now(partial)
        finally:
            self._store.close(partial)

    def _write(self, partial: Partial, page: int, data: bytes | bytearray | memoryview) -> None:
        # The checksum is made here, where the bytes enter, and nowhere else.
        with self._failing(partial):
            partial.write_page(page, data, page_checksum(data))

    def _seal_now(self, partial: Partial) -> None:
        with self._failing(partial):
            self._store.seal(partial)

    @contextmanager
    def _failing(self, partial: Partial) -> Iterator[None]:
        """A disk that fails is as good as a full one: what was to be kept is not."""
        try:
            yield
        except OSError as error:
            self._store.failed(partial, error)
            raise CapacityError(f"{partial.block.filename}: the tier fails: {error}") from error

    async def _seal(self, job: Job) -> None:
        try:
            await trio.to_thread.run_sync(self._seal_now, job.partial, limiter=self._disk)
        except BlockCorruptError:
            self._counters.corrupt += 1
            job.ended = True
            raise
        self._counters.blocks_sealed += 1
        self._on_sealed(job.block, job.partial.length)

    async def _join(self, job: Job, page: int, slots: trio.CapacityLimiter) -> None:
        await self._pages.join((job.partial.serial, page), lambda: self._fetch(job, page, slots))

    async def _fetch_quietly(self, job: Job, page: int) -> None:
        # Waiters that joined get the error; with none, it is the next reader's turn to find out.
        await self._fetch(job, page, self._background)

    async def _fetch(self, job: Job, page: int, slots: trio.CapacityLimiter) -> None:
        async with slots:
            if job.partial.has(page):
                return
            offset, length = job.partial.page_span(page)
            data = await self.read(job.source, job.content_offset + offset, length)
            await trio.to_thread.run_sync(self._write, job.partial, page, data, limiter=self._disk)
            self._counters.pages_fetched += 1

    async def read_for_reader(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """As `read`, in a slot of those that readers wait for: what is in memory at once stays bounded."""
        async with self._demand:
            return await self.read(source, offset, length)

    async def read(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """One range from the under-store, counted; a changed object is reported. Raises as `Sources.read`."""
        began = perf_counter()
        try:
            data = await self._sources.read(source, offset, length)
        except (ContentChangedError, NotFoundError) as error:
            raise await self._changed(source, error) from error
        self._counters.under_store_reads += 1
        self._counters.under_store_bytes += length
        self._counters.under_store_times.observe("range", perf_counter() - began)
        return data

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


def _first(group: BaseExceptionGroup[CachefsError]) -> CachefsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, CachefsError)
    return error
