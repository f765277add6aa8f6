"""Parts of pages that are compared before they are given to anybody.

A checksum is of a whole page. Whoever wants a part of one gets it from a page that was read and compared as a whole;
what is learnt then, the checksums of its pieces, makes the next parts of that page cheap: of these only the pieces they
lie in are read and compared. So nothing is given on the strength of an old comparison, however long ago that was.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from typing import NamedTuple

from cachefs.model import BlockCorruptError, BlockId, KiB
from cachefs.store.page_io import read_into, scratch
from cachefs.store.sums import page_checksum

PIECE_BYTES = 64 * KiB
"""Read and compared in some 20 microseconds: little beside sending even a few bytes to another host."""
_REMEMBERED = 8192
"""Pages: 64 GiB of the usual ones, for about a kilobyte of memory each."""


class PageAt(NamedTuple):
    """One page of a block."""

    offset: int
    """In the block, bytes."""
    length: int
    checksum: int


class _Known(NamedTuple):
    checksum: int
    """Of the page as a whole."""
    pieces: array[int]


class PieceSums:
    """Called from any thread. A block names one content for good, so what was learnt of a page stays right, whichever
    file it is read from.
    """

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        self._remembered = remembered
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[BlockId, int], _Known] = OrderedDict()

    def read(self, fd: int, block: BlockId, page: PageAt, offset: int, length: int) -> bytes:
        """[offset, offset+length) of a block, within that page, from a file that has it. Blocks on the disk.

        Raises BlockCorruptError when the file has something else there; OSError when it cannot be read.
        """
        known = self._find(block, page)
        if known is None:
            return self._read_page(fd, block, page, offset, length)
        first = (offset - page.offset) // PIECE_BYTES
        start = page.offset + first * PIECE_BYTES
        last = -(-(offset + length - page.offset) // PIECE_BYTES)
        end = min(page.offset + last * PIECE_BYTES, page.offset + page.length)
        found = read_into(fd, scratch(end - start), start, end - start)
        if len(found) != end - start or _pieces_of(found) != known.pieces[first:last]:
            raise BlockCorruptError(f"{block.filename}: bytes at {start}+{end - start} do not match their checksum")
        return bytes(found[offset - start : offset - start + length])

    def _find(self, block: BlockId, page: PageAt) -> _Known | None:
        with self._lock:
            known = self._known.get((block, page.offset))
            if known is None or known.checksum != page.checksum:
                return None
            self._known.move_to_end((block, page.offset))
            return known

    def _read_page(self, fd: int, block: BlockId, page: PageAt, offset: int, length: int) -> bytes:
        found = read_into(fd, scratch(page.length), page.offset, page.length)
        if len(found) != page.length or page_checksum(found) != page.checksum:
            raise BlockCorruptError(f"{block.filename}: the page at {page.offset} does not match its checksum")
        known = _Known(page.checksum, _pieces_of(found))
        with self._lock:
            self._known[block, page.offset] = known
            self._known.move_to_end((block, page.offset))
            if len(self._known) > self._remembered:
                self._known.popitem(last=False)
        return bytes(found[offset - page.offset : offset - page.offset + length])


def _pieces_of(data: memoryview) -> array[int]:
    starts = range(0, len(data), PIECE_BYTES)
    return array("Q", [page_checksum(data[start : start + PIECE_BYTES]) for start in starts])
