"""The partials of a tier that somebody has open."""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import suppress

from cachefs.model import BlockCorruptError, BlockId, Geometry
from cachefs.store import sums
from cachefs.store.block_files import BlockFiles
from cachefs.store.diskfull import capacity_errors
from cachefs.store.dormant import Dormant
from cachefs.store.eviction import Eviction
from cachefs.store.layout import Layout
from cachefs.store.partial import NotCompleteError, Partial, create_partial, resume_partial
from cachefs.store.quota_book import QuotaBook
from cachefs.store.sealed import SealedBlocks
from cachefs.store.space import Space, allocated_bytes, estimate

logger = logging.getLogger(__name__)


class Partials:
    """Partials that are being filled, each open once for all its users, with room reserved for its full length.

    It ends by being sealed, by being given up, or dormant when its last user is done.

    What opens, closes, seals or gives up takes the tier's lock; what looks is called with the lock held.
    """

    def __init__(
        self,
        lock: threading.Lock,
        layout: Layout,
        geometry: Geometry,
        space: Space,
        book: QuotaBook,
        files: BlockFiles,
        dormant: Dormant,
        sealed: SealedBlocks,
        eviction: Eviction,
    ) -> None:
        self._lock = lock
        self._layout = layout
        self._geometry = geometry
        self._space = space
        self._book = book
        self._files = files
        self._dormant = dormant
        self._sealed = sealed
        self._eviction = eviction
        self._open: dict[BlockId, Partial] = {}
        # Unique across restarts: 2**31 starts, 2**32 partials each, and never 0.
        self._serials = itertools.count((secrets.randbits(31) << 32) + 1)

    # ---- what is open ----------------------------------------------------------------------------------------------

    def __contains__(self, block: BlockId) -> bool:
        return block in self._open

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def unwritten_bytes(self) -> int:
        """What is reserved and not on the disk yet, about."""
        return sum(partial.unwritten_bytes for partial in self._open.values())

    def sort_by_quota(self, block: BlockId) -> None:
        """It may count for others than before."""
        partial = self._open.get(block)
        if partial is not None:
            self._book.sort(block, _need(partial), sealed=False)

    # ---- opening and closing ---------------------------------------------------------------------------------------

    def open(self, block: BlockId, length: int, *, evict: bool, is_copy: bool) -> Partial | None:
        """As `Tier.open_partial`."""
        with self._lock:
            if block in self._sealed:
                return None
            partial = self._open.get(block)
            if partial is None:
                if is_copy:
                    self._book.begin_copy(block)
                try:
                    partial = self._make(block, length, evict)
                except BaseException:
                    if self._book.end_copy(block):
                        self._dormant.sort_by_quota(block)
                    raise
                self._open[block] = partial
            partial.users += 1
            return partial

    def _make(self, block: BlockId, length: int, evict: bool) -> Partial:
        page_size = self._geometry.page_size
        need = estimate(length, self._geometry.page_count(length))
        held = self._dormant.take(block)
        try:
            self._eviction.make_room(need, self.unwritten_bytes(), evict=evict)
            partial = None
            if held:
                try:
                    partial = resume_partial(self._layout, block, length, page_size, next(self._serials))
                except BlockCorruptError as error:
                    logger.info("partial dropped block=%s error=%s", block.filename, error)
                    self._files.remove(block)
                    held = 0
            if partial is None:
                partial = create_partial(self._layout, block, length, page_size, next(self._serials))
        except BaseException:
            if held:
                self._dormant.add(block, held)
            self._book.put(block, held)
            raise
        self._space.reserved += need
        self._book.put(block, need)
        return partial

    def close(self, partial: Partial) -> None:
        """As `Tier.close`."""
        with self._lock:
            partial.users -= 1
            if partial.users == 0:
                try:
                    if self._open.get(partial.block) is partial:
                        self._put_to_sleep(partial)
                finally:
                    partial.close()

    def close_all(self) -> None:
        """At the end: what is open is left as it is on disk."""
        with self._lock:
            for partial in list(self._open.values()):
                with suppress(OSError):
                    self._put_to_sleep(partial)
                partial.close()

    def _put_to_sleep(self, partial: Partial) -> None:
        self._forget(partial)
        if partial.resumable:
            self._leave(partial)
        else:
            self._remove(partial)

    def _forget(self, partial: Partial) -> None:
        del self._open[partial.block]
        self._space.reserved -= _need(partial)

    def _leave(self, partial: Partial) -> None:
        # What was written, not st_blocks: late allocation would make it too small.
        held = partial.length - min(partial.length, partial.unwritten_bytes) + sums.file_size(partial.page_count)
        self._dormant.add(partial.block, held)
        self._book.put(partial.block, held)

    def _remove(self, partial: Partial) -> None:
        try:
            self._files.remove(partial.block)
        except OSError:
            # It takes its room still, until its block is filled anew or others need the room.
            self._leave(partial)
            raise
        self._book.put(partial.block, 0)

    # ---- sealing and giving up -------------------------------------------------------------------------------------

    def seal(self, partial: Partial) -> bool:
        """As `Tier.seal`; whether it was not sealed yet."""
        with partial.seal_lock:
            if partial.sealed:
                return False
            if partial.dropped or not partial.complete:
                raise NotCompleteError(f"{partial.block.filename}: cannot be sealed, it is not complete")
            partial.verify()
            try:
                self._files.check_name(partial.block, partial.read_fd, partial.length)
            except BlockCorruptError:
                self._drop(partial)
                raise
            partial.finish()
            with self._lock, capacity_errors():  # the directory that it moves to may have to be made
                self._publish(partial)
            return True

    def _publish(self, partial: Partial) -> None:
        self._files.publish(partial.block, self._sealed.files)
        partial.sealed = True
        self._forget(partial)
        size = allocated_bytes(os.fstat(partial.read_fd)) + estimate(0, partial.page_count)
        self._sealed.add(partial.block, size)

    def give_up(self, partial: Partial) -> None:
        """As `Tier.give_up`."""
        with partial.seal_lock:
            if not partial.sealed:
                # First, as a writer under way may make the file of checksums anew.
                partial.refuse_writers()
                self._drop(partial)

    def _drop(self, partial: Partial) -> None:
        with self._lock:
            if self._open.get(partial.block) is partial:
                partial.dropped = True
                self._forget(partial)
                self._remove(partial)


def _need(partial: Partial) -> int:
    """What is reserved for it."""
    return estimate(partial.length, partial.page_count)
