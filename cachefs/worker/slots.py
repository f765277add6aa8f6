"""What is read at once from elsewhere: so many requests, and no more memory than so many bytes.

A store that does not answer keeps its slots until its deadline, and those who read it wait for more of them. So that
those who read another one go on, a free slot goes to the store that has the fewest, and one that has none does not
wait: a few slots above the bounds are for that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from cachefs.model import MiB

SLOT_BYTES = 8 * MiB
"""Of memory for each slot, the default page: with larger pages fewer are read at once, and not twice the memory."""
ABOVE = 4
"""Slots above the bounds, for stores that have none; with a quarter more memory, or one page that is larger."""


class Slots:
    """Each holder has a slot and the memory for what it reads. Of one store: first come, first served."""

    def __init__(self, count: int, max_bytes: int) -> None:
        self.total = count
        """Without those above."""
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._of: Counter[str] = Counter()
        """Store -> slots; of those that have any."""
        self._taken = 0
        self._waiting: dict[str, deque[tuple[trio.Event, int]]] = {}
        """Store -> (turn, bytes); of those that somebody waits for."""

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @asynccontextmanager
    async def one(self, length: int, store: str = "") -> AsyncGenerator[None]:
        """A slot, and memory for `length` bytes of that store, until the end of the block. What is larger than all
        there is comes alone. Cancelled while it waits, it holds nothing.
        """
        await trio.lowlevel.checkpoint()
        await self._take(length, store)
        try:
            yield
        finally:
            self._give_back(length, store)

    async def _take(self, length: int, store: str) -> None:
        turn = trio.Event(), length
        self._waiting.setdefault(store, deque()).append(turn)
        self._hand_out()
        if turn[0].is_set():
            return
        try:
            await turn[0].wait()
        except trio.Cancelled:
            # Its turn may have come after the cancellation, and before this task heard of that.
            if turn[0].is_set():
                self._give_back(length, store)
            else:
                self._stop_waiting(turn, store)
                self._hand_out()
            raise

    def _stop_waiting(self, turn: tuple[trio.Event, int], store: str) -> None:
        self._waiting[store].remove(turn)
        if not self._waiting[store]:
            del self._waiting[store]

    def _give_back(self, length: int, store: str) -> None:
        self._taken -= 1
        self._held_bytes -= length
        self._of[store] -= 1
        if not self._of[store]:
            del self._of[store]
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting:
            store = min(self._waiting, key=self._of.__getitem__)
            turn = self._waiting[store][0]
            if not self._may_have(store, turn[1]):
                return
            self._stop_waiting(turn, store)
            self._taken += 1
            self._held_bytes += turn[1]
            self._of[store] += 1
            turn[0].set()

    def _may_have(self, store: str, length: int) -> bool:
        if self._taken < self.total and (not self._held_bytes or self._held_bytes + length <= self._max_bytes):
            return True
        if store in self._of or self._taken >= self.total + ABOVE:
            return False
        return self._held_bytes <= self._max_bytes or self._held_bytes + length <= self._max_bytes * 5 // 4
