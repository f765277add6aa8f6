"""Whether the quotas of a block leave room for it, on all tiers of a worker, and how room is made in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cachefs.model import BlockId, CapacityError
from cachefs.policy import Promote, fits_quota
from cachefs.store.quotas import Quotas
from cachefs.store.tier import Tier

_EXTRA_BYTES = 64 << 20
"""Given up for one block beside twice its own length: what is far over a quota gets below it by and by."""


class QuotaRoom:
    """Callable from any thread. `on_failed` is called with a tier whose disk fails to remove what makes room. `served`
    tells the tiers whose blocks are here: others count for nothing, and are not waited for.
    """

    def __init__(
        self,
        book: Quotas,
        tiers: Sequence[Tier],
        served: Callable[[], Sequence[Tier]],
        on_failed: Callable[[Tier, OSError], None],
    ) -> None:
        self.book = book
        self._any = tiers[0]
        self._served = served
        self._on_failed = on_failed

    @property
    def active(self) -> bool:
        """Whether there are any quotas."""
        return self.book.active

    def apply(self) -> None:
        """Others count for quotas than before. Looks at every block: for a thread."""
        for tier in self._served():
            tier.quotas.apply()
        if not self.book.active:
            self.book.reset()

    def add(self, blocks: Sequence[BlockId], quota: int) -> None:
        """All of one content count for it from now on. A few microseconds: called inline."""
        if blocks and quota not in self.book.keys.of(blocks[0].key):
            self.book.keys.add(blocks[0].key, quota)
            if self.book.active:
                for tier in self._served():
                    tier.quotas.apply(blocks)

    def of(self, block: BlockId) -> tuple[int, ...]:
        """All quotas that bind it."""
        return self.book.of(block.key)

    def need(self, length: int) -> int:
        """What a block of that length takes, its checksums included."""
        return self._any.need(length)

    def lacking(self, block: BlockId, length: int) -> dict[int, int]:
        """What a block would take beyond what may be taken of its quotas: nothing, as a rule."""
        quotas = self.book.of(block.key)
        if not quotas:
            return {}
        need = self.need(length) - max((tier.quotas.held_bytes(block) for tier in self._served()), default=0)
        lacking = {quota: self.book.lacking(quota, need, block) for quota in quotas} if need > 0 else {}
        return {quota: size for quota, size in lacking.items() if size > 0}

    def full(self, block: BlockId, length: int, mode: Promote, *, first_copy: bool = True) -> list[int]:
        """Its quotas that leave no room for a block, nor would once others of the same were given up for it."""
        return [
            quota
            for quota, lacking in self.lacking(block, length).items()
            if not fits_quota(
                mode,
                lacking_bytes=lacking,
                used_bytes=self.book.used_bytes(quota),
                free_bytes=lambda quota=quota: self._free(quota),  # type: ignore[misc]
                first_copy=first_copy,
            )
        ]

    def _free(self, quota: int) -> tuple[int, int]:
        found = [tier.quotas.free_bytes(quota) for tier in self._served()]
        return sum(idle for idle, _ in found), sum(shared for _, shared in found)

    def idle_bytes(self) -> dict[int, int]:
        """Of each quota that anything is taken of: what of it counts as free. For a thread."""
        found = {quota: self._free(quota)[0] for quota in self.book.used()}
        return {quota: size for quota, size in found.items() if size}

    def trim(self) -> None:
        """Where more is taken than may be, give up what is idle of it. Blocks on the disk: for a thread."""
        for quota, over in self.book.over().items():
            self._give_up(quota, over, None, evict=False)

    def expect(self, block: BlockId, length: int) -> None:
        """It was admitted: its room is no other's until it is begun, or `settle` is called."""
        self.book.expect(block, self.need(length))

    def keep_room(self, block: BlockId, size: int) -> None:
        """As `expect`, of a block that will take so many bytes, its checksums included."""
        self.book.expect(block, size)

    def settle(self, block: BlockId) -> None:
        self.book.settle(block)

    def to_give_up(self, block: BlockId, length: int) -> list[BlockId]:
        """Blocks that other nodes hold as well and that count for the same quotas, of about what these lack for it."""
        found: dict[BlockId, None] = {}
        for quota, lacking in self.lacking(block, length).items():
            lacking -= self._free(quota)[0]
            for tier in self._served():
                for each in tier.quotas.to_give_up(quota, lacking):
                    found[each] = None
                    lacking -= tier.held_bytes(each)
        return list(found)

    def make_room(self, block: BlockId, length: int, mode: Promote) -> None:
        """For what is begun now. Raises CapacityError, possibly having evicted."""
        most = 2 * self.need(length) + _EXTRA_BYTES
        for quota, lacking in self.lacking(block, length).items():
            if self._give_up(quota, min(lacking, most), block, evict=mode is Promote.ALWAYS) < lacking:
                self.book.refused([quota])
                raise CapacityError(f"{self.describe(quota)} has no room for {length} bytes")

    def _give_up(self, quota: int, need: int, wanted: BlockId | None, *, evict: bool) -> int:
        """As `TierQuotas.make_room`, on all tiers, the last one first."""
        freed = 0
        for tier in reversed(self._served()):
            if freed < need:
                try:
                    freed += tier.quotas.make_room(quota, need - freed, wanted, evict=evict)
                except OSError as error:
                    self._on_failed(tier, error)
        return freed

    def describe(self, quota: int) -> str:
        """For people."""
        return self.book.describe(quota)
