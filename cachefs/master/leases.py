"""Origin leases: which worker fetches which block from the under-store.

In memory only: a master that was restarted learns of leases that are still used from the reports of their holders.
Pure; times are seconds of any clock that never goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cachefs.model import BlockId

LEASE_S = 10.0
"""Without being reported as still needed. Reports come every second."""


@dataclass
class _Lease:
    worker: str
    until_s: float


class Leases:
    """At most one holder per block. `is_alive` tells of a worker whether its leases count."""

    def __init__(self, is_alive: Callable[[str], bool]) -> None:
        self._is_alive = is_alive
        self._leases: OrderedDict[BlockId, _Lease] = OrderedDict()
        """In the order in which they end: each is granted for as long."""
        self._moved: dict[str, set[BlockId]] = {}
        """By the worker that lost it, until it was told."""

    def __len__(self) -> int:
        return len(self._leases)

    def holder(self, block: BlockId, now_s: float) -> str:
        """Empty if nobody has the lease."""
        lease = self._leases.get(block)
        if lease is None:
            return ""
        if lease.until_s < now_s or not self._is_alive(lease.worker):
            del self._leases[block]
            return ""
        return lease.worker

    def take(self, block: BlockId, asker: str, now_s: float, without: Collection[str] = ()) -> str:
        """Who is to fetch it: whoever has the lease, unless it is one of those the asker cannot do with; else the
        asker, from now on.
        """
        holder = self.holder(block, now_s)
        if holder and holder != asker:
            if holder not in without:
                return holder
            self._moved.setdefault(holder, set()).add(block)
        self._moved.get(asker, set()).discard(block)
        self._grant(block, asker, now_s)
        self._forget_ended(now_s)
        return asker

    def renew(self, worker: str, blocks: Iterable[BlockId], now_s: float) -> list[BlockId]:
        """A worker says which it still needs. One that nobody has is taken by that. Returns those it has no more."""
        moved = self._moved.pop(worker, set())
        lost = []
        for block in blocks:
            holder = self.holder(block, now_s)
            if block in moved or holder not in ("", worker):
                lost.append(block)
            else:
                self._grant(block, worker, now_s)
        self._forget_ended(now_s)
        return lost

    def _grant(self, block: BlockId, worker: str, now_s: float) -> None:
        self._leases[block] = _Lease(worker, now_s + LEASE_S)
        self._leases.move_to_end(block)

    def _forget_ended(self, now_s: float) -> None:
        """Those that were granted and never reported, as the answer was lost, nobody may ever ask for again."""
        while self._leases and next(iter(self._leases.values())).until_s < now_s:
            self._leases.popitem(last=False)

    def end(self, worker: str, blocks: Iterable[BlockId]) -> None:
        """These are sealed there, or given up."""
        for block in blocks:
            lease = self._leases.get(block)
            if lease is not None and lease.worker == worker:
                del self._leases[block]

    def end_all(self, worker: str) -> None:
        """It died, or began anew."""
        self._moved.pop(worker, None)
        for block in [block for block, lease in self._leases.items() if lease.worker == worker]:
            del self._leases[block]
