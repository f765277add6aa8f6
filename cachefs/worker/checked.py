"""Bytes of what is kept here, compared with their checksums before anybody outside of this node gets them."""

from __future__ import annotations

from collections import OrderedDict

import trio

from cachefs.model import BlockCorruptError, BlockId
from cachefs.store import PageAt, Partial, PieceSums, Store
from cachefs.store.sums import Sums

_REMEMBERED_SUMS = 64


class CheckedReads:
    """Called from one trio thread; what reads a disk is done in others."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pieces = PieceSums()
        self._sums: OrderedDict[BlockId, Sums] = OrderedDict()
        self._disk = trio.CapacityLimiter(4)

    async def sums_of(self, block: BlockId) -> Sums:
        """Of a sealed block. Raises as `Store.checksums`, and BlockCorruptError when some are damaged.

        An identifier names one content for good: what was read once stays right. What lacks some is not remembered, as
        it was damaged on the disk.
        """
        sums = self._sums.get(block)
        if sums is None:
            sums = await trio.to_thread.run_sync(self._store.checksums, block, limiter=self._disk)
            if not sums.complete:
                raise BlockCorruptError(f"{block.filename}: some of its checksums are damaged")
            self._sums[block] = sums
            if len(self._sums) > _REMEMBERED_SUMS:
                self._sums.popitem(last=False)
        return sums

    async def read(self, fd: int, block: BlockId, known: Sums | Partial, offset: int, length: int) -> bytes:
        """[offset, offset+length) of a block, from a file that has all pages of it, which `known` tells the checksums
        of. The file stays open until this returns, also if it is cancelled.

        Raises BlockCorruptError when the file has something else; BlockMissingError when a page of a partial is absent;
        OSError when it cannot be read.
        """
        pages = _pages(known, offset, length)

        def read() -> bytes:
            parts = []
            for page in pages:
                start, end = max(offset, page.offset), min(offset + length, page.offset + page.length)
                parts.append(self._pieces.read(fd, block, page, start, end - start))
            return parts[0] if len(parts) == 1 else b"".join(parts)

        return await trio.to_thread.run_sync(read, limiter=self._disk)


def _pages(known: Sums | Partial, offset: int, length: int) -> list[PageAt]:
    numbers = range(offset // known.page_size, -(-(offset + length) // known.page_size))
    if isinstance(known, Partial):
        return [PageAt(*known.page_span(page), known.checksum(page)) for page in numbers]
    return [PageAt(*known.geometry.page_span(known.length, page), _present(known, page)) for page in numbers]


def _present(known: Sums, page: int) -> int:
    """A sealed block has all of them: what has none was damaged, and nothing matches it."""
    checksum = known.checksums[page] if page < len(known.checksums) else None
    return -1 if checksum is None else checksum
