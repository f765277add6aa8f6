"""Arithmetic of contents, blocks and pages. Offsets and sizes are bytes; ranges are half open."""

from __future__ import annotations

from typing import NamedTuple

from cachefs.model.errors import ConfigError
from cachefs.model.units import GiB, KiB, MiB

DEFAULT_BLOCK_SIZE = 8 * GiB
DEFAULT_PAGE_SIZE = 8 * MiB


_PAGE_SIZES = 64 * KiB, 16 * MiB
_PAGE_UNIT = 4 * KiB


def check_page_size(page_size: int, key: str = "--page-size") -> None:
    """Raises ConfigError."""
    least, most = _PAGE_SIZES
    if not least <= page_size <= most or page_size % _PAGE_UNIT:
        raise ConfigError(key, page_size, "64 KiB to 16 MiB, and a multiple of 4 KiB")


def div_up(value: int, unit: int) -> int:
    return -(-value // unit)


class Geometry(NamedTuple):
    """How contents are cut: cluster-wide, decided by the master, the same for every process."""

    block_size: int = DEFAULT_BLOCK_SIZE
    page_size: int = DEFAULT_PAGE_SIZE

    def block_count(self, content_size: int) -> int:
        """At least 1: an empty content is one empty block."""
        return max(1, div_up(content_size, self.block_size))

    def block_length(self, content_size: int, block_index: int) -> int:
        """Bytes in that block of a content of that size."""
        start = block_index * self.block_size
        return max(0, min(self.block_size, content_size - start))

    def page_count(self, block_length: int) -> int:
        return div_up(block_length, self.page_size)

    def page_span(self, block_length: int, page: int) -> tuple[int, int]:
        """(offset in the block, length) of that page of a block of that length."""
        start = page * self.page_size
        return start, max(0, min(self.page_size, block_length - start))

    def pages_covering(self, offset: int, length: int) -> range:
        """The pages of a block that hold [offset, offset+length); empty for an empty range."""
        if length <= 0:
            return range(0)
        return range(offset // self.page_size, div_up(offset + length, self.page_size))

    def split(self, content_size: int, offset: int, length: int) -> list[BlockSlice]:
        """Cut [offset, offset+length) of a content, clipped to its end, at block boundaries."""
        end = min(offset + length, content_size)
        slices = []
        while offset < end:
            index, within = divmod(offset, self.block_size)
            piece = min(end - offset, self.block_size - within)
            slices.append(BlockSlice(index, within, piece))
            offset += piece
        return slices


class BlockSlice(NamedTuple):
    block_index: int
    offset: int
    """From the start of the block."""
    length: int
