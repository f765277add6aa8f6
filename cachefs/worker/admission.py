"""Whether blocks are kept on this node, before anything is fetched for them."""

from __future__ import annotations

from collections.abc import Sequence

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

    @property
    def takes_blocks(self) -> bool:
        """This worker is neither drained nor being drained."""
        return self._members.takes_blocks

    def has_room(self, length: int) -> bool:
        """For something nobody has asked for yet: nothing is evicted or given up for it."""
        return self._members.takes_blocks and self._store.admits(length, Promote.IF_SPACE, first_copy=False)

    async def route(self, block: BlockId, source: Source, mode: Promote, *, patient: bool = False) -> Route | None:
        """As `routes`, of one."""
        return (await self.routes([(block, source)], mode, patient=patient))[0]

    async def routes(self, wanted: Sequence[Wanted], mode: Promote, *, patient: bool = False) -> list[Route | None]:
        """How to get those that are admitted, each to be ended; room was made for them where others have copies of what
        is here. None: not admitted. `patient`: nobody waits to read them, so they can wait for room in a quota.
        """
        lengths = [self._geometry.block_length(source.attr.size_bytes, block.block_index) for block, source in wanted]
        if self._store.quotas.active and mode is not Promote.NEVER:
            await self._grow(wanted, lengths, patient)
        admitted = [
            number
            for number, length in enumerate(lengths)
            if self._members.takes_blocks
            and self._store.admits(length, mode)
            and self._takes_of_quotas(wanted[number][0], length, mode)
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
                    and self._fits_quotas(block, length, mode, first_copy=False)
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

    async def _grow(self, wanted: Sequence[Wanted], lengths: Sequence[int], patient: bool) -> None:
        """What is going to be taken of quotas is asked for, all at once."""
        quotas, needs = self._store.quotas, dict[int, int]()
        for (block, _), length in zip(wanted, lengths, strict=True):
            for quota in quotas.of(block):
                needs[quota] = needs.get(quota, 0) + quotas.need(length)
        if needs:
            await self._quotas.grow(needs, patient=patient)

    def _takes_of_quotas(self, block: BlockId, length: int, mode: Promote) -> bool:
        """Whether its quotas have room, which is its own then until its route ends."""
        fits = self._fits_quotas(block, length, mode)
        if fits and self._store.quotas.active:
            self._store.quotas.expect(block, length)
        return fits

    def _fits_quotas(self, block: BlockId, length: int, mode: Promote, *, first_copy: bool = True) -> bool:
        if not self._store.quotas.active or mode is Promote.NEVER:
            return True
        full = self._store.quotas.full(block, length, mode, first_copy=first_copy)
        if full:
            self._counters.quota_refused += 1
            self._store.quotas.book.refused(full)
        return not full
