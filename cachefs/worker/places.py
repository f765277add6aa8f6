"""Where blocks are, as the master says, and the origin leases that this worker has."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence

import trio

from cachefs.model import BlockId, CachefsError
from cachefs.wire.cluster import ASKED_AT_ONCE, REPORTED_AT_ONCE, AskBlocks, BlockPlace
from cachefs.wire.messages import block_names
from cachefs.worker.counters import Counters
from cachefs.worker.master_link import MasterLink
from cachefs.worker.members import Members

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 3.0


class Places:
    """A lease is kept, and reported as needed, from the grant until `end`."""

    def __init__(self, link: MasterLink, members: Members, counters: Counters) -> None:
        self._link = link
        self._members = members
        self._counters = counters
        self._leases: dict[BlockId, int] = {}
        """With how often it was granted: each grant is ended once."""
        self._released: dict[BlockId, None] = {}

    async def ask(
        self, blocks: Sequence[BlockId], *, lease: bool, without: Collection[str] = ()
    ) -> list[BlockPlace] | None:
        """Where they are, in that order; None when the master does not say. Granted leases are to be ended."""
        places: list[BlockPlace] = []
        complete = False
        try:
            for start in range(0, len(blocks), ASKED_AT_ONCE):
                part = block_names(blocks[start : start + ASKED_AT_ONCE])
                with trio.fail_after(_ANSWER_TIMEOUT_S):
                    answer = await self._link.call_now(AskBlocks(part, lease, list(without)))
                places += answer.message.places
            complete = True
        except (CachefsError, trio.TooSlowError) as error:
            logger.info("the master does not say where blocks are error=%r", error)
            return None
        finally:
            for block, place in zip(blocks, places, strict=False):
                if lease and place.origin == self._members.name:
                    self._counters.leases += 1
                    self._leases[block] = self._leases.get(block, 0) + 1
                    if not complete:
                        # Nobody hears of it.
                        self.end(block)
        return places

    def has_lease(self, block: BlockId) -> bool:
        return block in self._leases

    def end(self, block: BlockId) -> None:
        """Whoever was granted a lease needs it no more: the block is sealed, which is reported, or given up."""
        count = self._leases.get(block, 0)
        if count > 1:
            self._leases[block] = count - 1
        elif count:
            del self._leases[block]
            self._released[block] = None

    def moved(self, blocks: Iterable[BlockId]) -> None:
        """The master gave these to others, who could do no longer with us."""
        for block in blocks:
            if self._leases.pop(block, None) is not None:
                logger.info("origin lease moved to another worker block=%s", block.filename)

    def fetching(self) -> list[BlockId]:
        """Leases that are needed."""
        return list(self._leases)[:REPORTED_AT_ONCE]

    def take_released(self) -> list[BlockId]:
        """Leases that ended since the last call."""
        released = list(self._released)[:REPORTED_AT_ONCE]
        for block in released:
            del self._released[block]
        return [block for block in released if block not in self._leases]
