"""A block that is being filled: a sparse file with its pages at their natural offsets, and their checksums beside it.

What makes "present" safe to act on, also in another process:

- a page becomes present only after its bytes and then its checksum were written. It becomes absent again only if its
  bytes are found to be damaged (`compare`, `verify`): then it is written once more, into the same file, so that whoever
  has the descriptor reads the right bytes again;
- present binds the open file, not its name: `read_fd` is what the worker passes to a mount along with a confirmation.
  It is a read-only open file of its own, so that a receiver cannot write through it, and it holds `flock(LOCK_SH)`:
  the lock belongs to the open file and lives as long as any process has it, which tells eviction who still reads;
- the file is never truncated, punched, or reused for other contents.

The `.sums` file of a block of several pages grows with it, so that a worker that was killed resumes where it was (same
boot only: the page cache outlives the process, not the kernel). What it finds is remembered, and each page of it
becomes present when it was read back and compared (`recall`): nobody knows what became of the file in between. A block
of one page has nothing to resume, and gets its `.sums` when it is sealed.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from array import array
from collections.abc import Container, Iterator
from contextlib import contextmanager

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, Geometry, LocalProtocolError
from cachefs.store import sums
from cachefs.store.blame import is_of_the_process
from cachefs.store.diskfull import capacity_errors
from cachefs.store.layout import READ_FLAGS, Layout, create, data_name, sums_name, unlink_if_exists
from cachefs.store.page_io import damage, damaged_pages, read_into, scratch, write_all
from cachefs.store.sums import Buffer, page_checksum

_CREATE = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FRESH_S = 30.0
"""So long after a page was written or compared it is taken to be in memory still: nothing comes back from a medium that
was not there yet when it was written.
"""
_NEVER = float("-inf")


class NotCompleteError(BlockCorruptError):
    """Pages of a partial are absent: whoever found them damaged, or gave it up, has told of that."""


class Partial:
    """One block file, open. Made by `Store.open_partial`; each of those calls is paired with one `Store.close`.

    Everything here may be called from any thread. After the block is sealed or dropped, `read_fd` still reads until
    the last user closes the partial; writing raises.
    """

    def __init__(
        self,
        layout: Layout,
        block: BlockId,
        length: int,
        page_size: int,
        serial: int,
        *,
        write_fd: int,
        read_fd: int,
        checksums: list[int | None],
        sums_on_disk: bool,
        remembered: dict[int, int] | None = None,
    ) -> None:
        self.block = block
        self.length = length
        self.page_size = page_size
        self.page_count = len(checksums)
        self.serial = serial
        """Of this open file, unique across restarts: by it a mount knows whether its descriptor is this one."""
        self.read_fd = read_fd
        """Read-only. The partial's own: pass it on (SCM_RIGHTS duplicates it), do not close it."""
        self._layout = layout
        self._geometry = Geometry(page_size=page_size)
        self._header = sums.encode_header(block, length, page_size)
        self._checksums = checksums
        self._missing_count = checksums.count(None)
        self._compared = array("d", [_NEVER]) * self.page_count
        """When the bytes of each page were known to be right last, by the monotonic clock."""
        self._remembered = remembered or {}
        """Absent pages that are in the file if nothing happened to it -> their checksums."""
        self._write_fd = write_fd
        self._sums_fd = -1
        self._sums_on_disk = sums_on_disk
        self._changed = threading.Condition(threading.Lock())
        self._writing: set[int] = set()
        self.seal_lock = threading.Lock()
        """Held by whoever seals, and to forget a page that is damaged: after the seal nothing changes."""
        self.users = 0
        """Open calls not yet closed; guarded by the tier's lock."""
        self.sealed = False
        self.dropped = False

    @property
    def complete(self) -> bool:
        """Every page is present."""
        return self._missing_count == 0

    @property
    def unwritten_bytes(self) -> int:
        """About what is still to be written."""
        return (self._missing_count - len(self._remembered)) * self.page_size

    @property
    def empty(self) -> bool:
        """No page is present or remembered, though there are some."""
        return self._missing_count == self.page_count > 0 and not self._remembered

    @property
    def resumable(self) -> bool:
        """What is present or remembered is known to the disk too."""
        return self._sums_on_disk and not self.empty

    def present(self, besides: Container[int] | None = None) -> list[tuple[int, int]]:
        """The present pages as half-open ranges, ascending. With `besides`, only these and those that are fresh."""
        ranges: list[tuple[int, int]] = []
        fresh_since = time.monotonic() - _FRESH_S
        for page, checksum in enumerate(self._checksums):
            if checksum is None:
                continue
            if besides is not None and self._compared[page] < fresh_since and page not in besides:
                continue
            if ranges and ranges[-1][1] == page:
                ranges[-1] = (ranges[-1][0], page + 1)
            else:
                ranges.append((page, page + 1))
        return ranges

    def has(self, page: int) -> bool:
        """Whether that page is present: readable through `read_fd`, now and for good."""
        return self._checksums[page] is not None

    def is_fresh(self, page: int) -> bool:
        """Whether that page is present, and was written or compared a moment ago. What is not is worth a `compare`
        before anybody is told that it can be read.
        """
        return self.has(page) and self._compared[page] >= time.monotonic() - _FRESH_S

    def distrust(self) -> None:
        """No page is fresh any more: somebody found wrong bytes here."""
        for page in range(self.page_count):
            self._compared[page] = _NEVER

    def compare(self, page: int) -> bool:
        """Read a present page back, as whoever has the descriptor would; whether it is what was written.

        One that is not becomes absent, unless the block is sealed by now. Blocks on the disk. Raises OSError when it
        cannot be read; BlockMissingError for an absent page.
        """
        checksum = self.checksum(page)
        offset, span = self.page_span(page)
        with read_into(self.read_fd, scratch(span), offset, span) as found:
            good = page_checksum(found) == checksum
        if good:
            self._compared[page] = time.monotonic()
            return True
        with self.seal_lock:
            if not self.sealed:
                self._forget(page)
        return False

    def _forget(self, page: int) -> None:
        with self._changed:
            if self.has(page):
                self._checksums[page] = None
                self._missing_count += 1

    def remembers(self, page: int) -> bool:
        """Whether that page is absent, and worth a `recall`."""
        return page in self._remembered

    def recall(self, page: int) -> bool:
        """Read a remembered page back; whether it is present now. Blocks on the disk: call it in a thread.

        One that is not what was written is forgotten, and stays absent. So it is if it cannot be read; but for want of
        descriptors or memory it is still remembered.
        """
        with self._claimed(page) as claimed:
            if not claimed:
                return True
            checksum = self._remembered.get(page)
            if checksum is None:
                return False
            offset, span = self.page_span(page)
            try:
                with read_into(self.read_fd, scratch(span), offset, span) as found:
                    good = page_checksum(found) == checksum
            except OSError as error:
                if is_of_the_process(error):
                    return False
                good = False
            with self._changed:
                del self._remembered[page]
                if good:
                    self._now_present(page, checksum)
            return good

    def missing(self) -> Iterator[int]:
        """The absent pages in order."""
        return (page for page, checksum in enumerate(self._checksums) if checksum is None)

    def checksum(self, page: int) -> int:
        """The checksum that came with a present page. Raises BlockMissingError for an absent one."""
        checksum = self._checksums[page]
        if checksum is None:
            raise BlockMissingError(f"{self.block.filename}: page {page} is not present")
        return checksum

    def page_span(self, page: int) -> tuple[int, int]:
        """(offset, length) of that page in the file, bytes."""
        return self._geometry.page_span(self.length, page)

    def write_page(self, page: int, data: Buffer, checksum: int) -> bool:
        """Store one whole page with the checksum that travelled with it. Blocks on the disk: call it in a thread.

        Returns False when the page was present already (it is never written twice), waiting out a write of the same
        page by another thread. Raises BlockCorruptError when the data does not match the checksum, or a present page
        had another one; CapacityError when the disk is full; BlockMissingError when the block was dropped meanwhile.
        An absent page stays absent after an error.
        """
        offset, span = self.page_span(page)
        view = memoryview(data).cast("B")
        if not 0 <= page < self.page_count or len(view) != span:
            raise LocalProtocolError(f"{self.block.filename}: page {page} of {len(view)} bytes does not belong here")
        if page_checksum(view) != checksum:
            raise BlockCorruptError(f"{self.block.filename}: page {page} does not match its checksum")
        with self._claimed(page) as claimed:
            if not claimed:
                if self._checksums[page] != checksum:
                    raise BlockCorruptError(f"{self.block.filename}: page {page} is present with another checksum")
                return False
            with capacity_errors():
                write_all(self._write_fd, view, offset)
                self._record(page, checksum)
            return True

    @contextmanager
    def _claimed(self, page: int) -> Iterator[bool]:
        """Makes the caller the only writer of a page; yields False when it is present."""
        with self._changed:
            while page in self._writing:
                self._changed.wait()
            claimed = not self.has(page)
            if claimed:
                if self.sealed or self.dropped:
                    raise BlockMissingError(f"{self.block.filename}: dropped while it was being filled")
                self._writing.add(page)
        try:
            yield claimed
        finally:
            if claimed:
                with self._changed:
                    self._writing.discard(page)
                    self._changed.notify_all()

    def _record(self, page: int, checksum: int) -> None:
        """Make a page present whose bytes are in the file: on disk first, then for whoever asks."""
        if self.page_count > 1:
            with self._changed:
                self._open_sums()
            write_all(self._sums_fd, sums.encode_entry(self._header, page, checksum), sums.entry_offset(page))
        with self._changed:
            self._remembered.pop(page, None)
            self._now_present(page, checksum)

    def _now_present(self, page: int, checksum: int) -> None:
        self._checksums[page] = checksum
        self._compared[page] = time.monotonic()
        self._missing_count -= 1

    def _open_sums(self) -> None:
        if self._sums_fd >= 0:
            return
        name, directory = sums_name(self.block), self._layout.partial_fd
        if self._sums_on_disk:
            self._sums_fd = os.open(name, _WRITE, dir_fd=directory)
            return
        unlink_if_exists(name, directory)
        self._sums_fd = create(name, _WRITE | _CREATE, directory)
        write_all(self._sums_fd, sums.encode(self._header, self._checksums), 0)
        self._sums_on_disk = True

    def verify(self) -> None:
        """Read every page back and compare. Blocks on the disk. By whoever holds `seal_lock`.

        Raises BlockCorruptError when some are damaged: these are absent now. OSError when one cannot be read.
        """
        expected = sums.Sums(self.length, self.page_size, self._checksums)
        damaged = list(damaged_pages(self.read_fd, expected))
        for page in damaged:
            self._forget(page)
        if damaged:
            raise damage(self.block, damaged)

    def refuse_writers(self) -> None:
        """It is given up: whoever writes from now on gets BlockMissingError. Returns when nobody writes any more."""
        with self._changed:
            self.dropped = True
            while self._writing:
                self._changed.wait()

    def finish(self) -> None:
        """The last step before the renames: the `.sums` file complete, and nothing left that could write."""
        with self._changed:
            while self._writing:
                self._changed.wait()
            with capacity_errors():
                self._open_sums()
            self._close_writers()

    def close(self) -> None:
        """Give back every descriptor. The tier calls it when the last user is gone; calling it again does nothing."""
        with self._changed:
            self._close_writers()
            if self.read_fd >= 0:
                os.close(self.read_fd)
                self.read_fd = -1

    def _close_writers(self) -> None:
        for fd in (self._write_fd, self._sums_fd):
            if fd >= 0:
                os.close(fd)
        self._write_fd = self._sums_fd = -1


