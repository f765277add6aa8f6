"""The blocks a worker holds on one tier: opening, sealing, evicting, verifying, syncing.

How the parts stay consistent:

- `_lock` guards the index, the ledger and the sets of open partials. It is held for look-ups, renames and unlinks,
  never while pages are written, read back or compared.
- A block is in exactly one of: nowhere, dormant (a partial on disk that nobody has open), open, sealed, suspect.
- Space is reserved for a partial's full length before its file exists, by evicting where needed. Only what nobody reads
  is evicted: whoever reads holds a shared lock on the open file, and eviction wants the exclusive one. What is pinned
  is never evicted to make room, nor moved away; damaged, it is dropped like anything else.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, CapacityError, Geometry
from cachefs.policy import IdleGroups, Sieve
from cachefs.store import recovery, sums
from cachefs.store.blame import is_of_the_medium, is_of_the_process
from cachefs.store.config import TierConfig, check_capacity, check_medium
from cachefs.store.layout import (
    FORMAT_VERSION,
    READ_FLAGS,
    Layout,
    TierFile,
    data_name,
    is_in_the_way,
    open_layout,
    running_boot_id,
    sums_name,
    tier_errors,
    unlink_if_exists,
)
from cachefs.store.partial import (
    Partial,
    create_partial,
    open_cached,
    open_uncached,
    resume_partial,
    verify_pages,
)
from cachefs.store.pinned import PinnedKeys
from cachefs.store.probe import try_disk
from cachefs.store.quota_book import QuotaBook
from cachefs.store.quotas import Quotas
from cachefs.store.space import Space, allocated_bytes, estimate

logger = logging.getLogger(__name__)

_IDLE_EVERY_S = 5.0
_FREE_EVERY_S = 1.0
_EVICTED_AT_ONCE = 64
"""Blocks that make room in a quota for one more, at most."""
_SORTED_AT_ONCE = 1000
_COLD_AMONG = 4096
"""So many shared blocks are looked at for those that nobody read lately: it is done while others wait."""
_NOTHING_TO_READ = (errno.ENOENT, errno.ELOOP, errno.ENXIO)
"""Of opening a block: it is gone, or a symlink or socket is in its place; no reader has that."""

Opened = Callable[[str, int], AbstractContextManager[int]]
"""A descriptor of a file of that name below that directory."""


class TierStatus(NamedTuple):
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    sealed: int
    suspect: int
    partials: int
    evictions: int
    pinned_bytes: int


class FreeOfQuotas(NamedTuple):
    """Of what counts for each quota; looked for now and then only, since that looks at all of it."""

    idle: dict[int, deque[BlockId]]
    until: float
    """When to look again, by the monotonic clock."""


class Tier:
    """Made by `open_tier`. Callable from any thread; what reads or writes pages blocks on the disk and says so."""

    def __init__(
        self,
        config: TierConfig,
        layout: Layout,
        geometry: Geometry,
        cluster_id: str,
        pinned: PinnedKeys,
        quotas: Quotas,
    ) -> None:
        self.config = config
        self._pinned = pinned
        self._quotas = quotas
        self._book = QuotaBook(quotas)
        self._counts = True
        """For quotas."""
        self._copies: set[BlockId] = set()
        """Of what is to go from another tier, and counts there until then."""
        self._free_of = FreeOfQuotas({}, 0.0)
        self._pinned_bytes = 0
        self._cluster_id = cluster_id
        self._layout = layout
        self._geometry = geometry
        self._lock = threading.Lock()
        self._space = Space(layout.tier_fd, config.capacity_bytes, config.free_floor_bytes)
        self._sealed: dict[BlockId, int] = {}
        """Allocated bytes."""
        self._suspect: dict[BlockId, int] = {}
        self._dormant: dict[BlockId, int] = {}
        self._open: dict[BlockId, Partial] = {}
        self._sieve: Sieve[BlockId] = Sieve()
        self._shared: dict[BlockId, None] = {}
        """Of sealed blocks that are not pinned: those that other nodes hold as well."""
        self._shared_pinned: set[BlockId] = set()
        """The same of pinned ones."""
        self._shared_bytes = 0
        self._groups: IdleGroups[BlockId] = IdleGroups(config.idle_after_s)
        """All sealed blocks, by the monotonic clock."""
        self._retired: dict[BlockId, None] = {}
        """Sealed blocks that nobody will ask for."""
        self._idle_queue: deque[BlockId] = deque()
        self._idle_next = 0.0
        self._unsynced: deque[BlockId] = deque()
        # Unique across restarts: 2**31 starts, 2**32 partials each, and never 0.
        self._serials = itertools.count((secrets.randbits(31) << 32) + 1)
        self._evictions = 0
        self.on_evicted: Callable[[BlockId], None] = lambda block: None
        """Called, from whatever thread, with each sealed block that goes; must not call back into the tier."""
        self.on_failed: Callable[[OSError, bool], None] = lambda error, reading: None
        """Called, from whatever thread, when the disk fails to read (True) or to write (False) a sealed block."""

    # ---- what is here ----------------------------------------------------------------------------------------------

    def is_sealed(self, block: BlockId) -> bool:
        return block in self._sealed

    def blocks(self) -> list[tuple[BlockId, int]]:
        """The sealed blocks and the bytes they take."""
        with self._lock:
            return list(self._sealed.items())

    def held_bytes(self, block: BlockId) -> int:
        """What a block takes on the disk, sealed, or in part and with nobody at it; 0 if it is not here."""
        return self._sealed.get(block) or self._dormant.get(block, 0)

    def visited(self, block: BlockId) -> None:
        """Somebody read it: evict others first."""
        with self._lock:
            self._sieve.visit(block)
            self._groups.use(block, time.monotonic())
            if self._quotas.active:
                self._book.visit(block)

    def retire(self, block: BlockId) -> None:
        """Nobody will ask for it again: its object changed. Evicted first, and counts as free until then."""
        with self._lock:
            if block in self._sealed and block not in self._retired:
                self._retired[block] = None
                self._idle_queue.appendleft(block)

    def idle_bytes(self) -> int:
        """What blocks take that are retired, or came with others of which none was read for `idle_after_s`; some
        seconds old. Pinned ones are never idle. With them, what is here
        of what is beyond a quota and nobody else holds: it counts as free like that.
        """
        with self._lock:
            idle = [block for block in dict.fromkeys(self._idle()) if self._is_free(block)]
            over = self._book.over_bytes(idle) if self._quotas.active else 0
            return over + sum(self._sealed[block] for block in idle)

    def _is_free(self, block: BlockId) -> bool:
        return block in self._sealed and not self._sieve.is_pinned(block)

    def shared_bytes(self) -> int:
        """What blocks take that other nodes hold as well, those that are pinned or idle left out."""
        with self._lock:
            if not self._shared:
                return 0
            return self._shared_bytes - sum(self._sealed[block] for block in self._idle() if block in self._shared)

    def share(self, blocks: Iterable[BlockId], shared: bool) -> None:
        """Other nodes hold these as well, or do not any more."""
        with self._lock:
            for block in blocks:
                self._set_shared(block, shared)

    def unshare_all(self) -> None:
        """Nothing is known of other nodes any more."""
        with self._lock:
            self._shared.clear()
            self._shared_pinned.clear()
            self._shared_bytes = 0
            self._book.unshare_all()

    def _set_shared(self, block: BlockId, shared: bool) -> None:
        if block in self._shared:
            del self._shared[block]
            self._shared_bytes -= self._sealed[block]
            self._book.share(block, False)
        self._shared_pinned.discard(block)
        if not shared or block not in self._sealed:
            return
        if self._sieve.is_pinned(block):
            self._shared_pinned.add(block)
        else:
            self._shared[block] = None
            self._shared_bytes += self._sealed[block]
            self._book.share(block, True)

    def _is_shared(self, block: BlockId) -> bool:
        return block in self._shared or block in self._shared_pinned

    def to_give_up(self, need: int) -> list[BlockId]:
        """Shared blocks of about `need` bytes that nobody reads, of the first ones those not read lately first."""
        with self._lock:
            return self._to_give_up(need, lambda: iter(self._shared))

    def _to_give_up(self, need: int, shared: Callable[[], Iterator[BlockId]]) -> list[BlockId]:
        found: dict[BlockId, None] = {}
        cold = (block for block in itertools.islice(shared(), _COLD_AMONG) if not self._sieve.is_visited(block))
        for block in itertools.chain(cold, shared()):
            if need <= 0:
                break
            if block not in found and self._can_evict(block):
                found[block] = None
                need -= self._sealed[block]
        return list(found)

    def _idle(self) -> deque[BlockId]:
        """Blocks that count as free, longest idle first; looked for now and then only, since that looks at all of them.

        Some may have been read or have gone since.
        """
        now = time.monotonic()
        if now >= self._idle_next:
            idle = (block for block in self._groups.candidates(now) if block not in self._retired)
            self._idle_queue = deque([*self._retired, *idle])
            self._idle_next = now + _IDLE_EVERY_S
        return self._idle_queue

    @property
    def pinned_bytes(self) -> int:
        """What sealed blocks take that are never evicted."""
        return self._pinned_bytes

    def need(self, length: int) -> int:
        """What a block of that length takes, its checksums included."""
        return estimate(length, self._geometry.page_count(length))

    def room_bytes(self) -> int:
        """What could be taken in without evicting anything."""
        with self._lock:
            return self._space.room(self._unwritten())

    def status(self) -> TierStatus:
        with self._lock:
            return TierStatus(
                self._space.capacity,
                self._space.used,
                self._space.reserved,
                len(self._sealed),
                len(self._suspect),
                len(self._open) + len(self._dormant),
                self._evictions,
                self._pinned_bytes,
            )

    def _unwritten(self) -> int:
        return sum(partial.unwritten_bytes for partial in self._open.values())

    # ---- filling ---------------------------------------------------------------------------------------------------

    def open_partial(self, block: BlockId, length: int, *, evict: bool = True, is_copy: bool = False) -> Partial | None:
        """The partial of a block of `length` bytes, resumed or new, with room reserved for all of it.

        Every call is paired with one `close`. None when the block is sealed already. Raises CapacityError when there is
        no room, and nothing more may be evicted: without `evict`, only what is idle or retired may. OSError for other
        trouble with the disk. One that `is_copy` counts for no quota until `count_copy` is called.
        """
        with self._lock:
            if block in self._sealed:
                return None
            partial = self._open.get(block)
            if partial is None:
                if is_copy:
                    self._count(block, 0)
                    self._copies.add(block)
                try:
                    partial = self._make_partial(block, length, evict)
                except BaseException:
                    self._count_copy(block)
                    raise
                self._open[block] = partial
            partial.users += 1
            return partial

    def _make_partial(self, block: BlockId, length: int, evict: bool) -> Partial:
        page_size = self._geometry.page_size
        need = estimate(length, self._geometry.page_count(length))
        dormant = self._dormant.pop(block, 0)
        self._space.used -= dormant
        try:
            self._make_room(need, evict)
            partial = None
            if dormant:
                try:
                    partial = resume_partial(self._layout, block, length, page_size, next(self._serials))
                except BlockCorruptError as error:
                    logger.info("partial dropped block=%s error=%s", block.filename, error)
                    self._unlink(self._layout.partial_fd, block)
                    dormant = 0
            if partial is None:
                partial = create_partial(self._layout, block, length, page_size, next(self._serials))
        except BaseException:
            if dormant:
                self._dormant[block] = dormant
                self._space.used += dormant
            self._count(block, dormant)
            raise
        self._space.reserved += need
        self._count(block, need)
        return partial

    def _count(self, block: BlockId, size: int, *, sealed: bool = False) -> None:
        """What it takes now, for quotas; 0: it is gone."""
        if self._quotas.active and self._counts and block not in self._copies:
            self._book.put(block, size, sealed=sealed)

    def close(self, partial: Partial) -> None:
        """One user of `open_partial` is done. What an unfinished partial has stays on disk, to be resumed.

        Raises OSError, having closed it, when a file that is of no use cannot be removed.
        """
        with self._lock:
            partial.users -= 1
            if partial.users == 0:
                try:
                    if self._open.get(partial.block) is partial:
                        self._put_to_sleep(partial)
                finally:
                    partial.close()

    def _put_to_sleep(self, partial: Partial) -> None:
        block = partial.block
        del self._open[block]
        self._space.reserved -= estimate(partial.length, partial.page_count)
        if partial.resumable:
            self._count_dormant(partial)
        else:
            self._remove_partial(partial)

    def _count_dormant(self, partial: Partial) -> None:
        # What was written, not st_blocks: late allocation would make it too small.
        held = partial.length - min(partial.length, partial.unwritten_bytes) + sums.file_size(partial.page_count)
        self._dormant[partial.block] = held
        self._space.used += held
        self._count(partial.block, held)

    def _remove_partial(self, partial: Partial) -> None:
        try:
            self._unlink(self._layout.partial_fd, partial.block)
        except OSError:
            # It takes its room still, until its block is filled anew or others need the room.
            self._count_dormant(partial)
            raise
        self._count(partial.block, 0)

    def seal(self, partial: Partial) -> None:
        """Make a complete partial a sealed block: every page is read back and compared first. Blocks on the disk.

        Does nothing to one that is sealed. Raises BlockCorruptError when a page is not what was written (it is absent
        now, and may be written again), when the file is not the one that was opened (the partial is dropped), or when
        the partial is not complete or was dropped; CapacityError, OSError.
        """
        with partial.seal_lock:
            if partial.sealed:
                return
            if partial.dropped or not partial.complete:
                raise BlockCorruptError(f"{partial.block.filename}: cannot be sealed, it is not complete")
            partial.verify()
            try:
                self._check_name(partial)
            except BlockCorruptError:
                self._drop_partial(partial)
                raise
            partial.finish()
            with self._lock:
                self._publish(partial)

    def _check_name(self, partial: Partial) -> None:
        """What was verified is the open file; the name is what readers will open. Raises BlockCorruptError, OSError."""
        own = os.fstat(partial.read_fd)
        try:
            named = os.stat(data_name(partial.block), dir_fd=self._layout.partial_fd, follow_symlinks=False)
        except FileNotFoundError as error:
            raise BlockCorruptError(f"{partial.block.filename}: its file is gone") from error
        if (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino):
            raise BlockCorruptError(f"{partial.block.filename}: another file has taken its name")
        if own.st_size != partial.length:
            raise BlockCorruptError(f"{partial.block.filename}: its file has {own.st_size} bytes")

    def _publish(self, partial: Partial) -> None:
        block = partial.block
        # The checksums first: a data file without them is a miss, checksums without data are nothing.
        for name in (sums_name(block), data_name(block)):
            os.rename(name, name, src_dir_fd=self._layout.partial_fd, dst_dir_fd=self._layout.sealed_fd)
        partial.sealed = True
        del self._open[block]
        self._space.reserved -= estimate(partial.length, partial.page_count)
        self._add_sealed(block, os.fstat(partial.read_fd), partial.page_count)
        if self.config.kind == "ssd":
            self._unsynced.append(block)

    def _add_sealed(self, block: BlockId, data: os.stat_result, page_count: int) -> None:
        size = allocated_bytes(data) + estimate(0, page_count)
        self._count_sealed(block, size)

    def _count_sealed(self, block: BlockId, size: int) -> None:
        self._sealed[block] = size
        self._space.used += size
        self._sieve.add(block)
        self._groups.add(block, size, time.monotonic())
        self._count(block, size, sealed=True)
        self._sort_by_pin(block)

    def give_up(self, partial: Partial) -> None:
        """Forget an open partial and remove its files: writing to it raises from now on. Blocks on the disk.

        Waits for who is sealing it, and does nothing when it is sealed then. Raises OSError, having forgotten it.
        """
        with partial.seal_lock:
            if not partial.sealed:
                # First, as a writer under way may make the file of checksums anew.
                partial.refuse_writers()
                self._drop_partial(partial)

    def _drop_partial(self, partial: Partial) -> None:
        with self._lock:
            if self._open.get(partial.block) is partial:
                partial.dropped = True
                del self._open[partial.block]
                self._space.reserved -= estimate(partial.length, partial.page_count)
                self._remove_partial(partial)

    # ---- going -----------------------------------------------------------------------------------------------------

    def holds(self, block: BlockId) -> bool:
        """Whether there is a partial of it, open or not."""
        return block in self._open or block in self._dormant

    def drop(self, block: BlockId) -> None:
        """Give up a sealed block, read by somebody or not: open descriptors keep working, nobody gets new ones."""
        with self._lock:
            if block in self._sealed:
                self._forget_sealed(block)

    def _forget_sealed(self, block: BlockId) -> None:
        # Data first: from that moment it is a miss.
        self._unlink(self._layout.sealed_fd, block)
        self._discount_sealed(block)

    def _discount_sealed(self, block: BlockId) -> None:
        self._set_shared(block, False)
        size = self._sealed.pop(block)
        self._space.used -= size
        if self._sieve.is_pinned(block):
            self._pinned_bytes -= size
        self._sieve.remove(block)
        self._groups.remove(block)
        self._retired.pop(block, None)
        self._count(block, 0)
        self.on_evicted(block)

    def _make_room(self, need: int, evict: bool) -> None:
        """Evict until `need` more bytes can be promised; without `evict`, only what counts as free.

        Raises CapacityError, possibly having evicted.
        """
        if need > self._space.capacity:
            raise CapacityError(f"a block of {need} bytes is larger than the tier")
        if need > self._space.capacity - self._space.reserved - self._pinned_bytes:
            # Told before anything is evicted for nothing.
            raise CapacityError(f"no room for {need} bytes beside what is pinned and being filled")
        unwritten = self._unwritten()
        if self._space.room(unwritten) >= need:
            return
        for block in list(self._dormant):
            if self._evict_dormant(block) and self._space.room(unwritten) >= need:
                return
        for block in self._to_evict(evict):
            if self._evict(self._layout.sealed_fd, block):
                self._discount_sealed(block)
                self._evictions += 1
                if self._space.room(unwritten) >= need:
                    return
        raise CapacityError(f"no room for {need} bytes: the rest of the tier is being read, filled, or kept")

    def _to_evict(self, evict: bool) -> Iterator[BlockId]:
        idle = self._idle()
        now = time.monotonic()
        for _ in range(len(idle)):
            block = idle.popleft()
            is_free = block in self._retired or self._groups.is_idle(block, now)
            if is_free and not self._sieve.is_pinned(block):
                yield block
                if block in self._sealed:
                    idle.append(block)
        if self._quotas.active:
            for quota in self._quotas.over():
                for block in self._book.candidates(quota):
                    if not self._quotas.is_over(quota):
                        break
                    if block not in self._shared:
                        yield block
        if evict:
            # What others hold as well is given up first, and by agreement only: see `to_give_up`.
            yield from (block for block in self._sieve.candidates() if block not in self._shared)

    def _evict_dormant(self, block: BlockId, later: list[int] | None = None) -> bool:
        gone = self._evict(self._layout.partial_fd, block, later)
        if gone:
            self._space.used -= self._dormant.pop(block)
            self._count(block, 0)
        return gone

    # ---- quotas ----------------------------------------------------------------------------------------------------

    def apply_quotas(self, blocks: Iterable[BlockId] | None = None) -> None:
        """Others count for quotas than before: of these blocks, or all that are here. All are taken in portions, so
        that nobody waits for long.
        """
        if not self._quotas.active:
            with self._lock:
                self._book = QuotaBook(self._quotas)
            return
        if blocks is None:
            with self._lock:
                blocks = [*self._sealed, *self._open, *self._dormant]
        waiting = list(blocks)
        for start in range(0, len(waiting), _SORTED_AT_ONCE):
            with self._lock:
                for block in waiting[start : start + _SORTED_AT_ONCE]:
                    self._sort_by_quota(block)
        with self._lock:
            self._free_of = FreeOfQuotas({}, 0.0)

    def count(self, counts: Callable[[], bool]) -> None:
        """Whether what is here counts for quotas from now on, as is found with the lock held. Looks at every block."""
        with self._lock:
            self._counts = counts()
            self._book.clear()
            self._free_of = FreeOfQuotas({}, 0.0)
        if self._counts:
            self.apply_quotas()

    def count_copy(self, block: BlockId) -> None:
        """It went from the other tier, or is to stay there: what is here counts from now on."""
        with self._lock:
            self._count_copy(block)

    def _count_copy(self, block: BlockId) -> None:
        if block in self._copies:
            self._copies.discard(block)
            if self._quotas.active:
                self._sort_by_quota(block)

    def _sort_by_quota(self, block: BlockId) -> None:
        if not self._counts or block in self._copies:
            return
        if block in self._sealed:
            self._book.sort(block, self._sealed[block], sealed=True)
            self._book.pin(block, self._sieve.is_pinned(block))
            self._book.share(block, block in self._shared)
        elif block in self._open:
            partial = self._open[block]
            self._book.sort(block, estimate(partial.length, partial.page_count), sealed=False)
        elif block in self._dormant:
            self._book.sort(block, self._dormant[block], sealed=False)

    def quota_bytes(self, block: BlockId) -> int:
        """What it is counted with for quotas: sealed, being filled, or in part."""
        return self._book.held(block)

    def free_of_quota(self, quota: int) -> tuple[int, int]:
        """Of what counts for a quota: (what is idle, what others hold as well and is not idle). About a second old."""
        with self._lock:
            idle = self._look_for_free().idle.get(quota, ())
            shared = sum(self._sealed[block] for block in idle if block in self._shared)
            return sum(self._sealed.get(block, 0) for block in idle), self._book.shared_bytes(quota) - shared

    def _look_for_free(self) -> FreeOfQuotas:
        began = time.monotonic()
        if began >= self._free_of.until:
            found = FreeOfQuotas({}, 0.0)
            for block in self._idle():
                for quota in self._book.counts_for(block):
                    if not self._sieve.is_pinned(block):
                        found.idle.setdefault(quota, deque()).append(block)
            now = time.monotonic()
            # Looking at all of it takes at most a fiftieth of the time.
            self._free_of = found._replace(until=now + max(_FREE_EVERY_S, 50 * (now - began)))
        return self._free_of

    def to_give_up_of_quota(self, quota: int, need: int) -> list[BlockId]:
        """As `to_give_up`, of what counts for a quota."""
        with self._lock:
            return self._to_give_up(need, lambda: self._book.shared(quota))

    def make_room_in_quota(self, quota: int, need: int, wanted: BlockId | None, *, evict: bool) -> int:
        """Give up what counts for a quota until it is `need` bytes less, perhaps for a block that is wanted: what is in
        parts and idle first; without `evict`, nothing else. Returns how much less it is, perhaps not enough: a call
        gives up some blocks only.
        """
        freed = 0
        with self._lock:
            dormant = [each for each in self._dormant if each != wanted and quota in self._book.counts_for(each)]
            sealed = self._to_evict_of_quota(quota, evict)
        for block in dormant:
            if freed >= need:
                break
            with self._closed_later() as later:
                if block in self._dormant:
                    size = self._dormant[block]
                    freed += size if self._evict_dormant(block, later) else 0
        for _ in range(_EVICTED_AT_ONCE):
            if freed >= need:
                break
            with self._closed_later() as later:
                found = next(sealed, None)
                if found is None:
                    break
                size = self._sealed.get(found, 0)
                if size and self._evict(self._layout.sealed_fd, found, later):
                    self._discount_sealed(found)
                    self._evictions += 1
                    freed += size
        return freed

    @contextmanager
    def _closed_later(self) -> Iterator[list[int]]:
        """Holds the lock for one block to be evicted, and closes its file without it: that is when a file system gives
        its room back, and for a large block it takes a good part of a second.
        """
        later: list[int] = []
        try:
            with self._lock:
                yield later
        finally:
            for fd in later:
                os.close(fd)

    def _to_evict_of_quota(self, quota: int, evict: bool) -> Iterator[BlockId]:
        """Others may be at it as well, and change things between two steps: each is taken with the lock held."""
        now = time.monotonic()
        idle = self._look_for_free().idle.get(quota, deque())
        for _ in range(len(idle)):
            if not idle:
                break
            block = idle[0]
            is_free = block in self._retired or self._groups.is_idle(block, now)
            is_free = is_free and block in self._sealed and not self._sieve.is_pinned(block)
            if is_free:
                yield block
            # Only now, as nobody may have asked for the next one.
            if idle and idle[0] == block:
                idle.popleft()
                if is_free and block in self._sealed:
                    idle.append(block)
        if evict:
            yield from (block for block in self._book.candidates(quota) if block not in self._shared)

    # ---- pins ------------------------------------------------------------------------------------------------------

    def apply_pins(self, blocks: Iterable[BlockId] | None = None) -> None:
        """What is pinned was changed: for these blocks, or all that are sealed. All are taken in portions, so that
        nobody waits for long.
        """
        waiting = list(blocks) if blocks is not None else [block for block, _ in self.blocks()]
        for start in range(0, len(waiting), _SORTED_AT_ONCE):
            with self._lock:
                for block in waiting[start : start + _SORTED_AT_ONCE]:
                    self._sort_by_pin(block)

    def _sort_by_pin(self, block: BlockId) -> None:
        size = self._sealed.get(block)
        if size is None:
            return
        if block.key in self._pinned:
            self._pinned_bytes += size if self._sieve.pin(block) else 0
        else:
            self._pinned_bytes -= size if self._sieve.unpin(block) else 0
        if self._quotas.active:
            self._book.pin(block, self._sieve.is_pinned(block))
        self._set_shared(block, self._is_shared(block))

    def _evict(self, directory_fd: int, block: BlockId, later: list[int] | None = None) -> bool:
        """Unlink a block that nobody reads; False if somebody does. With `later`, its descriptor is added to that, and
        its room is free once it is closed.
        """
        try:
            fd = os.open(data_name(block), READ_FLAGS, dir_fd=directory_fd)
        except OSError as error:
            if error.errno not in _NOTHING_TO_READ:
                raise
            self._unlink(directory_fd, block)
            return True
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # While we hold the lock nobody can take the file into use: a reader rechecks the name after locking.
            self._unlink(directory_fd, block)
            return True
        finally:
            if later is None:
                os.close(fd)
            else:
                later.append(fd)

    def _can_evict(self, block: BlockId) -> bool:
        try:
            fd = os.open(data_name(block), READ_FLAGS, dir_fd=self._layout.sealed_fd)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _unlink(self, directory_fd: int, block: BlockId) -> None:
        for name in (data_name(block), sums_name(block)):
            try:
                unlink_if_exists(name, directory_fd)
            except OSError as error:
                if not is_in_the_way(error):
                    raise
                logger.warning("left where it is file=%s error=%s", error.filename, error.strerror)

    # ---- verifying -------------------------------------------------------------------------------------------------

    def is_suspect(self, block: BlockId) -> bool:
        """It was sealed in an earlier boot; `restore` tells what it is worth."""
        return block in self._suspect

    def restore(self, block: BlockId) -> bool:
        """Verify a suspect block and put it back, or drop it; whether it is sealed now. Blocks on the disk.

        For want of descriptors or memory it stays suspect.
        """
        with self._lock:
            size = self._suspect.pop(block, None)
        if size is None:
            return self.is_sealed(block)
        try:
            good = self._verify_in(self._layout.suspect_fd, block)
        except OSError as error:
            logger.info("suspect still block=%s error=%s", block.filename, error)
            with self._lock:
                self._suspect[block] = size
            return False
        with self._lock:
            self._space.used -= size
            if not good or block in self._open or block in self._sealed:
                if not good:
                    logger.warning("block dropped, it is damaged since the last boot block=%s", block.filename)
                self._unlink(self._layout.suspect_fd, block)
                return block in self._sealed
            for name in (sums_name(block), data_name(block)):
                os.rename(name, name, src_dir_fd=self._layout.suspect_fd, dst_dir_fd=self._layout.sealed_fd)
            self._count_sealed(block, size)
            return True

    def suspects(self) -> list[BlockId]:
        with self._lock:
            return list(self._suspect)

    def check(self, block: BlockId, *, as_read: bool = False) -> bool:
        """Read a sealed block from the medium and compare; False only if it is damaged. Blocks on the disk. With
        `as_read`, what the page cache has of it is compared as well.

        Nothing is changed: `drop` it then. A block that goes meanwhile is not damaged, nor is one that cannot be read
        for want of descriptors or memory.
        """
        try:
            good = self._verify_in(self._layout.sealed_fd, block)
            if good and as_read:
                good = self._verify_in(self._layout.sealed_fd, block, open_cached)
        except OSError as error:
            logger.info("not checked block=%s error=%s", block.filename, error)
            return True
        return good or not self.is_sealed(block)

    def checksums(self, block: BlockId) -> sums.Sums:
        """Of a sealed block. Raises BlockCorruptError, also when it is not sealed any more; OSError as `sums.read`."""
        return sums.read(block, sums_name(block), self._layout.sealed_fd)

    def _verify_in(self, directory_fd: int, block: BlockId, opened: Opened = open_uncached) -> bool:
        """Raises OSError for want of descriptors or memory."""
        try:
            expected = sums.read(block, sums_name(block), directory_fd)
            with opened(data_name(block), directory_fd) as fd:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_size != expected.length:
                    raise BlockCorruptError(f"{block.filename}: has another length than its checksums")
                verify_pages(block, fd, expected)
        except (BlockCorruptError, OSError) as error:
            if is_of_the_process(error):
                raise
            logger.info("block is damaged block=%s error=%s", block.filename, error)
            for each in (error, error.__cause__):
                if isinstance(each, OSError) and is_of_the_medium(each):
                    self.on_failed(each, True)
            return False
        return True

    # ---- moving to another tier ------------------------------------------------------------------------------------

    def room_share(self) -> float:
        """The part of the capacity that is free."""
        return self.room_bytes() / self._space.capacity

    def coldest(self, limit: int) -> list[BlockId]:
        """Up to `limit` sealed blocks that nobody reads, those to evict first in front."""
        found = []
        with self._lock:
            for block in self._sieve.candidates():
                if self._can_evict(block):
                    found.append(block)
                if len(found) == limit:
                    break
        return found

    def copy_to(self, block: BlockId, other: Tier, *, evict: bool) -> None:
        """Make a sealed copy in another tier. Blocks on both disks. It counts for quotas there once its `count_copy` is
        called.

        Every page is compared on the way. Raises BlockCorruptError, CapacityError, BlockMissingError, OSError.
        """
        try:
            known = sums.read(block, sums_name(block), self._layout.sealed_fd)
            fd = os.open(data_name(block), READ_FLAGS, dir_fd=self._layout.sealed_fd)
        except (BlockCorruptError, OSError) as error:
            if not self.is_sealed(block):
                raise BlockMissingError(f"{block.filename}: went away") from error
            if is_of_the_process(error):
                raise
            raise BlockCorruptError(f"{block.filename}: cannot be read: {error}") from error
        try:
            partial = other.open_partial(block, known.length, evict=evict, is_copy=True)
            if partial is None:
                return
            try:
                for page, checksum in enumerate(known.checksums):
                    if checksum is None:
                        raise BlockCorruptError(f"{block.filename}: page {page} has no checksum")
                    partial.write_page(page, _read_page(fd, known, page, block), checksum)
                other.seal(partial)
            finally:
                other.close(partial)
        finally:
            os.close(fd)

    def evict(self, block: BlockId) -> bool:
        """Give up a sealed block unless somebody reads it; whether it is gone. Raises OSError."""
        with self._lock:
            if block not in self._sealed:
                return True
            gone = self._evict(self._layout.sealed_fd, block)
            if gone:
                self._discount_sealed(block)
            return gone

    # ---- reaching the medium ---------------------------------------------------------------------------------------

    def sync_sealed(self) -> list[BlockId]:
        """Write what was sealed since the last time to the medium; returns what could not be, and was dropped.

        Blocks on the disk. A write-back error means that the file may hold other bytes than were written.
        """
        lost = []
        while self._unsynced:
            block = self._unsynced.popleft()
            opened = False
            try:
                for name in (data_name(block), sums_name(block)):
                    opened = False
                    fd = os.open(name, READ_FLAGS, dir_fd=self._layout.sealed_fd)
                    opened = True
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                if not opened and is_of_the_process(error):
                    # Next time. What fails while it is written is told only once, whatever the reason.
                    self._unsynced.appendleft(block)
                    break
                logger.warning("block dropped, the disk failed to write it block=%s error=%s", block.filename, error)
                self.on_failed(error, False)
                self.drop(block)
                lost.append(block)
        return lost

    def distrust(self) -> None:
        """Take what is sealed for suspect, as after a reboot: `restore` tells what it is worth. Blocks on the disk.

        Raises OSError, having done part of it.
        """
        waiting = [block for block, _ in self.blocks()]
        for start in range(0, len(waiting), _SORTED_AT_ONCE):
            with self._lock:
                for block in waiting[start : start + _SORTED_AT_ONCE]:
                    size = self._sealed.get(block)
                    if size is None:
                        continue
                    # Data first: from that moment it is a miss.
                    for name in (data_name(block), sums_name(block)):
                        # Half of a block may be gone, where the disk failed to remove the other: it is not restored.
                        with suppress(FileNotFoundError):
                            os.rename(name, name, src_dir_fd=self._layout.sealed_fd, dst_dir_fd=self._layout.suspect_fd)
                    self._discount_sealed(block)
                    self._suspect[block] = size
                    self._space.used += size

    def try_disk(self) -> None:
        """As `probe.try_disk`."""
        try_disk(self._layout.tier_fd)

    # ---- start and end ---------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Find what an earlier worker left. What cannot be used is removed."""
        boot_id = running_boot_id()
        known = self._layout.read_tier_file()
        if known is None or known.boot_id != boot_id:
            recovery.empty(self._layout.partial_fd)
            recovery.move_all(self._layout.sealed_fd, self._layout.suspect_fd)
        for source_fd in (self._layout.partial_fd, self._layout.suspect_fd):
            recovery.rejoin(self._layout.sealed_fd, source_fd)
        for block, found in recovery.scan(self._layout.partial_fd):
            self._dormant[block] = size = found.st_blocks * 512
            self._space.used += size
        for block, found in recovery.scan(self._layout.suspect_fd):
            self._suspect[block] = size = allocated_bytes(found) + estimate(0, 1)
            self._space.used += size
        for block, found in recovery.scan(self._layout.sealed_fd):
            self._add_sealed(block, found, self._geometry.page_count(found.st_size))
        if known is None or known.boot_id != boot_id:
            # Last: a mount uses the tier directly as soon as it carries this boot's id.
            self._layout.write_tier_file(TierFile(FORMAT_VERSION, self._cluster_id, boot_id))

    def close_all(self) -> None:
        """At the end: what is open is left as it is on disk."""
        with self._lock:
            for partial in list(self._open.values()):
                with suppress(OSError):
                    self._put_to_sleep(partial)
                partial.close()


