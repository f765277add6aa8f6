"""What a tier gives up, and for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cachefs.model import BlockId, CapacityError
from cachefs.store.dormant import Dormant
from cachefs.store.sealed import SealedBlocks
from cachefs.store.space import Space


class Eviction:
    """Chooses among the blocks that nobody reads, and gives them up when a new one needs their room.

    The tier's lock guards it.
    """

    def __init__(self, space: Space, sealed: SealedBlocks, dormant: Dormant) -> None:
        self._space = space
        self._sealed = sealed
        self._dormant = dormant
        self.count = 0
        """Sealed blocks that made room."""

    def make_room(self, need: int, unwritten: int, *, evict: bool) -> None:
        """Evict until `need` more bytes can be promised; without `evict`, only what counts as free. `unwritten` is as
        of `Space.room`.

        Raises CapacityError, possibly having evicted; OSError.
        """
        if need > self._space.capacity:
            raise CapacityError(f"a block of {need} bytes is larger than the tier")
        if need > self._space.capacity - self._space.reserved - self._sealed.pinned_bytes:
            # Told before anything is evicted for nothing.
            raise CapacityError(f"no room for {need} bytes beside what is pinned and being filled")
        if self._space.room(unwritten) >= need:
            return
        for block in list(self._dormant):
            if self._dormant.evict(block) and self._space.room(unwritten) >= need:
                return
        for block in self._to_evict(evict):
            if self.evict(block) and self._space.room(unwritten) >= need:
                return
        raise CapacityError(f"no room for {need} bytes: the rest of the tier is being read, filled, or kept")

    def _to_evict(self, evict: bool) -> Iterator[BlockId]:
        yield from self._sealed.idle_candidates()
        yield from self._sealed.unshared(self._sealed.over_candidates())
        if evict:
            # What others hold as well is given up first, and by agreement only: see `to_give_up`.
            yield from self._sealed.unshared(self._sealed.candidates())

    def evict(self, block: BlockId, later: list[int] | None = None) -> bool:
        """For its room. As `SealedBlocks.evict`."""
        gone = self._sealed.evict(block, later)
        self.count += gone
        return gone

    def to_give_up(self, need: int, shared: Callable[[], Iterator[BlockId]]) -> list[BlockId]:
        """Shared blocks of about `need` bytes that nobody reads, of the first ones those not read lately first.

        They are not given up here: that is for the nodes to agree on.
        """
        found: dict[BlockId, None] = {}
        for block in self._sealed.cold_first(shared):
            if need <= 0:
                break
            if block not in found and self._sealed.files.is_unread(block):
                found[block] = None
                need -= self._sealed.size(block)
        return list(found)

    def coldest(self, limit: int) -> list[BlockId]:
        """Up to `limit` sealed blocks that nobody reads, those to evict first in front."""
        found = []
        for block in self._sealed.candidates():
            if self._sealed.files.is_unread(block):
                found.append(block)
            if len(found) == limit:
                break
        return found
