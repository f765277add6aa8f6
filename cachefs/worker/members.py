"""Which workers are alive, as the master tells it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from cachefs.model import BlockId, TransportError
from cachefs.net import Peer
from cachefs.policy import HomeCandidate, Place, equally_near, nearest, rank_homes
from cachefs.wire.cluster import Member, WatchMembers

logger = logging.getLogger(__name__)


class Members:
    """What was told last stays believed while the master is away: who is dead does not answer."""

    def __init__(self, name: str, labels: Mapping[str, str]) -> None:
        self.name = name
        self.known = trio.Event()
        """The master has told the first time."""
        self.others: dict[str, Member] = {}
        """All that are alive but this one."""
        self.joined_s: dict[str, float] = {}
        """Since when, as far as was told."""
        self._me = Place(name, labels)
        self._state = "active"

    @property
    def takes_blocks(self) -> bool:
        """This worker is neither drained nor being drained."""
        return self._state == "active"

    def stays(self, name: str) -> bool:
        """It is another worker that is neither drained nor being drained, as far as is known."""
        return name not in self.others or self.others[name].state == "active"

    async def follow(self, peer: Peer) -> None:
        """Hear of members until the connection is lost, or cancelled."""
        try:
            async with peer.stream(WatchMembers()) as told:
                async for members in told:
                    self.learn(members.workers)
        except TransportError as error:
            logger.debug("members not heard of error=%s", error)

    def learn(self, members: list[Member]) -> None:
        """These are all that are alive."""
        before, now = self.others, trio.current_time()
        self.others = {each.name: each for each in members if each.name != self.name}
        self.joined_s = {
            name: self.joined_s[name] if name in before and before[name].address == each.address else now
            for name, each in self.others.items()
        }
        self._state = next((each.state for each in members if each.name == self.name), self._state)
        self.known.set()

    def nearest(self, names: list[str], block: BlockId) -> list[str]:
        """Those of them that are alive, the nearest first; equally near ones in an order that differs by block."""
        return [place.name for place in nearest(self._me, self._places(names), block)]

    def equally_near(self, names: list[str], block: BlockId) -> list[str]:
        """Those of `nearest` that none is nearer than."""
        return [place.name for place in equally_near(self._me, self._places(names), block)]

    def _places(self, names: list[str]) -> list[Place]:
        return [Place(name, self.others[name].labels) for name in names if name in self.others]

    def homes(self, block: BlockId, length: int, most: int) -> list[str]:
        """Other workers that are to take in a block that this one cannot, the best first."""
        candidates = [
            HomeCandidate(each.name, each.capacity_bytes)
            for each in self.others.values()
            if each.state == "active" and each.room_bytes >= length
        ]
        return rank_homes(block, candidates, most)
