"""Reading, comparing and writing pages of files, from the page cache or from the medium itself."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cachefs.model import BlockCorruptError, BlockId, div_up
from cachefs.store import sums
from cachefs.store.layout import READ_FLAGS
from cachefs.store.sums import Buffer, page_checksum

_local = threading.local()


@contextmanager
def open_cached(name: str, dir_fd: int) -> Iterator[int]:
    """A descriptor that reads what other readers get: from the page cache, if it is there. Raises OSError."""
    fd = os.open(name, READ_FLAGS, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def open_uncached(name: str, dir_fd: int) -> Iterator[int]:
    """A descriptor that reads from the medium itself where the file system can do that.

    What is in the page cache may be right while the medium is not, and looking at a whole tier must not push out of
    the page cache what readers use. Reads must be aligned, as those of `verify_pages` are. Raises OSError.
    """
    try:
        fd = os.open(name, READ_FLAGS | os.O_DIRECT, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(name, READ_FLAGS, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def verify_pages(block: BlockId, fd: int, expected: sums.Sums) -> None:
    """Compare every page of a file with its checksum. Blocks on the disk. Raises BlockCorruptError, OSError."""
    for page in damaged_pages(fd, expected):
        raise damage(block, [page])


def damaged_pages(fd: int, expected: sums.Sums) -> Iterator[int]:
    """The pages of a file that do not match their checksums, as they are found. Blocks on the disk. Raises OSError."""
    geometry = expected.geometry
    buffer = scratch(min(expected.page_size, max(1, expected.length)))
    for page, checksum in enumerate(expected.checksums):
        offset, span = geometry.page_span(expected.length, page)
        with read_into(fd, buffer, offset, span) as found:
            good = checksum is not None and page_checksum(found) == checksum
        if not good:
            yield page


def damage(block: BlockId, pages: Sequence[int]) -> BlockCorruptError:
    """The error that says so of these, at least one."""
    what = f"page {pages[0]}" if len(pages) == 1 else f"page {pages[0]} and {len(pages) - 1} more"
    return BlockCorruptError(f"{block.filename}: {what} on disk: not what was written")


def scratch(size: int) -> memoryview:
    """Memory of the calling thread, of whole pages of the machine and aligned to them, for descriptors of
    `open_uncached`. Kept for the next time: pages that the kernel has to clear first cost more than reading into them.
    """
    pages = div_up(size, mmap.PAGESIZE)
    memory: mmap.mmap | None = getattr(_local, "memory", None)
    if memory is None or len(memory) < pages * mmap.PAGESIZE:
        memory = _local.memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    return memoryview(memory)[: pages * mmap.PAGESIZE]


def write_all(fd: int, data: Buffer, offset: int) -> None:
    """`pwrite` until everything is written."""
    written = os.pwrite(fd, data, offset)
    if written == len(data):
        return
    view = memoryview(data)
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)


def read_into(fd: int, buffer: memoryview, offset: int, span: int) -> memoryview:
    """`span` bytes of the file, or what there is of them. Reads whole units of the medium, up to the buffer's end."""
    filled = 0
    while filled < span:
        with buffer[filled:] as rest:
            count = os.preadv(fd, [rest], offset + filled)
        if count == 0:
            break
        filled += count
        if filled % mmap.PAGESIZE:
            break  # the end of the file
    return buffer[: min(filled, span)]