def create_partial(layout: Layout, block: BlockId, length: int, page_size: int, serial: int) -> Partial:
    """A new, empty partial. Raises CapacityError when the disk is full, OSError for other trouble with it."""
    name = data_name(block)
    page_count = Geometry(page_size=page_size).page_count(length)
    with capacity_errors():
        # Never O_TRUNC: somebody may still read the pages of a file that lost its entry in our index.
        try:
            write_fd = create(name, _WRITE | _CREATE, layout.partial_fd)
        except FileExistsError:
            unlink_if_exists(name, layout.partial_fd)
            write_fd = create(name, _WRITE | _CREATE, layout.partial_fd)
        try:
            if page_count > 1:
                # Full size from the start: file systems then do not allocate ahead of us at the end of the file.
                os.ftruncate(write_fd, length)
            read_fd = _open_shared(layout, name)
        except BaseException:
            os.close(write_fd)
            raise
    return Partial(
        layout,
        block,
        length,
        page_size,
        serial,
        write_fd=write_fd,
        read_fd=read_fd,
        checksums=[None] * page_count,
        sums_on_disk=False,
    )


def resume_partial(layout: Layout, block: BlockId, length: int, page_size: int, serial: int) -> Partial:
    """A partial of this boot, as far as it got: all of that is to be recalled.

    Raises BlockCorruptError when it cannot be used for this block, length and page size; the caller drops it. OSError
    for want of descriptors or memory.
    """
    known = sums.read(block, sums_name(block), layout.partial_fd)
    if (known.length, known.page_size) != (length, page_size):
        raise BlockCorruptError(f"{block.filename}: partial of {known.length} bytes in pages of {known.page_size}")
    name = data_name(block)
    try:
        write_fd = os.open(name, _WRITE, dir_fd=layout.partial_fd)
        try:
            size = os.fstat(write_fd).st_size
            if size != length:
                raise BlockCorruptError(f"{block.filename}: partial has {size} bytes instead of {length}")
            read_fd = _open_shared(layout, name)
        except BaseException:
            os.close(write_fd)
            raise
    except OSError as error:
        if is_of_the_process(error):
            raise
        raise BlockCorruptError(f"{block.filename}: partial cannot be opened: {error.strerror}") from error
    return Partial(
        layout,
        block,
        length,
        page_size,
        serial,
        write_fd=write_fd,
        read_fd=read_fd,
        checksums=[None] * len(known.checksums),
        sums_on_disk=True,
        remembered={page: each for page, each in enumerate(known.checksums) if each is not None},
    )


def _open_shared(layout: Layout, name: str) -> int:
    fd = os.open(name, READ_FLAGS, dir_fd=layout.partial_fd)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
