"""The blocks a worker holds, on all its tiers: which tier takes a new block, and what moves down from a full one.

A block is found in the first tier that has it. A new one goes into the first tier that has room for it without
evicting (what is idle counts as free), else, where evicting is allowed, into the last one. Upper tiers are kept from
filling up by moving what would be evicted to a tier below, in the background, so that no reader waits for it. Nothing
moves up: what is hot on a disk is in the kernel's page cache anyway.

A tier whose disk fails takes nothing new until it is healthy again; what was to go there goes elsewhere, or is not
kept. When it is down, none of what it holds is here; when it is back, that is verified as after a reboot. See `health`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cachefs.model import BlockCorruptError, BlockId, BlockMissingError, CapacityError, ConfigError, Geometry
from cachefs.policy import Promote, admits
from cachefs.store.blame import is_of_the_process
from cachefs.store.config import TierConfig
from cachefs.store.health import Health, HealthConfig, TierState
from cachefs.store.partial import Partial
from cachefs.store.pinned import PinnedKeys
from cachefs.store.quota_room import QuotaRoom
from cachefs.store.quotas import Quotas
from cachefs.store.sums import Sums
from cachefs.store.tier import Tier, open_tier

logger = logging.getLogger(__name__)

_LOW_SHARE = 0.10
_HIGH_SHARE = 0.15
"""Upper tiers are emptied to this free share once they are below the low one: a burst finds room, little is moved."""
_MOVED_AT_ONCE = 16


class Store:
    """Made by `open_store`. Callable from any thread; what reads or writes pages blocks on the disk and says so."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        pinned: PinnedKeys,
        health: HealthConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        quotas: Quotas | None = None,
    ) -> None:
        self.tiers = tiers
        self._clock = clock
        self._pinned = pinned
        self.quotas = QuotaRoom(quotas or Quotas(), tiers, lambda: self._served, self._cannot_evict)
        """What counts for quotas, and what room these leave."""
        self._opening = threading.Lock()
        self._homes: dict[Partial, Tier] = {}
        """Of open partials."""
        self._judging = threading.Lock()
        self._health = {tier: Health(health) for tier in tiers}
        self._usable = self._served = tuple(tiers)
        """Those that take new blocks, and those whose blocks are here."""
        self.on_evicted: Callable[[BlockId], None] = lambda block: None
        """Called, from whatever thread, with each sealed block that no tier has any more; must not call back."""
        self.on_restored: Callable[[BlockId, int], None] = lambda block, size: None
        """Called, from whatever thread, with each suspect block that is found to be good, and the bytes it takes."""
        for tier in tiers:
            tier.on_evicted = functools.partial(self._evicted, tier)
            tier.on_failed = functools.partial(self._disk_failed, tier)

    def _evicted(self, tier: Tier, block: BlockId) -> None:
        # What a tier held that is down, everybody has been told of.
        if tier in self._served and not self.is_sealed(block):
            self.on_evicted(block)

    # ---- what is here ----------------------------------------------------------------------------------------------

    @property
    def paths(self) -> list[str]:
        return [tier.config.path for tier in self.tiers]

    def is_sealed(self, block: BlockId) -> bool:
        return any(tier.is_sealed(block) for tier in self._served)

    def blocks(self) -> list[tuple[BlockId, int]]:
        """The sealed blocks and the bytes they take."""
        return list({block: size for tier in reversed(self._served) for block, size in tier.blocks()}.items())

    def held_bytes(self, block: BlockId) -> int:
        """What a sealed block takes; 0 if it is not sealed here."""
        return next((tier.held_bytes(block) for tier in self._served if tier.is_sealed(block)), 0)

    def checksums(self, block: BlockId) -> Sums:
        """Of the pages of a sealed block. Reads a small file. Raises BlockMissingError; as `Tier.checksums`."""
        for tier in self._served:
            if tier.is_sealed(block):
                return tier.checksums(block)
        raise BlockMissingError(f"{block.filename}: not here")

    def visited(self, block: BlockId) -> None:
        """Somebody read it: evict others first."""
        for tier in self.tiers:
            tier.visited(block)

    def retire(self, block: BlockId) -> None:
        """Nobody will ask for it again: its space counts as free."""
        for tier in self.tiers:
            tier.retire(block)

    # ---- pinned ----------------------------------------------------------------------------------------------------

    def is_pinned(self, block: BlockId) -> bool:
        """It is not evicted, whether it is here or not yet."""
        return block.key in self._pinned

    def pin(self, blocks: Sequence[BlockId]) -> None:
        """All of one content, from now on. A few microseconds: called inline."""
        if blocks and blocks[0].key not in self._pinned:
            self._pinned.add(blocks[0].key)
            self._apply_pins(blocks)

    def apply_pins(self) -> None:
        """Another set of contents is pinned. Looks at every block: for a thread."""
        self._apply_pins(None)

    def _apply_pins(self, blocks: Sequence[BlockId] | None) -> None:
        for tier in self.tiers:
            tier.apply_pins(blocks)

    # ---- filling ---------------------------------------------------------------------------------------------------

    def admits(self, length: int, mode: Promote, *, first_copy: bool = True) -> bool:
        """Whether some tier would take a block of that length; as the first copy in the cluster it may take the room of
        what others hold as well, once that was given up.
        """
        return any(self._tier_admits(tier, length, mode, first_copy=first_copy) for tier in self._usable)

    def _tier_admits(self, tier: Tier, length: int, mode: Promote, *, first_copy: bool = False) -> bool:
        free = tier.room_bytes()
        return admits(
            mode,
            block_length=length,
            capacity_bytes=tier.config.capacity_bytes,
            free_bytes=free,
            reclaimable_bytes=0 if free >= length else tier.idle_bytes(),
            shared_bytes=tier.shared_bytes() if first_copy and free < length else 0,
            first_copy=first_copy,
            pinned_bytes=tier.pinned_bytes,
        )

    def to_give_up(self, length: int) -> list[BlockId]:
        """Blocks that other nodes hold as well, of about the room that a new one of `length` bytes lacks."""
        for tier in self._usable:
            lacking = tier.need(length) - tier.room_bytes()
            if lacking > 0:
                lacking -= tier.idle_bytes()
            if lacking <= 0:
                return []
            if self._tier_admits(tier, length, Promote.IF_SPACE, first_copy=True):
                return tier.to_give_up(lacking)
        # Not even with all of them: as much as there is, before others are evicted.
        return self._usable[-1].to_give_up(length) if self._usable else []

    def room_bytes(self) -> int:
        """What could be taken in without giving up the last copy of anything in use."""
        return sum(tier.room_bytes() + tier.idle_bytes() + tier.shared_bytes() for tier in self._usable)

    def capacity_bytes(self) -> int:
        """Of the tiers that can be used."""
        return sum(tier.config.capacity_bytes for tier in self._usable)

    def share(self, blocks: Sequence[BlockId], shared: bool) -> None:
        """Other nodes hold these as well, or do not any more."""
        for tier in self.tiers:
            tier.share(blocks, shared)

    def unshare_all(self) -> None:
        """Nothing is known of other nodes any more."""
        for tier in self.tiers:
            tier.unshare_all()

    def open_partial(self, block: BlockId, length: int, mode: Promote = Promote.ALWAYS) -> Partial | None:
        """The partial of a block of `length` bytes, resumed or new, with room reserved for all of it.

        Every call is paired with one `close`. None when the block is sealed already. Raises CapacityError when no tier
        takes it.
        """
        with self._opening:
            if self.is_sealed(block):
                return None
            self.quotas.make_room(block, length, mode)
            for tier in self._usable:
                if tier.holds(block):
                    partial = self._open_in(tier, block, length, evict=mode is Promote.ALWAYS)
                    if partial is not None:
                        return partial
            for tier in self._usable:
                if self._tier_admits(tier, length, min_mode(mode)):
                    partial = self._open_in(tier, block, length, evict=False)
                    if partial is not None:
                        return partial
            if mode is Promote.ALWAYS:
                for tier in reversed(self._usable):
                    if self._tier_admits(tier, length, mode):
                        partial = self._open_in(tier, block, length, evict=True)
                        if partial is not None:
                            return partial
            raise CapacityError(f"no tier has room for a block of {length} bytes")

    def _open_in(self, tier: Tier, block: BlockId, length: int, *, evict: bool) -> Partial | None:
        """None if that tier cannot take it. Raises CapacityError if none can now."""
        try:
            partial = tier.open_partial(block, length, evict=evict)
        except CapacityError:
            return None
        except OSError as error:
            if is_of_the_process(error):
                # No other tier fares better, and nothing is to be evicted there for that.
                raise CapacityError(f"{block.filename}: cannot be filled now: {error}") from error
            self._disk_failed(tier, error, False)
            return None
        if partial is not None:
            self._homes[partial] = tier
        return partial

    def close(self, partial: Partial) -> None:
        """One user of `open_partial` is done. What an unfinished partial has stays on disk, to be resumed."""
        tier = self._homes[partial]
        try:
            tier.close(partial)
        except OSError as error:
            self._cannot_remove(tier, error)
        finally:
            if partial.users == 0:
                self._homes.pop(partial, None)

    def seal(self, partial: Partial) -> None:
        """As `Tier.seal`. Blocks on the disk. Raises BlockCorruptError, CapacityError, OSError."""
        tier = self._homes[partial]
        if tier not in self._served:
            raise CapacityError(f"{partial.block.filename}: its tier is down")
        tier.seal(partial)

    # ---- failing disks ---------------------------------------------------------------------------------------------

    def state(self, tier: Tier) -> TierState:
        return self._health[tier].state

    @property
    def is_usable(self) -> bool:
        """Whether any tier takes something."""
        return bool(self._usable)

    @property
    def down(self) -> list[str]:
        """Paths of the tiers whose blocks count as lost: nobody is to open them there."""
        return [tier.config.path for tier in self.tiers if tier not in self._served]

    def failed(self, partial: Partial, error: OSError, *, reading: bool = False) -> None:
        """Writing a partial failed for another reason than a full disk, or reading it."""
        tier = self._homes.get(partial)
        if tier is not None:
            self._disk_failed(tier, error, reading)

    def _disk_failed(self, tier: Tier, error: OSError, reading: bool) -> None:
        if is_of_the_process(error):
            logger.info("no fault of the tier path=%s error=%s", tier.config.path, error)
            return
        health = self._health[tier]
        self._judge(tier, health.read_failed if reading else health.write_failed, error)

    def _cannot_remove(self, tier: Tier, error: OSError) -> None:
        self._judge(tier, self._health[tier].cannot_remove, error)

    def _cannot_evict(self, tier: Tier, error: OSError) -> None:
        if not is_of_the_process(error):
            self._cannot_remove(tier, error)

    def to_probe(self) -> list[Tier]:
        """Whose disks should be tried now, by `Tier.try_disk`."""
        now = self._clock()
        return [tier for tier in self.tiers if self._health[tier].probe_due(now)]

    def probed(self, tier: Tier, good: bool | None, reason: object = "") -> None:
        """What trying its disk has shown; None: nothing. Blocks on the disk."""
        self._judge(tier, functools.partial(self._health[tier].probed, good), reason)

    def _judge(self, tier: Tier, happened: Callable[[float], None], reason: object) -> None:
        health = self._health[tier]
        with self._judging:
            before, was_served = health.state, health.is_served
            happened(self._clock())
            if health.is_served and not was_served:
                try:
                    tier.distrust()
                except OSError as error:
                    health.cannot_remove(self._clock())
                    reason = error
            after = health.state
            self._usable = tuple(each for each in self.tiers if self._health[each].takes_new)
            self._served = tuple(each for each in self.tiers if self._health[each].is_served)
        if after is not before:
            level = logging.INFO if after in (TierState.HEALTHY, TierState.PROBING) else logging.WARNING
            logger.log(
                level, "tier is %s, was %s path=%s reason=%s", after.value, before.value, tier.config.path, reason
            )
        if was_served is not (tier in self._served):
            tier.quotas.count(lambda: tier in self._served)
        if was_served and tier not in self._served:
            for block, _ in tier.blocks():
                if not self.is_sealed(block):
                    self.on_evicted(block)

    # ---- going -----------------------------------------------------------------------------------------------------

    def tier_of(self, partial: Partial) -> Tier:
        """The tier that an open partial lies in."""
        return self._homes[partial]

    def give_up(self, partial: Partial) -> None:
        """As `Tier.give_up`. Blocks on the disk. It is closed by its users as ever."""
        tier = self._homes[partial]
        try:
            tier.give_up(partial)
        except OSError as error:
            self._cannot_remove(tier, error)

    def drop(self, block: BlockId) -> None:
        """Give up a sealed block, read by somebody or not: open descriptors keep working, nobody gets new ones."""
        for tier in self._served:
            self._drop_in(tier, block)

    def _drop_in(self, tier: Tier, block: BlockId) -> None:
        try:
            tier.drop(block)
        except OSError as error:
            self._cannot_remove(tier, error)

    def evict(self, block: BlockId) -> bool:
        """Drop a sealed block that nobody reads; False if somebody does, it is pinned, or it is not sealed here, or its
        disk fails to remove it.
        """
        if self.is_pinned(block):
            return False
        return any(self._evict_from(tier, block) for tier in self._served if tier.is_sealed(block))

    def _evict_from(self, tier: Tier, block: BlockId) -> bool:
        try:
            return tier.evict(block)
        except OSError as error:
            self._cannot_evict(tier, error)
            return False

    def move_down(self, mode: Promote) -> int:
        """Make room in upper tiers that are filling up; returns how many blocks were moved. Blocks on the disks."""
        return sum(self._empty_a_little(number, mode) for number in range(len(self.tiers) - 1))

    def _empty_a_little(self, number: int, mode: Promote) -> int:
        upper, moved = self.tiers[number], 0
        if upper not in self._served or upper.room_share() >= _LOW_SHARE:
            return 0
        while True:
            before = moved
            for block in upper.coldest(_MOVED_AT_ONCE):
                if upper not in self._served or upper.room_share() >= _HIGH_SHARE:
                    return moved
                moved += self._move(block, upper, number, mode)
            if moved == before:
                return moved

    def _move(self, block: BlockId, upper: Tier, number: int, mode: Promote) -> bool:
        for lower in self.tiers[number + 1 :]:
            if lower not in self._usable:
                continue
            try:
                return self._move_to(block, upper, lower, mode)
            except BlockMissingError:
                return False
            except BlockCorruptError as error:
                logger.warning("block dropped, it is damaged block=%s error=%s", block.filename, error)
                self._drop_in(upper, block)
                return True
            except CapacityError:
                continue
            except OSError as error:
                self._disk_failed(lower, error, False)
        return False

    def _move_to(self, block: BlockId, upper: Tier, lower: Tier, mode: Promote) -> bool:
        """Whether it went from the upper tier. As `Tier.copy_to`."""
        try:
            upper.copy_to(block, lower, evict=mode is Promote.ALWAYS)
            # It counts above until it goes, and is no room for others between that and counting below.
            self.quotas.keep_room(block, lower.held_bytes(block))
            if self._evict_from(upper, block):
                return True
            if upper in self._served:
                # Somebody began to read it meanwhile: one copy is enough.
                self._drop_in(lower, block)
            return False
        finally:
            lower.quotas.count_copy(block)
            self.quotas.settle(block)

    # ---- verifying -------------------------------------------------------------------------------------------------

    def is_suspect(self, block: BlockId) -> bool:
        """It was sealed in an earlier boot; `restore` tells what it is worth."""
        return any(tier.is_suspect(block) for tier in self._served)

    def suspects(self) -> list[BlockId]:
        return [block for tier in self._served for block in tier.suspects()]

    def restore(self, block: BlockId) -> bool:
        """Verify a suspect block and put it back, or drop it; whether it is sealed now. Blocks on the disk."""
        for tier in self._served:
            if tier.is_suspect(block):
                try:
                    if tier.restore(block):
                        self.on_restored(block, tier.held_bytes(block))
                except OSError as error:
                    self._cannot_remove(tier, error)
        return self.is_sealed(block)

    def check(self, block: BlockId, *, as_read: bool = False) -> bool:
        """As `Tier.check`, of every copy. Blocks on the disk."""
        return all(tier.check(block, as_read=as_read) for tier in self._served if tier.is_sealed(block))

    def sync_sealed(self) -> list[BlockId]:
        """As `Tier.sync_sealed`, of every tier."""
        lost = []
        for tier in self._served:
            try:
                lost += tier.sync_sealed()
            except OSError as error:
                self._cannot_remove(tier, error)
        return lost


