"""Blocks that are being filled: from the first page somebody asks for to the seal.

A `Job` owns one open partial. It ends when the block is sealed, when the content turns out to be gone, or when nobody
has asked for it for a while; what a partial has on disk survives that.

    ask -> pages missing?  -> fetch each once (single-flight per page; readers first, then read-ahead and filling),
                              from another worker or the under-store, as `Supply` says
                           -> write into the partial, with the checksum made from what the under-store sent
           all present?    -> seal once: every page is read back and compared, then renamed into place

A page that is found to be damaged, when it is sealed or before somebody is told that it can be read, is a miss: it is
absent from then on, and fetched again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import trio

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, CachefsError, CapacityError
from cachefs.net import Flights
from cachefs.policy import Promote, Readahead, ReadaheadConfig
from cachefs.store import NotCompleteError, Partial, Store, page_checksum
from cachefs.store.blame import is_of_the_medium
from cachefs.ufs.files import Claim, Data
from cachefs.worker.counters import Counters
from cachefs.worker.origin import Origin
from cachefs.worker.slots import SLOT_BYTES, Slots
from cachefs.worker.supply import Route, Supply

logger = logging.getLogger(__name__)

_SEAL_ATTEMPTS = 3


class Job:
    """One block being filled."""

    def __init__(self, partial: Partial, route: Route) -> None:
        self.partial = partial
        self.route = route
        self.last_asked = trio.current_time()
        self.users = 0
        self.arriving = 0
        """Pages that are being fetched, whether somebody waits for them or not: its files stay open for them."""
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
    def in_use(self) -> bool:
        """It may be sealed, though nobody else joins it."""
        return self.users > 0 or self.filling

    def touch(self) -> None:
        """Somebody else than a reader of this node asks for it."""
        self.last_asked = trio.current_time()

    @property
    def worth_filling(self) -> bool:
        """Somebody reads it, rather than having looked at its head only (`file`, `head`): fetch the rest as well."""
        return len(self._demanded) > 1 or self.partial.page_count <= 2


class _Damaged(Exception):
    """A page that another worker sent does not match its checksum."""


class Filler:
    """Fetches pages into partials, and seals. Tasks run in `nursery`."""

    def __init__(
        self,
        store: Store,
        origin: Origin,
        supply: Supply,
        counters: Counters,
        *,
        demand_slots: int,
        background_slots: int,
        load_slots: int,
        on_sealed: Callable[[BlockId, int], None],
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._origin = origin
        self._supply = supply
        self._counters = counters
        self._nursery = nursery
        self.demand = Slots(demand_slots, demand_slots * SLOT_BYTES)
        """Reads of the under-store that somebody waits for."""
        self.background = Slots(background_slots, background_slots * SLOT_BYTES)
        self.load = Slots(load_slots, load_slots * SLOT_BYTES)
        self._disk = trio.CapacityLimiter(4)
        self._pages: Flights[tuple[int, int], None] = Flights(nursery)
        self._seals: Flights[int, None] = Flights(nursery)
        self._compared: Flights[tuple[int, int], bool] = Flights(nursery)
        self._on_sealed = on_sealed
        self.sealing = 0
        """Blocks, whether somebody waits for them still or not."""

    @property
    def slots(self) -> dict[str, Slots]:
        """What is fetched at once, by who waits for it."""
        return {"demand": self.demand, "background": self.background, "load": self.load}

    async def fetch(self, job: Job, pages: Iterable[int], *, loading: bool = False) -> None:
        """Return when all these pages are present. `loading`: in the slots of those that nobody waits to read.

        Raises ContentChangedError, NotFoundError, UnderStoreError and its kinds, CapacityError. Cancelling gives up
        what nobody else waits for.
        """
        missing = [page for page in pages if not job.partial.has(page)]
        if len(missing) == 1:
            await self._join(job, missing[0], self.load if loading else self.demand)
        elif missing:
            try:
                async with trio.open_nursery() as nursery:
                    for page in missing:
                        nursery.start_soon(self._join, job, page, self.load if loading else self.demand)
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
            for attempt in range(_SEAL_ATTEMPTS):
                for page in list(job.partial.missing()):
                    if not job.partial.has(page):
                        await self._join(job, page, self.background)
                try:
                    await self.seal(job)
                    return
                except BlockCorruptError as error:
                    last = attempt + 1 == _SEAL_ATTEMPTS
                    what = "not filled, its tier damages what is written" if last else "fetching again"
                    logger.warning("%s block=%s attempt=%d error=%s", what, job.block.filename, attempt, error)
        except CachefsError as error:
            logger.info("filling stopped block=%s error=%s", job.block.filename, error)

    async def compare(self, partial: Partial, page: int) -> bool:
        """Read a page that was present a moment ago back, unless that was just done; whether it is what was written. If
        not, it is absent, unless the block is sealed.

        Raises OSError when it cannot be read.
        """
        if not partial.is_fresh(page):
            return await self._compared.join((partial.serial, page), lambda: self._compare(partial, page))
        return True

    async def _compare(self, partial: Partial, page: int) -> bool:
        try:
            good = await trio.to_thread.run_sync(partial.compare, page, limiter=self._disk)
        except BlockMissingError:
            return False
        except OSError as error:
            if is_of_the_medium(error):
                self._store.failed(partial, error, reading=True)
            raise
        if not good:
            self._tell_damaged(partial, page)
        return good

    def _tell_damaged(self, partial: Partial, page: int) -> None:
        self._counters.corrupt += 1
        logger.warning(
            "page of an incomplete file is damaged, fetched anew block=%s page=%d", partial.block.filename, page
        )

    async def seal(self, job: Job) -> None:
        """Return when the block, of which every page is present, is sealed.

        Raises BlockCorruptError when a page read back is not what was written (it is absent then, or the partial is
        gone), and CapacityError.
        """
        if not job.partial.sealed:
            await self._seals.join(job.partial.serial, lambda: self._seal(job))

    async def keep_whole(self, route: Route, promote: Promote, *, loading: bool = False) -> None:
        """As `keep_files`, of one. `loading`: in the slots of those that nobody waits to read.

        Raises as `fetch` and `seal`.
        """
        slots = self.load if loading else self.demand
        if not self._supply.is_first_copy(route):
            await self._keep_from_workers(route, promote, slots)
            return
        async with slots.one(route.source.attr.size_bytes, route.source.ufs.origin):
            (error,) = await self.keep_files([route], promote, at_once=1)
        if error is not None:
            raise error

    async def keep_files(
        self,
        routes: Sequence[Route],
        promote: Promote,
        *,
        at_once: int,
        claim: Claim = lambda number: True,
        on_kept: Callable[[int], None] = lambda number: None,
    ) -> list[Exception | None]:
        """Fetch contents of at most one page each, of one under-store, and seal them: all that the disk has to do for
        one in one go, and in the thread that gets the bytes. Most of what a small file costs are wake-ups of threads.

        `claim` as of `UnderStore.read_files`; `on_kept` is called with the number of each that is sealed, at once. The
        caller bounds how many there are, and ends the routes. Returns what kept each from being kept: errors as of
        `fetch` and `seal`.
        """
        outcomes: list[Exception | None] = [None] * len(routes)
        ours = [number for number, route in enumerate(routes) if self._supply.is_first_copy(route)]
        others = [number for number, route in enumerate(routes) if not self._supply.is_first_copy(route)]

        async def from_under_store() -> None:
            found = await self._keep_from_under_store(
                [routes[number] for number in ours],
                promote,
                at_once,
                lambda number: claim(ours[number]),
                lambda number: on_kept(ours[number]),
            )
            for number, error in zip(ours, found, strict=True):
                outcomes[number] = error

        async def from_workers(numbers: Iterator[int]) -> None:
            for number in numbers:
                if claim(number):
                    try:
                        await self._keep_from_workers(routes[number], promote, self.background)
                        on_kept(number)
                    except CachefsError as error:
                        outcomes[number] = error

        if not others:
            await from_under_store()
            return outcomes
        async with trio.open_nursery() as nursery:
            if ours:
                nursery.start_soon(from_under_store)
            numbers = iter(others)
            for _ in range(min(at_once, len(others))):
                nursery.start_soon(from_workers, numbers)
        return outcomes

    async def _keep_from_under_store(
        self, routes: Sequence[Route], promote: Promote, at_once: int, claim: Claim, on_kept: Callable[[int], None]
    ) -> list[Exception | None]:
        token = trio.lowlevel.current_trio_token()
        began: dict[int, float] = {}

        def claimed(number: int) -> bool:
            began[number] = perf_counter()
            return claim(number)

        def kept(number: int, length: int, seconds: float, sealed: bool) -> None:
            self._origin.count("file", length, seconds)
            if sealed:
                self._counters.pages_fetched += 1
                self._count_sealed(routes[number].block, length)
                on_kept(number)

        def keep(number: int, data: Data) -> None:
            seconds = perf_counter() - began[number]
            sealed = False
            try:
                self._keep(routes[number].block, data, None, promote)
                sealed = True
            finally:
                token.run_sync_soon(kept, number, len(data), seconds, sealed)

        outcomes = await self._origin.read_files([route.source for route in routes], keep, at_once, claimed)
        self._counters.corrupt += sum(isinstance(error, BlockCorruptError) for error in outcomes)
        return outcomes

    async def _keep_from_workers(self, route: Route, promote: Promote, slots: Slots) -> None:
        length = route.source.attr.size_bytes
        while True:
            async with self._supply.page(route, 0, length, slots) as page:
                try:
                    await trio.to_thread.run_sync(
                        self._keep, route.block, page.data, page.checksum, promote, limiter=self._disk
                    )
                    break
                except _Damaged:
                    pass
            await self._supply.damaged(route, page)
        self._counters.pages_fetched += 1
        self._count_sealed(route.block, length)

    def _count_sealed(self, block: BlockId, length: int) -> None:
        self._counters.blocks_sealed += 1
        self._on_sealed(block, length)

    def _keep(self, block: BlockId, data: Data, checksum: int | None, promote: Promote) -> None:
        partial = self._store.open_partial(block, len(data), promote)
        if partial is None:
            return
        try:
            if partial.page_count:
                self._write(partial, 0, data, checksum)
            self._seal_now(partial)
        finally:
            self._store.close(partial)

    def _write(self, partial: Partial, page: int, data: Data, checksum: int | None) -> None:
        """Without a checksum that came with the bytes, they are from the under-store: it is made here, where they
        enter, and nowhere else.
        """
        found = page_checksum(data)
        if checksum is not None and checksum != found:
            raise _Damaged
        with self._failing(partial):
            partial.write_page(page, data, found)

    def _recall(self, partial: Partial, page: int) -> None:
        if not partial.recall(page) and not partial.remembers(page):
            self._tell_damaged(partial, page)

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
        self.sealing += 1
        try:
            await trio.to_thread.run_sync(self._seal_now, job.partial, limiter=self._disk)
            self._count_sealed(job.block, job.partial.length)
        except BlockCorruptError as error:
            self._counters.corrupt += not isinstance(error, NotCompleteError)
            job.ended = job.ended or job.partial.dropped
            raise
        finally:
            self.sealing -= 1

    async def _join(self, job: Job, page: int, slots: Slots) -> None:
        await self._pages.join((job.partial.serial, page), lambda: self._fetch(job, page, slots))

    async def _fetch_quietly(self, job: Job, page: int) -> None:
        # Waiters that joined get the error; with none, it is the next reader's turn to find out.
        await self._fetch(job, page, self.background)

    async def _fetch(self, job: Job, page: int, slots: Slots) -> None:
        job.arriving += 1
        try:
            await self._fetch_page(job, page, slots)
        finally:
            job.arriving -= 1

    async def _fetch_page(self, job: Job, page: int, slots: Slots) -> None:
        offset, length = job.partial.page_span(page)
        if job.partial.remembers(page):
            await trio.to_thread.run_sync(self._recall, job.partial, page, limiter=self._disk)
        while not job.partial.has(page):
            async with self._supply.page(job.route, offset, length, slots) as got:
                try:
                    await trio.to_thread.run_sync(
                        self._write, job.partial, page, got.data, got.checksum, limiter=self._disk
                    )
                    self._counters.pages_fetched += 1
                    return
                except _Damaged:
                    pass
            await self._supply.damaged(job.route, got)


def _first(group: BaseExceptionGroup[CachefsError]) -> CachefsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, CachefsError)
    return error
