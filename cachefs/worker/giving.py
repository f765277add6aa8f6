"""Serving other workers: what is here by `sendfile`, what is being fetched as it arrives."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict

import trio

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, NamespaceChangedError
from cachefs.net import Answer, FileSlice, Flights, Session
from cachefs.store import SealedReader, Store, page_checksum
from cachefs.store.blame import is_of_the_process
from cachefs.store.sums import Sums
from cachefs.wire.cluster import BlockBytes, DoubtBlock, ReadBlock
from cachefs.wire.control import BlockLength, MeasureBlock
from cachefs.wire.messages import Done
from cachefs.worker.blocks import Blocks
from cachefs.worker.counters import Counters
from cachefs.worker.sources import Sources

logger = logging.getLogger(__name__)

PENDING_S = 2.0
"""After so long whoever asks is told that it takes a while: a worker that says nothing for longer is stuck."""
_REMEMBERED_SUMS = 64


class Giving:
    """Handlers of what other workers ask. Fetches for them run in `nursery`, whether they wait or not."""

    def __init__(
        self, store: Store, blocks: Blocks, sources: Sources, counters: Counters, nursery: trio.Nursery
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._sources = sources
        self._counters = counters
        self._sealed_files = SealedReader(store.paths)
        self._fetches: Flights[tuple[BlockId, int], None] = Flights(nursery)
        self._sums: OrderedDict[BlockId, Sums] = OrderedDict()
        self._disk = trio.CapacityLimiter(4)

    async def read_block(self, request: ReadBlock, session: Session) -> Answer[BlockBytes]:
        """Raises as `ReadBlock` says."""
        block = BlockId(request.key, request.block_index)
        answer = await self._from_here(block, request, session)
        if answer is not None:
            return answer
        if request.effort == "held" or not request.ino:
            raise BlockMissingError(f"{block.filename}: not here")
        # Checked without a checkpoint before the number is looked up.
        if session.hello.namespace_id != self._sources.namespace_id:
            raise NamespaceChangedError("inode numbers of another namespace than this worker's master has")
        if request.effort == "origin" and not self._blocks.is_coming(block):
            raise BlockMissingError(f"{block.filename}: not fetched here")
        with trio.move_on_after(PENDING_S) as scope:
            await self._fetch(block, request)
        if scope.cancelled_caught:
            return Answer(BlockBytes(0, pending=True))
        answer = await self._from_here(block, request, session)
        if answer is None:
            raise BlockMissingError(f"{block.filename}: not kept here")
        return answer

    async def _fetch(self, block: BlockId, request: ReadBlock) -> None:
        first = request.offset // self._blocks.page_size
        key = block, first
        # Kept going: whoever asked comes back for it.
        self._fetches.start(key, lambda: self._blocks.fetch_for_worker(block, request.ino, request.offset))
        await self._fetches.join(key, trio.lowlevel.checkpoint)

    async def _from_here(self, block: BlockId, request: ReadBlock, session: Session) -> Answer[BlockBytes] | None:
        if await self._blocks.is_sealed(block):
            answer = await self._from_sealed(block, request, session)
            if answer is not None:
                return answer
        partial = self._blocks.partial(block)
        if partial is None:
            return None
        page, within = divmod(request.offset, self._blocks.page_size)
        if page >= partial.page_count or within + request.length > partial.page_span(page)[1]:
            raise BlockCorruptError(f"{block.filename}: no bytes at {request.offset}+{request.length}, within one page")
        if not partial.has(page):
            return None
        whole = request.length == partial.page_span(page)[1]
        return await self._send(os.dup(partial.read_fd), request, partial.checksum(page) if whole else None, session)

    async def _from_sealed(self, block: BlockId, request: ReadBlock, session: Session) -> Answer[BlockBytes] | None:
        try:
            sums = await self._sums_of(block)
        except (BlockCorruptError, BlockMissingError, OSError) as error:
            if is_of_the_process(error):
                raise BlockMissingError(f"{block.filename}: cannot be read now: {error}") from error
            logger.warning("block dropped, its checksums cannot be read block=%s error=%s", block.filename, error)
            await trio.to_thread.run_sync(self._store.drop, block, limiter=self._disk)
            return None
        page = request.offset // sums.page_size
        start, span = sums.geometry.page_span(sums.length, page)
        if not start <= request.offset or request.offset + request.length > start + span:
            raise BlockCorruptError(f"{block.filename}: no bytes at {request.offset}+{request.length}, within one page")
        self._sealed_files.avoid(self._store.down)
        fd = self._sealed_files.open(block, sums.length)
        if fd is None:
            return None
        self._store.visited(block)
        return await self._send(fd, request, sums.checksums[page] if request.length == span else None, session)

    async def _sums_of(self, block: BlockId) -> Sums:
        """An identifier names one content for good: what was read once stays right."""
        sums = self._sums.get(block)
        if sums is None:
            sums = self._sums[block] = await trio.to_thread.run_sync(self._store.checksums, block, limiter=self._disk)
            if len(self._sums) > _REMEMBERED_SUMS:
                self._sums.popitem(last=False)
        return sums

    async def _send(self, fd: int, request: ReadBlock, checksum: int | None, session: Session) -> Answer[BlockBytes]:
        """Takes over `fd`. Without the checksum of a whole page one of the part is made."""
        if checksum is None:
            try:
                answer = await self._part(fd, request, session)
            finally:
                os.close(fd)
        else:
            slice_ = FileSlice(fd, request.offset, request.length)
            answer = Answer(BlockBytes(checksum), slice_, on_sent=lambda: os.close(fd))
        self._counters.served_reads += 1
        self._counters.served_bytes += request.length
        return answer

    async def _part(self, fd: int, request: ReadBlock, session: Session) -> Answer[BlockBytes]:
        sent = await session.room_for_payload(request.length)
        try:
            data = await trio.to_thread.run_sync(os.pread, fd, request.length, request.offset, limiter=self._disk)
            if len(data) != request.length:
                raise BlockCorruptError("a block is cut off")
            return Answer(BlockBytes(page_checksum(data)), data, on_sent=sent)
        except BaseException:
            sent()
            raise

    async def measure_block(self, request: MeasureBlock, session: Session) -> BlockLength:
        block = BlockId(request.key, request.block_index)
        if not await self._blocks.is_sealed(block):
            raise BlockMissingError(f"{block.filename}: not here")
        return BlockLength((await self._sums_of(block)).length)

    async def doubt_block(self, request: DoubtBlock, session: Session) -> Done:
        """What we sent arrived damaged: look at it."""
        self._blocks.doubt(BlockId(request.key, request.block_index))
        return Done()