def _read_page(fd: int, known: sums.Sums, page: int, block: BlockId) -> bytes:
    """Raises BlockCorruptError for what is cut off or cannot be read; OSError for want of memory."""
    offset, span = known.geometry.page_span(known.length, page)
    try:
        data = os.pread(fd, span, offset)
    except OSError as error:
        if is_of_the_process(error):
            raise
        raise BlockCorruptError(f"{block.filename}: page {page} cannot be read: {error.strerror}") from error
    if len(data) != span:
        raise BlockCorruptError(f"{block.filename}: page {page} is cut off")
    return data


@contextmanager
def open_tier(
    config: TierConfig,
    geometry: Geometry,
    cluster_id: str,
    pinned: PinnedKeys | None = None,
    quotas: Quotas | None = None,
) -> Iterator[Tier]:
    """Open or create a tier, alone, until the end of the block. Blocks on the disk while it looks at what is there.
    `pinned` are the contents that it never evicts; who changes them calls `Tier.apply_pins`, and who changes `quotas`
    calls `Tier.apply_quotas`.

    Raises ConfigError, and TierError as `layout.open_layout`.
    """
    check_capacity(config, geometry.page_size)
    with open_layout(config.path, cluster_id) as layout:
        check_medium(config, layout.tier_fd)
        tier = Tier(config, layout, geometry, cluster_id, pinned or PinnedKeys(), quotas or Quotas())
        with tier_errors(f"tier {config.path}"):
            tier.recover()
        try:
            yield tier
        finally:
            tier.close_all()
