"""What is read at once from elsewhere: so many requests, and no more memory than so many bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from cachefs.model import MiB

SLOT_BYTES = 8 * MiB
"""Of memory for each slot, the default page: with larger pages fewer are read at once, and not twice the memory."""


class Slots:
    """Each holder has a slot and the memory for what it reads. First come, first served."""

    def __init__(self, count: int, max_bytes: int) -> None:
        self._slots = trio.CapacityLimiter(count)
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._waiting: deque[tuple[trio.Event, int]] = deque()

    @property
    def total(self) -> int:
        return int(self._slots.total_tokens)

    @property
    def taken(self) -> int:
        return self._slots.borrowed_tokens

    @property
    def waiting(self) -> int:
        """Who has no slot, or no memory yet."""
        return self._slots.statistics().tasks_waiting + len(self._waiting)

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @asynccontextmanager
    async def one(self, length: int) -> AsyncGenerator[None]:
        """A slot, and memory for `length` bytes, until the end of the block. What is larger than all there is comes
        alone. Cancelled while it waits, it holds nothing.
        """
        async with self._slots:
            await self._take(length)
            try:
                yield
            finally:
                self._held_bytes -= length
                self._hand_out()

    def _fits(self, length: int) -> bool:
        return not self._held_bytes or self._held_bytes + length <= self._max_bytes

    async def _take(self, length: int) -> None:
        if not self._waiting and self._fits(length):
            self._held_bytes += length
            return
        turn = trio.Event(), length
        self._waiting.append(turn)
        try:
            await turn[0].wait()
        except trio.Cancelled:
            # Its turn may have come after the cancellation, and before this task heard of that.
            if turn[0].is_set():
                self._held_bytes -= length
            else:
                self._waiting.remove(turn)
            self._hand_out()
            raise

    def _hand_out(self) -> None:
        while self._waiting and self._fits(self._waiting[0][1]):
            event, length = self._waiting.popleft()
            self._held_bytes += length
            event.set()
