"""The blocks a worker holds on one tier: opening, sealing, evicting, verifying, syncing.

A block is in exactly one of: nowhere, `Dormant` (a partial on disk that nobody has open), `Partials` (one that somebody
has), `SealedBlocks`, `Suspects`. How these stay consistent:

- One lock guards them, the ledger (`Space`) and what counts for quotas (`QuotaBook`). It is held for look-ups, renames
  and unlinks, never while pages are written, read back or compared. `Partials`, `Suspects` and `TierQuotas` take it
  themselves where they say so; all others are called with it held.
- Space is reserved for a partial's full length before its file exists, by evicting where needed (`Eviction`). Only
  what nobody reads is evicted: whoever reads holds a shared lock on the open file, and eviction wants the exclusive
  one. What is pinned is never evicted to make room, nor moved away; damaged, it is dropped like anything else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cachefs.model import BlockId, Geometry
from cachefs.store.block_files import BlockFiles
from cachefs.store.config import TierConfig, check_capacity, check_medium
from cachefs.store.copying import open_original
from cachefs.store.dormant import Dormant
from cachefs.store.eviction import Eviction
from cachefs.store.layout import Layout, open_layout, tier_errors
from cachefs.store.page_io import open_cached
from cachefs.store.partial import Partial
from cachefs.store.partials import Partials
from cachefs.store.pinned import PinnedKeys
from cachefs.store.portions import portions
from cachefs.store.probe import try_disk
from cachefs.store.quota_book import QuotaBook
from cachefs.store.quotas import Quotas
from cachefs.store.recovery import recover
from cachefs.store.sealed import SealedBlocks
from cachefs.store.space import Space, estimate
from cachefs.store.sums import Sums
from cachefs.store.suspects import Suspects
from cachefs.store.tier_quotas import TierQuotas
from cachefs.store.unsynced import Unsynced

logger = logging.getLogger(__name__)


class TierStatus(NamedTuple):
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    sealed: int
    suspect: int
    partials: int
    evictions: int
    pinned_bytes: int


class Tier:
    """One directory of blocks, from opening it until its end. Made by `open_tier`.

    Callable from any thread; what reads or writes pages blocks on the disk and says so.
    """

    def __init__(
        self,
        config: TierConfig,
        layout: Layout,
        geometry: Geometry,
        pinned: PinnedKeys,
        quotas: Quotas,
    ) -> None:
        self.config = config
        self.on_evicted: Callable[[BlockId], None] = lambda block: None
        """Called, from whatever thread, with each sealed block that goes; must not call back into the tier."""
        self.on_failed: Callable[[OSError, bool], None] = lambda error, reading: None
        """Called, from whatever thread, when the disk fails to read (True) or to write (False) a sealed block."""
        self._layout = layout
        self._geometry = geometry
        self._lock = threading.Lock()
        self._space = Space(layout.tier_fd, config.capacity_bytes, config.free_floor_bytes)
        self._book = QuotaBook(quotas)
        sealed, partial, suspect = (
            BlockFiles(directory_fd, lambda error: self.on_failed(error, True))
            for directory_fd in (layout.sealed_fd, layout.partial_fd, layout.suspect_fd)
        )
        self._sealed = SealedBlocks(
            sealed, self._space, self._book, pinned, config.idle_after_s, lambda block: self.on_evicted(block)
        )
        self._dormant = Dormant(partial, self._space, self._book)
        self._eviction = Eviction(self._space, self._sealed, self._dormant)
        self._partials = Partials(
            self._lock,
            layout,
            geometry,
            self._space,
            self._book,
            partial,
            self._dormant,
            self._sealed,
            self._eviction,
        )
        self._suspects = Suspects(self._lock, self._space, suspect, self._sealed, self._partials)
        self._unsynced = Unsynced(layout.sealed_fd, self.drop, lambda error: self.on_failed(error, False))
        self.quotas = TierQuotas(
            self._lock, quotas, self._book, self._sealed, self._partials, self._dormant, self._eviction
        )
        """What counts for quotas here, and makes room in them."""

    # ---- what is here ----------------------------------------------------------------------------------------------

    def is_sealed(self, block: BlockId) -> bool:
        return block in self._sealed

    def holds(self, block: BlockId) -> bool:
        """Whether there is a partial of it, open or not."""
        return block in self._partials or block in self._dormant

    def blocks(self) -> list[tuple[BlockId, int]]:
        """The sealed blocks and the bytes they take."""
        with self._lock:
            return self._sealed.sizes()

    def held_bytes(self, block: BlockId) -> int:
        """What a block takes on the disk, sealed, or in part and with nobody at it; 0 if it is not here."""
        return self._sealed.size(block) or self._dormant.size(block)

    def status(self) -> TierStatus:
        with self._lock:
            return TierStatus(
                self._space.capacity,
                self._space.used,
                self._space.reserved,
                len(self._sealed),
                len(self._suspects),
                len(self._partials) + len(self._dormant),
                self._eviction.count,
                self._sealed.pinned_bytes,
            )

    # ---- what there is room for ------------------------------------------------------------------------------------

    def need(self, length: int) -> int:
        """What a block of that length takes, its checksums included."""
        return estimate(length, self._geometry.page_count(length))

    def room_bytes(self) -> int:
        """What could be taken in without evicting anything."""
        with self._lock:
            return self._space.room(self._partials.unwritten_bytes())

    def room_share(self) -> float:
        """The part of the capacity that is free."""
        return self.room_bytes() / self._space.capacity

    def idle_bytes(self) -> int:
        """What blocks take that are retired, or came with others of which none was read for `idle_after_s`; some
        seconds old. Pinned ones are never idle. With them, what is here of what is beyond a quota and nobody else
        holds: it counts as free like that.
        """
        with self._lock:
            return self._sealed.idle_bytes()

    def shared_bytes(self) -> int:
        """What blocks take that other nodes hold as well, those that are pinned or idle left out."""
        with self._lock:
            return self._sealed.shared_bytes()

    @property
    def pinned_bytes(self) -> int:
        """What sealed blocks take that are never evicted."""
        return self._sealed.pinned_bytes

    # ---- what is known of blocks -----------------------------------------------------------------------------------

    def visited(self, block: BlockId) -> None:
        """Somebody read it: evict others first."""
        with self._lock:
            self._sealed.visit(block)

    def retire(self, block: BlockId) -> None:
        """Nobody will ask for it again: its object changed. Evicted first, and counts as free until then."""
        with self._lock:
            self._sealed.retire(block)

    def share(self, blocks: Iterable[BlockId], shared: bool) -> None:
        """Other nodes hold these as well, or do not any more."""
        with self._lock:
            for block in blocks:
                self._sealed.share(block, shared)

    def unshare_all(self) -> None:
        """Nothing is known of other nodes any more."""
        with self._lock:
            self._sealed.shared.clear()

    def apply_pins(self, blocks: Iterable[BlockId] | None = None) -> None:
        """What is pinned was changed: for these blocks, or all that are sealed. All are taken in portions, so that
        nobody waits for long.
        """
        for portion in portions(blocks if blocks is not None else [block for block, _ in self.blocks()]):
            with self._lock:
                for block in portion:
                    self._sealed.sort_by_pin(block)

    # ---- filling ---------------------------------------------------------------------------------------------------

    def open_partial(self, block: BlockId, length: int, *, evict: bool = True, is_copy: bool = False) -> Partial | None:
        """The partial of a block of `length` bytes, resumed or new, with room reserved for all of it.

        Every call is paired with one `close`. None when the block is sealed already. Raises CapacityError when there is
        no room, and nothing more may be evicted: without `evict`, only what is idle or retired may. OSError for other
        trouble with the disk. One that `is_copy` counts for no quota until `TierQuotas.count_copy` is called.
        """
        return self._partials.open(block, length, evict=evict, is_copy=is_copy)

    def close(self, partial: Partial) -> None:
        """One user of `open_partial` is done. What an unfinished partial has stays on disk, to be resumed.

        Raises OSError, having closed it, when a file that is of no use cannot be removed.
        """
        self._partials.close(partial)

    def seal(self, partial: Partial) -> None:
        """Make a complete partial a sealed block: every page is read back and compared first. Blocks on the disk.

        Does nothing to one that is sealed. Raises BlockCorruptError when a page is not what was written (it is absent
        now, and may be written again), when the file is not the one that was opened (the partial is dropped), or when
        the partial is not complete or was dropped; CapacityError, OSError.
        """
        if self._partials.seal(partial) and self.config.kind == "ssd":
            self._unsynced.add(partial.block)

    def give_up(self, partial: Partial) -> None:
        """Forget an open partial and remove its files: writing to it raises from now on. Blocks on the disk.

        Waits for who is sealing it, and does nothing when it is sealed then. Raises OSError, having forgotten it.
        """
        self._partials.give_up(partial)

    # ---- going -----------------------------------------------------------------------------------------------------

    def to_give_up(self, need: int) -> list[BlockId]:
        """Shared blocks of about `need` bytes that nobody reads, of the first ones those not read lately first."""
        with self._lock:
            return self._eviction.to_give_up(need, lambda: iter(self._sealed.shared))

    def coldest(self, limit: int) -> list[BlockId]:
        """Up to `limit` sealed blocks that nobody reads, those to evict first in front."""
        with self._lock:
            return self._eviction.coldest(limit)

    def copy_to(self, block: BlockId, other: Tier, *, evict: bool) -> None:
        """Make a sealed copy in another tier. Blocks on both disks. It counts for quotas there once
        `TierQuotas.count_copy` is called.

        Every page is compared on the way. Raises BlockCorruptError, CapacityError, BlockMissingError, OSError.
        """
        with open_original(block, self._sealed) as original:
            partial = other.open_partial(block, original.length, evict=evict, is_copy=True)
            if partial is not None:
                try:
                    original.copy_into(partial)
                    other.seal(partial)
                finally:
                    other.close(partial)

    def evict(self, block: BlockId) -> bool:
        """Give up a sealed block unless somebody reads it; whether it is gone. Raises OSError."""
        with self._lock:
            return block not in self._sealed or self._sealed.evict(block)

    def drop(self, block: BlockId) -> None:
        """Give up a sealed block, read by somebody or not: open descriptors keep working, nobody gets new ones."""
        with self._lock:
            self._sealed.drop(block)

    # ---- verifying -------------------------------------------------------------------------------------------------

    def is_suspect(self, block: BlockId) -> bool:
        """It was sealed in an earlier boot; `restore` tells what it is worth."""
        return block in self._suspects

    def suspects(self) -> list[BlockId]:
        return self._suspects.blocks()

    def restore(self, block: BlockId) -> bool:
        """Verify a suspect block and put it back, or drop it; whether it is sealed now. Blocks on the disk.

        For want of descriptors or memory it stays suspect.
        """
        return self._suspects.restore(block)

    def distrust(self) -> None:
        """Take what is sealed for suspect, as after a reboot: `restore` tells what it is worth. Blocks on the disk.

        Raises OSError, having done part of it.
        """
        self._suspects.distrust()

    def check(self, block: BlockId, *, as_read: bool = False) -> bool:
        """Read a sealed block from the medium and compare; False only if it is damaged. Blocks on the disk. With
        `as_read`, what the page cache has of it is compared as well.

        Nothing is changed: `drop` it then. A block that goes meanwhile is not damaged, nor is one that cannot be read
        for want of descriptors or memory.
        """
        files = self._sealed.files
        try:
            good = files.is_good(block) and (not as_read or files.is_good(block, open_cached))
        except OSError as error:
            logger.info("not checked block=%s error=%s", block.filename, error)
            return True
        return good or not self.is_sealed(block)

    def checksums(self, block: BlockId) -> Sums:
        """Of a sealed block. Raises BlockCorruptError, also when it is not sealed any more; OSError as `sums.read`."""
        return self._sealed.files.checksums(block)

    # ---- the medium ------------------------------------------------------------------------------------------------

    def sync_sealed(self) -> list[BlockId]:
        """Write what was sealed since the last time to the medium; returns what could not be, and was dropped.

        Blocks on the disk. A write-back error means that the file may hold other bytes than were written.
        """
        return self._unsynced.sync()

    def try_disk(self) -> None:
        """As `probe.try_disk`."""
        try_disk(self._layout.tier_fd)

    # ---- start and end ---------------------------------------------------------------------------------------------

    def recover(self, cluster_id: str) -> None:
        """As `recovery.recover`."""
        recover(self._layout, cluster_id, self._geometry, self._dormant, self._suspects, self._sealed)

    def close_all(self) -> None:
        """At the end: what is open is left as it is on disk."""
        self._partials.close_all()


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
    calls `Tier.quotas.apply`.

    Raises ConfigError, and TierError as `layout.open_layout`.
    """
    check_capacity(config, geometry.page_size)
    with open_layout(config.path, cluster_id) as layout:
        check_medium(config, layout.tier_fd)
        tier = Tier(config, layout, geometry, pinned or PinnedKeys(), quotas or Quotas())
        with tier_errors(f"tier {config.path}"):
            tier.recover(cluster_id)
        try:
            yield tier
        finally:
            tier.close_all()
