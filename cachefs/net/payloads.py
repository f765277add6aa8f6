"""Memory for answers, of all connections of a process."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial

import trio

from cachefs.model import MiB

MAX_BYTES = 32 * MiB
"""Above it, each connection still gets one answer at a time, so that those who do not read keep nobody from being
answered."""


class Payloads:
    """Answers in memory that are being made, or wait to be sent, of all connections of a process."""

    def __init__(self, most_bytes: int = MAX_BYTES) -> None:
        self._most_bytes = most_bytes
        self._of: Counter[int] = Counter()
        """Session -> bytes; of those that have any."""
        self._total_bytes = 0
        self._waiting: OrderedDict[trio.Event, tuple[int, int]] = OrderedDict()
        """Those who wait -> (session, bytes)."""

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    async def take(self, session: int, count: int) -> Callable[[], None]:
        """Wait until there is room for so many bytes; what is returned gives it back. Cancelled: it has none."""
        if self._has_room(session, count):
            self._add(session, count)
        else:
            turn = trio.Event()
            self._waiting[turn] = session, count
            try:
                await turn.wait()
            except trio.Cancelled:
                # It may have come after the cancellation, and before this task heard of that.
                if self._waiting.pop(turn, None) is None:
                    self._remove(session, count)
                raise
        return partial(self._remove, session, count)

    def _has_room(self, session: int, count: int) -> bool:
        return session not in self._of or self._total_bytes + count <= self._most_bytes

    def _add(self, session: int, count: int) -> None:
        self._of[session] += count
        self._total_bytes += count

    def _remove(self, session: int, count: int) -> None:
        self._total_bytes -= count
        self._of[session] -= count
        if not self._of[session]:
            del self._of[session]
        for turn, (waiting, wanted) in list(self._waiting.items()):
            if self._has_room(waiting, wanted):
                del self._waiting[turn]
                self._add(waiting, wanted)
                turn.set()


of_this_process = Payloads()
"""There is one memory, however many services and connections."""