def min_mode(mode: Promote) -> Promote:
    """What may be done for a block before evicting for it is thought of."""
    return Promote.IF_SPACE if mode is Promote.ALWAYS else mode


@contextmanager
def open_store(
    configs: Sequence[TierConfig],
    geometry: Geometry,
    cluster_id: str,
    pinned: PinnedKeys | None = None,
    health: HealthConfig | None = None,
    clock: Callable[[], float] = time.monotonic,
    quotas: Quotas | None = None,
) -> Iterator[Store]:
    """Open or create all tiers, alone, until the end of the block, the fastest one first. Of `pinned` nothing is
    evicted; who changes it calls `Store.apply_pins`, and who changes `quotas` calls `Store.quotas.apply`.

    Raises ConfigError and TierError as `open_tier`; ConfigError for two tiers in one directory.
    """
    paths = [config.path for config in configs]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError("--tier", path, "a directory of its own for each tier")
    with ExitStack() as stack:
        pinned = pinned if pinned is not None else PinnedKeys()
        quotas = quotas if quotas is not None else Quotas()
        tiers = [stack.enter_context(open_tier(config, geometry, cluster_id, pinned, quotas)) for config in configs]
        store = Store(tiers, pinned, health, clock, quotas)
        for number, tier in enumerate(tiers):
            # Cut off between the copy and the eviction: one copy is enough.
            for block, _ in tier.blocks():
                for lower in tiers[number + 1 :]:
                    lower.drop(block)
        yield store
