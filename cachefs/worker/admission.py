"""Whether blocks are kept on this node, before anything is fetched for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from cachefs.model import BlockId, Geometry
from cachefs.policy import Promote
from cachefs.store import Store
from cachefs.worker.counters import Counters
from cachefs.worker.drops import Drops
from cachefs.worker.members import Members
from cachefs.worker.quotas import QuotaFollower
from cachefs.worker.sources import Source
from cachefs.worker.supply import Route, Supply

Wanted = tuple[BlockId, Source]

_REMEMBERED = 1000
"""Refusals, until whoever asked is told why."""


class Admission:
    """The policy is `policy.admits`: here it is given what it has to know of other workers."""

    def __init__(
        self,
        geometry: Geometry,
        store: Store,
        members: Members,
        supply: Supply,
        drops: Drops,
        quotas: QuotaFollower,
        counters: Counters,
    ) -> None:
        self._geometry = geometry
        self._store = store
        self._members = members
        self._supply = supply
        self._drops = drops
        self._quotas = quotas
        self._counters = counters
        self._waited: set[BlockId] = set()
        """Those that somebody waited for room for, which is theirs, and that were not admitted yet."""
        self._refused: OrderedDict[BlockId, str] = OrderedDict()
        """Those that quotas had no room for when they were asked for last, and what to say of it."""

    @property
    def takes_blocks(self) -> bool:
        """This worker is neither drained nor being drained."""
        return self._members.takes_blocks

    def has_room(self, length: int) -> bool:
        """For something nobody has asked for yet: nothing is evicted or given up for it."""
        return self._members.takes_blocks and self._store.admits(length, Promote.IF_SPACE, first_copy=False)

    async def wait_for_room(self, block: BlockId, source: Source, mode: Promote) -> bool:
        """Nobody waits to read it, so it can wait for room in its quotas: returns when there is some, or none is to be
        expected. True: the room is its own until its route ends, or `stop_waiting` is called.
        """
        quotas, length = self._store.quotas, self._length(block, source)
        if block in self._waited or not quotas.lacking(block, length) or not self._may_be_kept(length, mode):
            return False
        await self._quotas.wait(dict.fromkeys(quotas.of(block), quotas.need(length)))
        if block in self._waited or quotas.lacking(block, length):
            return False
        self._waited.add(block)
        quotas.expect(block, length)
        return True

    def stop_waiting(self, block: BlockId) -> None:
        """It is kept, or not going to be."""
        if block in self._waited:
            self._waited.remove(block)
            self._store.quotas.settle(block)

    def why_not(self, block: BlockId) -> str:
        """Which quotas had no room for a block when it was asked for last; empty where that was not it."""
        return self._refused.get(block, "")

    def note_refusal(self, block: BlockId, source: Source) -> None:
        """It was admitted, and there was no room for it then."""
        self._refuse(block, self._store.quotas.lacking(block, self._length(block, source)))

    async def route(self, block: BlockId, source: Source, mode: Promote, *, for_others: bool = False) -> Route | None:
        """As `routes`, of one."""
        return (await self.routes([(block, source)], mode, for_others=for_others))[0]

    async def routes(self, wanted: Sequence[Wanted], mode: Promote, *, for_others: bool = False) -> list[Route | None]:
        """How to get those that are admitted, each to be ended; room was made for them where others have copies of what
        is here. None: not admitted. `for_others`: no reader of this node asks for them.
        """
        lengths = [self._length(block, source) for block, source in wanted]
        for block, _ in wanted:
            self._refused.pop(block, None)
        if self._store.quotas.active and mode is not Promote.NEVER:
            await self._grow(wanted, lengths, mode)
        admitted = [
            number
            for number, length in enumerate(lengths)
            if self._may_be_kept(length, mode)
            and self._takes_of_quotas(wanted[number][0], length, mode, for_others=for_others)
        ]
        asked = [(*wanted[number], wanted[number][0].block_index * self._geometry.block_size) for number in admitted]
        routes: list[Route | None] = [None] * len(wanted)
        try:
            found = await self._supply.routes(asked)
        except BaseException:
            for block, _, _ in asked:
                self._store.quotas.settle(block)
            raise
        try:
            for number, route in zip(admitted, found, strict=True):
                length, first_copy = lengths[number], self._supply.is_last_copy(route)
                block = wanted[number][0]
                if first_copy or (
                    self._store.admits(length, mode, first_copy=False)
                    and self._fits_quotas(block, length, mode, first_copy=False, for_others=for_others)
                ):
                    routes[number] = route
                    if first_copy or mode is Promote.ALWAYS:
                        await self._drops.make_room(length, block)
                else:
                    self._supply.end(route)
        except BaseException:
            # Cancelled while room was made.
            for route in found:
                self._supply.end(route)
            raise
        self._counters.not_admitted += routes.count(None)
        return routes

    def _length(self, block: BlockId, source: Source) -> int:
        return self._geometry.block_length(source.attr.size_bytes, block.block_index)

    def _may_be_kept(self, length: int, mode: Promote) -> bool:
        """As far as anything but quotas goes."""
        return mode is not Promote.NEVER and self._members.takes_blocks and self._store.admits(length, mode)

    async def _grow(self, wanted: Sequence[Wanted], lengths: Sequence[int], mode: Promote) -> None:
        """What is going to be taken of quotas is asked for, all at once."""
        quotas, needs = self._store.quotas, dict[int, int]()
        for (block, _), length in zip(wanted, lengths, strict=True):
            if block in self._waited or not self._may_be_kept(length, mode):
                continue
            for quota in quotas.of(block):
                needs[quota] = needs.get(quota, 0) + quotas.need(length)
        if needs:
            await self._quotas.grow(needs)

    def _takes_of_quotas(self, block: BlockId, length: int, mode: Promote, *, for_others: bool) -> bool:
        """Whether its quotas have room, which is its own then until its route ends."""
        fits = self._fits_quotas(block, length, mode, for_others=for_others)
        if fits and self._store.quotas.active:
            self._store.quotas.expect(block, length)
            self._waited.discard(block)
        return fits

    def _fits_quotas(
        self, block: BlockId, length: int, mode: Promote, *, first_copy: bool = True, for_others: bool
    ) -> bool:
        if not self._store.quotas.active or mode is Promote.NEVER:
            return True
        full = self._store.quotas.full(block, length, mode, first_copy=first_copy)
        if full:
            self._refuse(block, full)
            if not for_others:
                self._counters.quota_refused += 1
                self._store.quotas.book.refused(full)
        return not full

    def _refuse(self, block: BlockId, full: Iterable[int]) -> None:
        describe = self._store.quotas.describe
        if self._quotas.can_grow:
            reason = ", ".join(f"{describe(quota)} is used up" for quota in full)
        else:
            reason = ", ".join(f"{describe(quota)} is not granted while the master is away" for quota in full)
        if reason:
            self._refused[block] = reason
            if len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)
