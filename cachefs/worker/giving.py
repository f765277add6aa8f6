"""Serving other workers: what is here by `sendfile`, what is being fetched as it arrives."""

from __future__ import annotations

import os

import trio

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, NamespaceChangedError
from cachefs.net import Answer, FileSlice, Flights, Session
from cachefs.store import Partial, SealedReader, Store, page_checksum
from cachefs.store.blame import is_of_the_process
from cachefs.store.sums import Sums
from cachefs.wire.cluster import BlockBytes, DoubtBlock, ReadBlock
from cachefs.wire.control import BlockLength, MeasureBlock
from cachefs.wire.messages import Done
from cachefs.worker.blocks import Blocks
from cachefs.worker.checked import CheckedReads
from cachefs.worker.counters import Counters
from cachefs.worker.sources import Sources

PENDING_S = 2.0
"""After so long whoever asks is told that it takes a while: a worker that says nothing for longer is stuck."""


class Giving:
    """Handlers of what other workers ask. Fetches for them run in `nursery`, whether they wait or not."""

    def __init__(
        self,
        store: Store,
        blocks: Blocks,
        checked: CheckedReads,
        sources: Sources,
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._blocks = blocks
        self._checked = checked
        self._sources = sources
        self._counters = counters
        self._sealed_files = SealedReader(store.paths)
        self._fetches: Flights[tuple[BlockId, int], None] = Flights(nursery)

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
        page = request.offset // self._blocks.page_size
        _check_range(block, request, partial.page_span(page) if page < partial.page_count else (0, 0))
        if not await self._blocks.is_good(partial, page):
            return None
        if self._blocks.partial(block) is not partial:
            # Sealed while it was compared, and closed, or given up: what is here now is something else.
            return await self._from_here(block, request, session)
        try:
            checksum = partial.checksum(page)
            return await self._send(os.dup(partial.read_fd), block, request, partial, checksum, session)
        except (BlockCorruptError, OSError) as error:
            if is_of_the_process(error):
                raise BlockMissingError(f"{block.filename}: cannot be read now: {error}") from error
            await self._blocks.found_damaged(block, partial, range(page, page + 1), error)
            return None

    async def _from_sealed(self, block: BlockId, request: ReadBlock, session: Session) -> Answer[BlockBytes] | None:
        try:
            sums = await self._checked.sums_of(block)
        except (BlockCorruptError, BlockMissingError, OSError) as error:
            if is_of_the_process(error):
                raise BlockMissingError(f"{block.filename}: cannot be read now: {error}") from error
            await self._blocks.drop_damaged(block, error)
            return None
        page = request.offset // sums.page_size
        _check_range(block, request, sums.geometry.page_span(sums.length, page))
        self._sealed_files.avoid(self._store.down)
        fd = self._sealed_files.open(block, sums.length)
        if fd is None:
            return None
        self._store.visited(block)
        try:
            return await self._send(fd, block, request, sums, sums.checksums[page], session)
        except BlockCorruptError as error:
            await self._blocks.drop_damaged(block, error)
        except OSError as error:
            if is_of_the_process(error):
                raise BlockMissingError(f"{block.filename}: cannot be read now: {error}") from error
            self._blocks.doubt(block)
        return None

    async def _send(
        self,
        fd: int,
        block: BlockId,
        request: ReadBlock,
        known: Sums | Partial,
        checksum: int | None,
        session: Session,
    ) -> Answer[BlockBytes]:
        """Takes over `fd`. A whole page goes as it is, with its checksum, for whoever gets it to compare; a part, whose
        checksum can only be made here, is compared here. Raises BlockCorruptError, OSError.
        """
        if checksum is not None and request.length == _page_length(known, request.offset):
            slice_ = FileSlice(fd, request.offset, request.length)
            answer = Answer(BlockBytes(checksum), slice_, on_sent=lambda: os.close(fd))
        else:
            try:
                answer = await self._part(fd, block, request, known, session)
            finally:
                os.close(fd)
        self._counters.served_reads += 1
        self._counters.served_bytes += request.length
        return answer

    async def _part(
        self, fd: int, block: BlockId, request: ReadBlock, known: Sums | Partial, session: Session
    ) -> Answer[BlockBytes]:
        room = await session.room_for_payload(request.length)
        try:
            data = await self._checked.read(fd, block, known, request.offset, request.length)
            return Answer(BlockBytes(page_checksum(data)), data, on_sent=room.give_back)
        except BaseException:
            room.give_back()
            raise

    async def measure_block(self, request: MeasureBlock, session: Session) -> BlockLength:
        block = BlockId(request.key, request.block_index)
        if not await self._blocks.is_sealed(block):
            raise BlockMissingError(f"{block.filename}: not here")
        return BlockLength((await self._checked.sums_of(block)).length)

    async def doubt_block(self, request: DoubtBlock, session: Session) -> Done:
        """What we sent arrived damaged: look at it."""
        self._blocks.doubt(BlockId(request.key, request.block_index))
        return Done()


def _check_range(block: BlockId, request: ReadBlock, span: tuple[int, int]) -> None:
    """Raises BlockCorruptError for what is not within that page, (offset, length)."""
    start, length = span
    if not start <= request.offset or request.offset + request.length > start + length:
        raise BlockCorruptError(f"{block.filename}: no bytes at {request.offset}+{request.length}, within one page")


def _page_length(known: Sums | Partial, offset: int) -> int:
    page = offset // known.page_size
    if isinstance(known, Partial):
        return known.page_span(page)[1]
    return known.geometry.page_span(known.length, page)[1]
