"""Whether blocks are kept on this node, before anything is fetched for them."""

from __future__ import annotations

from collections.abc import Sequence

from cachefs.model import BlockId, Geometry
from cachefs.policy import Promote
from cachefs.store import Store
from cachefs.worker.counters import Counters
from cachefs.worker.drops import Drops
from cachefs.worker.members import Members
from cachefs.worker.sources import Source
from cachefs.worker.supply import Route, Supply

Wanted = tuple[BlockId, Source]


class Admission:
    """The policy is `policy.admits`: here it is given what it has to know of other workers."""

    def __init__(
        self, geometry: Geometry, store: Store, members: Members, supply: Supply, drops: Drops, counters: Counters
    ) -> None:
        self._geometry = geometry
        self._store = store
        self._members = members
        self._supply = supply
        self._drops = drops
        self._counters = counters

    @property
    def takes_blocks(self) -> bool:
        """This worker is neither drained nor being drained."""
        return self._members.takes_blocks

    def has_room(self, length: int) -> bool:
        """For something nobody has asked for yet: nothing is evicted or given up for it."""
        return self._members.takes_blocks and self._store.admits(length, Promote.IF_SPACE, first_copy=False)

    async def route(self, block: BlockId, source: Source, mode: Promote) -> Route | None:
        """As `routes`, of one."""
        return (await self.routes([(block, source)], mode))[0]

    async def routes(self, wanted: Sequence[Wanted], mode: Promote) -> list[Route | None]:
        """How to get those that are admitted, each to be ended; room was made for them where others have copies of what
        is here. None: not admitted.
        """
        lengths = [self._geometry.block_length(source.attr.size_bytes, block.block_index) for block, source in wanted]
        admitted = [
            number
            for number, length in enumerate(lengths)
            if self._members.takes_blocks and self._store.admits(length, mode)
        ]
        asked = [(*wanted[number], wanted[number][0].block_index * self._geometry.block_size) for number in admitted]
        routes: list[Route | None] = [None] * len(wanted)
        found = await self._supply.routes(asked)
        try:
            for number, route in zip(admitted, found, strict=True):
                length, first_copy = lengths[number], self._supply.is_last_copy(route)
                if first_copy or self._store.admits(length, mode, first_copy=False):
                    routes[number] = route
                    if first_copy or mode is Promote.ALWAYS:
                        await self._drops.make_room(length)
                else:
                    self._supply.end(route)
        except BaseException:
            # Cancelled while room was made.
            for route in found:
                self._supply.end(route)
            raise
        self._counters.not_admitted += routes.count(None)
        return routes
