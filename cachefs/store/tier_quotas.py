"""The part of one tier in the quotas of its worker."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cachefs.model import BlockId
from cachefs.store.dormant import Dormant
from cachefs.store.eviction import Eviction
from cachefs.store.partials import Partials
from cachefs.store.portions import portions
from cachefs.store.quota_book import QuotaBook
from cachefs.store.quotas import Quotas
from cachefs.store.sealed import SealedBlocks

_LOOK_EVERY_S = 1.0
_EVICTED_AT_ONCE = 64
"""Blocks that make room in a quota for one more, at most."""


class _Idle(NamedTuple):
    """What is idle of what counts for each quota; looked for now and then only, since that looks at all of it."""

    of: dict[int, deque[BlockId]]
    until: float
    """When to look again, by the monotonic clock."""


class TierQuotas:
    """Which blocks of a tier count for which quotas, and what of them is given up for others of the same quota.

    Callable from any thread: it takes the tier's lock, for one portion or one block at a time.
    """

    def __init__(
        self,
        lock: threading.Lock,
        quotas: Quotas,
        book: QuotaBook,
        sealed: SealedBlocks,
        partials: Partials,
        dormant: Dormant,
        eviction: Eviction,
    ) -> None:
        self._lock = lock
        self._quotas = quotas
        self._book = book
        self._sealed = sealed
        self._partials = partials
        self._dormant = dormant
        self._eviction = eviction
        self._idle = _Idle({}, 0.0)

    # ---- counting --------------------------------------------------------------------------------------------------

    def apply(self, blocks: Iterable[BlockId] | None = None) -> None:
        """Others count for quotas than before: of these blocks, or all that are here."""
        if not self._quotas.active:
            with self._lock:
                self._book.forget()
            return
        if blocks is None:
            with self._lock:
                blocks = [*self._sealed, *self._partials, *self._dormant]
        for portion in portions(blocks):
            with self._lock:
                for block in portion:
                    self._sort(block)
        self.look_again()

    def count(self, counts: Callable[[], bool]) -> None:
        """Whether what is here counts from now on, as is found with the lock held. Looks at every block."""
        with self._lock:
            self._book.restart(counts())
            self._idle = _Idle({}, 0.0)
        if self._book.counts:
            self.apply()

    def count_copy(self, block: BlockId) -> None:
        """It went from the other tier, or is to stay there: what is here counts from now on."""
        with self._lock:
            if self._book.end_copy(block):
                self._sort(block)

    def _sort(self, block: BlockId) -> None:
        # It is in one of them, or gone.
        self._sealed.sort_by_quota(block)
        self._partials.sort_by_quota(block)
        self._dormant.sort_by_quota(block)

    def held_bytes(self, block: BlockId) -> int:
        """What it is counted with: sealed, being filled, or in part."""
        return self._book.held(block)

    # ---- what is free ----------------------------------------------------------------------------------------------

    def free_bytes(self, quota: int) -> tuple[int, int]:
        """Of what counts for it: (what is idle, what others hold as well and is not idle). About a second old."""
        with self._lock:
            idle = self._look().of.get(quota, ())
            shared = sum(self._sealed.size(block) for block in idle if block in self._sealed.shared)
            return sum(self._sealed.size(block) for block in idle), self._book.shared_bytes(quota) - shared

    def look_again(self) -> None:
        """What was found to be idle is not to be relied on."""
        with self._lock:
            self._idle = _Idle({}, 0.0)

    def _look(self) -> _Idle:
        began = time.monotonic()
        if began >= self._idle.until:
            found = _Idle({}, 0.0)
            for block in self._sealed.idle.found():
                for quota in self._book.counts_for(block):
                    if not self._sealed.is_pinned(block):
                        found.of.setdefault(quota, deque()).append(block)
            now = time.monotonic()
            # Looking at all of it takes at most a fiftieth of the time.
            self._idle = found._replace(until=now + max(_LOOK_EVERY_S, 50 * (now - began)))
        return self._idle

    # ---- giving up -------------------------------------------------------------------------------------------------

    def to_give_up(self, quota: int, need: int) -> list[BlockId]:
        """As `Tier.to_give_up`, of what counts for a quota."""
        with self._lock:
            return self._eviction.to_give_up(need, lambda: self._book.shared(quota))

    def make_room(self, quota: int, need: int, wanted: BlockId | None, *, evict: bool) -> int:
        """Give up what counts for a quota until it is `need` bytes less, perhaps for a block that is wanted: what is in
        parts and idle first; without `evict`, nothing else. Returns how much less it is, perhaps not enough: a call
        gives up some blocks only. Raises OSError.
        """
        freed = 0
        with self._lock:
            dormant = [each for each in self._dormant if each != wanted and quota in self._book.counts_for(each)]
            sealed = self._to_evict(quota, evict)
        for block in dormant:
            if freed >= need:
                break
            with self._closed_later() as later:
                if block in self._dormant:
                    size = self._dormant.size(block)
                    freed += size if self._dormant.evict(block, later) else 0
        for _ in range(_EVICTED_AT_ONCE):
            if freed >= need:
                break
            with self._closed_later() as later:
                found = next(sealed, None)
                if found is None:
                    break
                size = self._sealed.size(found)
                if size and self._eviction.evict(found, later):
                    freed += size
        return freed

    @contextmanager
    def _closed_later(self) -> Iterator[list[int]]:
        """Holds the lock for one block to be evicted, and closes its file without it: that is when a file system gives
        its room back, and for a large block it takes a good part of a second.
        """
        later: list[int] = []
        try:
            with self._lock:
                yield later
        finally:
            for fd in later:
                os.close(fd)

    def _to_evict(self, quota: int, evict: bool) -> Iterator[BlockId]:
        """Others may be at it as well, and change things between two steps: each is taken with the lock held."""
        now = time.monotonic()
        idle = self._look().of.get(quota, deque())
        for _ in range(len(idle)):
            if not idle:
                break
            block = idle[0]
            is_idle = self._sealed.is_idle(block, now)
            if is_idle:
                yield block
            # Only now, as nobody may have asked for the next one.
            if idle and idle[0] == block:
                idle.popleft()
                if is_idle and block in self._sealed:
                    idle.append(block)
        if evict:
            yield from self._sealed.unshared(self._book.candidates(quota))
