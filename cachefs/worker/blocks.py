"""What mounts ask of a worker: make a content local, make a range readable.

its reader's disk fails?  ----------------> the bytes themselves, and what cannot be read is dropped
sealed?  suspect?  ------------------------> the sealed file's descriptor
admitted?  (policy, then room in the tier) -> a job fills a partial; the partial's descriptor, page by page
otherwise                                  -> the bytes themselves, through a small buffer in memory
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import trio

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, CapacityError, Geometry, Ino, LogLimiter
from cachefs.net import Answer, Flights, Session
from cachefs.policy import Promote
from cachefs.store import Partial, SealedReader, Store, Tier
from cachefs.store.blame import is_of_the_process
from cachefs.store.sums import Sums
from cachefs.ufs.files import Claim
from cachefs.wire.cluster import Unsettled
from cachefs.wire.messages import BlockStatus, Fetch, FetchReply, FreeReply, PromoteReply
from cachefs.wire.messages import Promote as PromoteRequest
from cachefs.worker.admission import Admission
from cachefs.worker.checked import CheckedReads
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.jobs import Filler, Job
from cachefs.worker.prefetch import Prefetch
from cachefs.worker.read_through import ReadThrough
from cachefs.worker.sources import Source, Sources
from cachefs.worker.supply import Supply
from cachefs.worker.suspects import Suspects

logger = logging.getLogger(__name__)

_SEALED_SERIALS = itertools.count(-1, -1)
"""For descriptors of sealed files; those of partials are positive."""
READER_PATIENCE_S = 3.0
"""For the master to say what a reader asks for: he asks again, for as long as he was told to wait."""
_ATTEMPTS = 3


class Blocks:
    """Called from one trio thread; `nursery` has what runs in the background."""

    def __init__(
        self,
        config: WorkerConfig,
        geometry: Geometry,
        store: Store,
        suspects: Suspects,
        checked: CheckedReads,
        sources: Sources,
        filler: Filler,
        supply: Supply,
        admission: Admission,
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._store = store
        self._suspects = suspects
        self._checked = checked
        self._sources = sources
        self._filler = filler
        self._supply = supply
        self._admission = admission
        self._counters = counters
        self._nursery = nursery
        self._log = LogLimiter(logger)
        self._sealed_files = SealedReader(store.paths)
        self._jobs: dict[BlockId, Job] = {}
        self._opening: Counter[BlockId] = Counter()
        """Those that will have a job, once they are admitted and their files are made: nobody else fetches them."""
        self._admitting = 0
        """What was asked to be admitted, or was and has no job, and has not ended."""
        self._doubted: set[BlockId] = set()
        """Sealed blocks that a reader could not read, while they are looked at: nobody is sent there meanwhile."""
        self._whole: Flights[BlockId, bool] = Flights(nursery)
        self._disk = trio.CapacityLimiter(4)
        self._looking = trio.CapacityLimiter(1)
        self._prefetch = Prefetch(
            config, sources, self._has_room, self._is_worth_fetching, self._keep_ahead, counters, nursery
        )
        pages = max(1, config.read_through_bytes // geometry.page_size)
        self._read_through = ReadThrough(supply, filler.demand, geometry, pages, nursery)

    # ---- requests --------------------------------------------------------------------------------------------------

    async def promote(self, request: PromoteRequest, reader: int) -> PromoteReply:
        """Make a content of one block local; not sealed means not admitted. `reader` tells one mount from another.

        Raises as `Filler.fetch`.
        """
        source = await self._sources.resolve(request.ino, None if request.background else READER_PATIENCE_S)
        mode = self._mode(request, source)
        attr = source.attr
        if not attr.key or self._geometry.block_count(attr.size_bytes) > 1:
            return PromoteReply(False)
        if not request.background and mode is not Promote.NEVER:
            self._prefetch.asked((reader, request.reader), source)
        block = BlockId(attr.key, 0)
        if not request.background:
            self._counters.asked(attr.size_bytes, is_here=self._store.is_sealed(block))
        if await self.keep(block, source, mode, background=request.background, patient=request.background):
            return PromoteReply(True)
        return PromoteReply(False, self.why_not(block))

    def why_not(self, block: BlockId) -> str:
        """Why a block was not kept, where that is not just for want of room in the tiers."""
        return self._admission.why_not(block)

    @property
    def keeps(self) -> bool:
        """It was not told to keep nothing."""
        return self._config.promote is not Promote.NEVER

    async def keep(
        self,
        block: BlockId,
        source: Source,
        mode: Promote,
        *,
        background: bool,
        patient: bool = False,
        for_others: bool = False,
    ) -> bool:
        """Make a block local; False means not admitted. Raises as `Filler.fetch`.

        `patient`: it may wait for room in a quota, which nobody does who has a reader waiting, nor waits for together
        with one. `for_others`: no reader of this node asks for it.
        """
        if not patient or block in self._jobs or await self.is_sealed(block):
            return await self._keep(block, source, mode, background=background, for_others=for_others)
        has_room = await self._admission.wait_for_room(block, source, mode)
        try:
            return await self._keep(block, source, mode, background=background, for_others=for_others)
        finally:
            if has_room:
                self._admission.stop_waiting(block)

    async def _keep(self, block: BlockId, source: Source, mode: Promote, *, background: bool, for_others: bool) -> bool:
        is_small = self._is_small(source)
        for attempt in range(_ATTEMPTS):
            if await self.is_sealed(block):
                return True
            if await self._prefetch.join(block) and self._store.is_sealed(block):
                return True
            if is_small and block not in self._jobs and block not in self._opening:
                try:
                    if not await self._whole.join(
                        block,
                        lambda: self._keep_whole(block, source, mode, loading=background, for_others=for_others),
                    ):
                        return False
                except BlockMissingError:
                    # Wanted by others from a worker that has it no more, or given up meanwhile.
                    if attempt + 1 == _ATTEMPTS:
                        raise
                except BlockCorruptError as error:
                    logger.warning("fetching again block=%s attempt=%d error=%s", block.filename, attempt, error)
                except CapacityError as error:
                    self._counters.not_admitted += 1
                    self._admission.note_refusal(block, source)
                    self._log.log(logging.INFO, "not kept", "not kept block=%s error=%s", block.filename, error)
                    return False
                continue
            job = await self._job(block, source, mode, for_others=for_others)
            if job is None:
                if self._store.is_sealed(block):
                    continue
                return False
            job.users += 1
            try:
                await self._filler.fetch(job, range(job.partial.page_count), loading=background)
                await self._filler.seal(job)
                return True
            except BlockMissingError:
                # The same, or given up meanwhile because its disk cannot be read.
                if attempt + 1 == _ATTEMPTS:
                    raise
            except BlockCorruptError as error:
                # What was read back is not what was written, and is gone: once more, from the under-store.
                logger.warning("fetching again block=%s attempt=%d error=%s", block.filename, attempt, error)
            except CapacityError as error:
                self._admission.note_refusal(block, source)
                self._log.log(logging.INFO, "not kept", "not kept block=%s error=%s", block.filename, error)
                return False
            finally:
                job.users -= 1
                self._end_if_done(job)
        if self._store.is_sealed(block):
            return True
        raise BlockCorruptError(f"{block.filename}: the tier damages what is written to it")

    async def fetch(self, request: Fetch, session: Session) -> Answer[FetchReply]:
        """Make a range readable. Raises as `Filler.fetch`."""
        reader = session.id
        source = await self._sources.resolve(request.ino, READER_PATIENCE_S)
        key, size = source.attr.key, source.attr.size_bytes
        length = self._geometry.block_length(size, request.block_index)
        if request.offset < 0 or request.length <= 0 or request.offset + request.length > length:
            raise BlockCorruptError(f"range {request.offset}+{request.length} lies outside of a block of {length}")
        pages = self._geometry.pages_covering(request.offset, request.length)
        self._counters.asked(request.length, is_here=self._has(BlockId(key, request.block_index), pages))
        if key:
            block = BlockId(key, request.block_index)
            if request.unreadable:
                self._doubt(block, request.held)
            elif request.offset == 0 and self._mode(request, source) is not Promote.NEVER:
                self._prefetch.asked((reader, 0), source)
            for _ in range(_ATTEMPTS):
                if request.unreadable or block in self._doubted:
                    break
                if await self.is_sealed(block):
                    self._sealed_files.avoid(self._store.down)
                    try:
                        fd = self._sealed_files.find(block, length)
                    except OSError as error:
                        self._log.log(
                            logging.INFO, "open", "cannot be opened now block=%s error=%s", block.filename, error
                        )
                        break
                    if fd is not None:
                        self._store.visited(block)
                        return self._confirm_sealed(fd, length)
                    # Its files are not what the index says.
                    await trio.to_thread.run_sync(self._store.drop, block, limiter=self._disk)
                if await self._prefetch.join(block) and self._store.is_sealed(block):
                    continue
                if block in self._whole:
                    with suppress(BlockCorruptError, CapacityError):
                        await self._whole.join(block, _nothing)
                    continue
                job = await self._job(block, source, self._mode(request, source))
                if job is not None:
                    try:
                        return await self._fetch_into(job, pages, request.held, reader)
                    except BlockMissingError:
                        # Given up meanwhile, because its disk cannot be read.
                        continue
                    except CapacityError as error:
                        # The disk filled up under us, or fails: the reader gets its bytes all the same.
                        self._counters.not_admitted += 1
                        self._log.log(logging.INFO, "not kept", "not kept block=%s error=%s", block.filename, error)
                        break
                if not self._store.is_sealed(block):
                    break
        content_offset = request.block_index * self._geometry.block_size + request.offset
        # However many ask at once and do not read: they get one answer after the other.
        room = await session.room_for_payload(request.length, source.ufs.origin)
        try:
            data = await self._read_through.read(source, content_offset, request.length, reader)
        except BaseException:
            room.give_back()
            raise
        room.made()
        return Answer(FetchReply(0, []), data, on_sent=room.give_back)

    def _has(self, block: BlockId, pages: range) -> bool:
        job = self._jobs.get(block)
        return self._store.is_sealed(block) or (job is not None and all(map(job.partial.has, pages)))

    def opened(self, blocks: list[BlockId], reader: int) -> bool:
        """A mount tells what it has opened sealed, some while ago. Returns whether files are fetched ahead of it."""
        for block in blocks:
            self._store.visited(block)
        return self._prefetch.opened(blocks)

    def status(self, block: BlockId) -> BlockStatus:
        job = self._jobs.get(block)
        if job is not None and not job.partial.sealed:
            partial = job.partial
            present = sum(partial.page_span(page)[1] for page in range(partial.page_count) if partial.has(page))
            return _block_status(self._store.tier_of(partial), present)
        for tier in self._store.tiers:
            held = tier.held_bytes(block)
            if held:
                return _block_status(tier, held)
        return BlockStatus("", 0)

    async def free(self, blocks: list[BlockId]) -> FreeReply:
        """Drop sealed blocks that nobody reads, and that are not pinned."""

        def free() -> FreeReply:
            freed = freed_bytes = in_use = pinned = 0
            for block in blocks:
                size = self._store.held_bytes(block)
                if not size:
                    continue
                if self._store.is_pinned(block):
                    pinned += 1
                elif self._store.evict(block):
                    freed, freed_bytes = freed + 1, freed_bytes + size
                else:
                    in_use += 1
            return FreeReply(freed, freed_bytes, in_use, pinned)

        return await trio.to_thread.run_sync(free, limiter=self._disk)

    # ---- ahead of readers ------------------------------------------------------------------------------------------

    def _has_room(self, length: int) -> bool:
        """Without evicting anything: nobody has asked for it yet."""
        return self.keeps and self._admission.has_room(length)

    def _is_small(self, source: Source) -> bool:
        """It is one page, and so one block, or nothing."""
        return self._geometry.page_count(source.attr.size_bytes) <= 1

    def _is_worth_fetching(self, source: Source) -> bool:
        """Whether it is a small content that is not here, nor on its way."""
        block = BlockId(source.attr.key, 0)
        is_here = self._store.is_sealed(block) or block in self._suspects
        is_coming = block in self._jobs or block in self._opening or block in self._whole
        return self._is_small(source) and not is_here and not is_coming

    async def _keep_ahead(
        self, wanted: Sequence[tuple[BlockId, Source]], claim: Claim, on_kept: Callable[[int], None]
    ) -> list[Exception | None]:
        """Contents that nobody waits for: nothing is evicted for them."""
        slots = max(1, self._config.ahead_slots)
        outcomes: list[Exception | None] = [CapacityError("not admitted")] * len(wanted)
        with self._under_way():
            routes = await self._admission.routes(wanted, Promote.IF_SPACE)
            numbers = [number for number, route in enumerate(routes) if route is not None]
            admitted = [route for route in routes if route is not None]
            if not admitted:
                return outcomes
            try:
                found = await self._filler.keep_files(
                    admitted,
                    Promote.IF_SPACE,
                    at_once=slots,
                    claim=lambda number: claim(numbers[number]),
                    on_kept=lambda number: on_kept(numbers[number]),
                )
            finally:
                for route in admitted:
                    self._supply.end(route)
        for number, error in zip(numbers, found, strict=True):
            outcomes[number] = error
        return outcomes

    # ---- for other workers -----------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return self._geometry.page_size

    def partial(self, block: BlockId) -> Partial | None:
        """Of a block that is being filled."""
        job = self._jobs.get(block)
        return job.partial if job is not None and not job.partial.dropped else None

    def is_coming(self, block: BlockId) -> bool:
        """Whether it is being fetched, or is to be."""
        return (
            block in self._jobs
            or block in self._opening
            or block in self._whole
            or self._prefetch.is_coming(block)
            or self._supply.has_lease(block)
        )

    async def fetch_for_worker(self, block: BlockId, ino: Ino, offset: int) -> None:
        """Make the page at that offset of a block present, and keep it, as for a reader of this node. Raises as
        `Filler.fetch`; CapacityError when it is not admitted.
        """
        source = await self._sources.resolve(ino)
        if source.attr.key != block.key:
            raise BlockMissingError(f"{block.filename}: inode {ino} is another content")
        mode = self._mode_for_workers(source)
        if self._is_small(source):
            if not await self.keep(block, source, mode, background=True, for_others=True):
                raise CapacityError(f"{block.filename}: not admitted")
            return
        job = await self._job(block, source, mode, for_others=True)
        if job is None:
            if self._store.is_sealed(block):
                return
            raise CapacityError(f"{block.filename}: not admitted")
        job.users += 1
        try:
            job.touch()
            await self._filler.fetch(job, [offset // self._geometry.page_size])
            self._fill_soon(job)
        finally:
            job.users -= 1
            self._end_if_done(job)

    def _mode_for_workers(self, source: Source) -> Promote:
        """Nothing of what this node's own readers use is evicted for others, but for what is pinned."""
        return self._pinned_first(Promote.IF_SPACE if self.keeps else Promote.NEVER, source)

    def doubt(self, block: BlockId) -> None:
        """Another worker got damaged bytes of it."""
        partial = self.partial(block)
        if partial is not None:
            # Compared before anybody is told again that a page of it is here.
            partial.distrust()
        if self._store.is_sealed(block):
            self._doubt(block, 0)

    async def is_good(self, partial: Partial, page: int) -> bool:
        """Whether a page is present, and what was written, as of a moment ago. One that is damaged is absent now; a
        file that cannot be read is looked at.
        """
        job = self._jobs.get(partial.block)
        if job is None or job.partial is not partial or not partial.has(page):
            return False
        if partial.is_fresh(page):
            return True
        job.users += 1
        try:
            good = await self._filler.compare(partial, page)
            if not good and partial.sealed:
                await self.drop_damaged(partial.block, f"page {page} is not what was written")
            return good
        except OSError as error:
            logger.info("cannot be compared now block=%s page=%d error=%s", partial.block.filename, page, error)
            if not is_of_the_process(error):
                self._doubt(partial.block, partial.serial)
            return False
        finally:
            job.users -= 1
            self._end_if_done(job)

    async def known_of(self, request: Fetch, serial: int) -> tuple[BlockId, Sums | Partial]:
        """What was confirmed by `fetch`, and the checksums of its pages. Raises as `CheckedReads.sums_of`."""
        source = await self._sources.resolve(request.ino)
        block = BlockId(source.attr.key, request.block_index)
        job = self._jobs.get(block)
        if job is not None and job.partial.serial == serial:
            return block, job.partial
        return block, await self._checked.sums_of(block)

    async def found_damaged(self, block: BlockId, known: Sums | Partial, pages: range, error: Exception) -> None:
        """What was confirmed is not what was written: it is fetched again by whoever wants it next."""
        if isinstance(known, Partial) and not known.sealed:
            known.distrust()
            for page in pages:
                await self.is_good(known, page)
        else:
            await self.drop_damaged(block, error)

    async def drop_damaged(self, block: BlockId, error: object) -> None:
        """A sealed block was found to be damaged while it was read: it is fetched again by whoever wants it next."""
        if self._store.is_sealed(block):
            logger.warning("block dropped, it is damaged block=%s error=%s", block.filename, error)
            self._counters.corrupt += 1
            await trio.to_thread.run_sync(self._store.drop, block, limiter=self._disk)

    # ---- sealed ----------------------------------------------------------------------------------------------------

    async def is_sealed(self, block: BlockId) -> bool:
        if block in self._suspects:
            return await self._suspects.restore(block, self._disk)
        return self._store.is_sealed(block)

    def _confirm_sealed(self, fd: int, length: int) -> Answer[FetchReply]:
        everything = [(0, self._geometry.page_count(length))]
        return Answer(FetchReply(next(_SEALED_SERIALS), everything), b"", (fd,), close_fds=True)

    # ---- what cannot be read ---------------------------------------------------------------------------------------

    def _doubt(self, block: BlockId, serial: int) -> None:
        """A reader's disk failed on the descriptor of that serial."""
        if block not in self._doubted:
            self._doubted.add(block)
            self._nursery.start_soon(self._look_at, block, serial)

    async def _look_at(self, block: BlockId, serial: int) -> None:
        """In the background: reading a whole block takes a while, and the reader has its bytes from elsewhere."""
        try:
            job = self._jobs.get(block)
            if job is not None and not job.ended and job.partial.serial == serial:
                await self._give_up(job)
            if not await trio.to_thread.run_sync(lambda: self._store.check(block, as_read=True), limiter=self._looking):
                logger.warning("block dropped, its reader cannot read it block=%s", block.filename)
                self._counters.corrupt += 1
                await trio.to_thread.run_sync(self._store.drop, block, limiter=self._disk)
        finally:
            self._doubted.discard(block)

    async def _give_up(self, job: Job) -> None:
        """What cannot be read back is not worth being resumed. Sealed meanwhile, it is checked like any other."""
        job.ended = True
        job.users += 1
        try:
            await trio.to_thread.run_sync(self._store.give_up, job.partial, limiter=self._looking)
        finally:
            job.users -= 1
            self._end_if_done(job)
        if job.partial.dropped:
            logger.warning("partial dropped, its reader cannot read it block=%s", job.block.filename)
            self._counters.corrupt += 1

    # ---- filling ---------------------------------------------------------------------------------------------------

    def unsettled(self) -> Unsettled:
        """What may be sealed yet once this worker takes no new blocks: what it was admitting or filling before, and
        blocks of an earlier boot that the scrub has not looked at.
        """
        filling = [job for job in self._jobs.values() if job.in_use]
        blocks = len(filling) + self._filler.sealing + self._admitting
        if self._config.scrub_bytes_per_s:
            blocks += self._suspects.left
        return Unsettled(blocks, sum(job.partial.unwritten_bytes for job in filling))

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self._admitting += 1
        try:
            yield
        finally:
            self._admitting -= 1

    async def _job(self, block: BlockId, source: Source, mode: Promote, *, for_others: bool = False) -> Job | None:
        """The job that fills a block, or a new one; None when it is not admitted, or sealed in this very moment. To be
        used without a checkpoint in between.
        """
        with self._under_way():
            return await self._find_job(block, source, mode, for_others)

    async def _find_job(self, block: BlockId, source: Source, mode: Promote, for_others: bool) -> Job | None:
        job = self._jobs.get(block)
        if job is not None and job.partial.dropped:
            # It was begun while its partial was being given up.
            job.ended = True
            self._end_if_done(job)
        if job is not None and not job.ended:
            if not job.in_use and not self._admission.takes_blocks:
                # Whatever nobody fills any more when this worker is to go stays as it is.
                return None
            # The same content; under another namespace its object has another number to report a change by.
            job.route.source = source
            return job
        self._opening[block] += 1
        try:
            return await self._make_job(block, source, mode, for_others)
        finally:
            self._opening[block] -= 1
            if not self._opening[block]:
                del self._opening[block]

    async def _make_job(self, block: BlockId, source: Source, mode: Promote, for_others: bool) -> Job | None:
        length = self._geometry.block_length(source.attr.size_bytes, block.block_index)
        route = await self._admission.route(block, source, mode, for_others=for_others)
        if route is None:
            return None
        try:
            partial = await trio.to_thread.run_sync(self._store.open_partial, block, length, mode, limiter=self._disk)
        except CapacityError as error:
            self._counters.not_admitted += 1
            self._admission.note_refusal(block, source)
            self._log.log(logging.INFO, "refused", "not admitted block=%s error=%s", block.filename, error)
            self._supply.end(route)
            return None
        except BaseException:
            self._supply.end(route)
            raise
        if partial is None:
            self._supply.end(route)
            return None
        other = self._jobs.get(block)
        if other is not None and not other.ended:
            # Somebody was faster while we were in the thread.
            self._store.close(partial)
            self._supply.end(route)
            return other
        job = self._jobs[block] = Job(partial, route)
        return job

    async def _keep_whole(
        self, block: BlockId, source: Source, mode: Promote, *, loading: bool, for_others: bool
    ) -> bool:
        """Whether it was admitted; then it is sealed. Raises as `Filler.keep_whole`."""
        with self._under_way():
            route = await self._admission.route(block, source, mode, for_others=for_others)
            if route is None:
                return False
            try:
                await self._filler.keep_whole(route, mode, loading=loading)
            finally:
                self._supply.end(route)
            return True

    def _mode(self, request: Fetch | PromoteRequest, source: Source) -> Promote:
        mode = self._config.promote if request.promote is None else Promote(request.promote)
        return self._pinned_first(mode, source)

    def _pinned_first(self, mode: Promote, source: Source) -> Promote:
        """What is pinned goes before what is not."""
        if mode is Promote.IF_SPACE and self._store.is_pinned(BlockId(source.attr.key, 0)):
            return Promote.ALWAYS
        return mode

    async def _fetch_into(self, job: Job, pages: range, held: int, reader: int) -> Answer[FetchReply]:
        job.users += 1
        try:
            ahead = job.demand(reader, pages, self._config.readahead)
            self._filler.fetch_ahead(job, ahead)
            for page in pages:
                if job.partial.has(page) and not await self.is_good(job.partial, page) and job.partial.has(page):
                    raise BlockMissingError(f"{job.block.filename}: page {page} cannot be read back")
            await self._filler.fetch(job, pages)
            if not all(map(job.partial.has, pages)):
                # Somebody else found one to be damaged meanwhile.
                raise BlockMissingError(f"{job.block.filename}: a page was damaged while others were fetched")
            if job.worth_filling:
                self._fill_soon(job)
            return self._confirm(job.partial, pages, held)
        finally:
            job.users -= 1
            self._end_if_done(job)

    def _confirm(self, partial: Partial, pages: range, held: int) -> Answer[FetchReply]:
        # The descriptor binds the confirmation to the open file; duplicated, so that it outlives our partial while the
        # answer is under way.
        fds = () if held == partial.serial else (os.dup(partial.read_fd),)
        return Answer(FetchReply(partial.serial, partial.present(pages)), b"", fds, close_fds=True)

    def _fill_soon(self, job: Job) -> None:
        if not job.filling:
            job.filling = True
            self._nursery.start_soon(self._fill, job)

    async def _fill(self, job: Job) -> None:
        job.users += 1
        try:
            await self._filler.fill(job)
        finally:
            job.filling = False
            job.users -= 1
            self._end_if_done(job)

    def _end_if_done(self, job: Job) -> None:
        """Close a job that nobody uses and that is sealed or given up."""
        if job.users == 0 and (job.partial.sealed or job.ended) and not job.closed:
            self._end(job)

    def _end(self, job: Job) -> None:
        # One that has ended may have a successor by now.
        if self._jobs.get(job.block) is job:
            del self._jobs[job.block]
        job.ended = job.closed = True
        self._supply.end(job.route)
        self._store.close(job.partial)

    async def end_idle(self) -> None:
        """Close jobs that nobody has asked for lately. Runs until cancelled."""
        while True:
            await trio.sleep(self._config.idle_partial_s / 2)
            before = trio.current_time() - self._config.idle_partial_s
            for job in list(self._jobs.values()):
                if job.users == 0 and not job.arriving and job.last_asked < before:
                    self._end(job)

    def close(self) -> None:
        """At the end of the worker, when nothing runs any more."""
        for job in list(self._jobs.values()):
            self._end(job)


async def _nothing() -> bool:
    await trio.lowlevel.checkpoint()
    return False


def _block_status(tier: Tier, cached_bytes: int) -> BlockStatus:
    return BlockStatus(f"{tier.config.kind}:{tier.config.path}", cached_bytes)
