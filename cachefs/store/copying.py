"""A sealed block is copied, page by page, into a partial of another tier."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError
from cachefs.store.blame import is_of_the_process
from cachefs.store.partial import Partial
from cachefs.store.sealed import SealedBlocks
from cachefs.store.sums import Sums


class Original:
    """The block that is copied: its checksums, and its file open until the copy is done."""

    def __init__(self, block: BlockId, known: Sums, fd: int) -> None:
        self._block = block
        self._known = known
        self._fd = fd

    @property
    def length(self) -> int:
        return self._known.length

    def copy_into(self, partial: Partial) -> None:
        """Every page is compared on the way. Blocks on both disks. Raises BlockCorruptError for what is damaged, cut
        off, or cannot be read; as `Partial.write_page`; OSError for want of memory.
        """
        for page, checksum in enumerate(self._known.checksums):
            if checksum is None:
                raise BlockCorruptError(f"{self._block.filename}: page {page} has no checksum")
            partial.write_page(page, self._read_page(page), checksum)

    def _read_page(self, page: int) -> bytes:
        offset, span = self._known.geometry.page_span(self._known.length, page)
        try:
            data = os.pread(self._fd, span, offset)
        except OSError as error:
            if is_of_the_process(error):
                raise
            raise BlockCorruptError(f"{self._block.filename}: page {page} cannot be read: {error.strerror}") from error
        if len(data) != span:
            raise BlockCorruptError(f"{self._block.filename}: page {page} is cut off")
        return data


@contextmanager
def open_original(block: BlockId, sealed: SealedBlocks) -> Iterator[Original]:
    """Raises BlockMissingError when it is gone, BlockCorruptError when it cannot be read; OSError for want of
    descriptors or memory.
    """
    try:
        known = sealed.files.checksums(block)
        fd = sealed.files.open_data(block)
    except (BlockCorruptError, OSError) as error:
        if block not in sealed:
            raise BlockMissingError(f"{block.filename}: went away") from error
        if is_of_the_process(error):
            raise
        raise BlockCorruptError(f"{block.filename}: cannot be read: {error}") from error
    try:
        yield Original(block, known, fd)
    finally:
        os.close(fd)
