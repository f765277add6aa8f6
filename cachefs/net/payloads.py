"""Memory for answers, of all connections of a process."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import NamedTuple

import trio

from cachefs.model import MiB

MAX_BYTES = 32 * MiB
"""Above it, each connection still gets one answer at a time from each store, so that those who do not read, and stores
that do not answer, keep nobody from being answered."""


class _Wanted(NamedTuple):
    session: int
    store: str
    length: int


class Room:
    """For one answer. Made by `Payloads.take`; each is given back once."""

    def __init__(self, payloads: Payloads, wanted: _Wanted) -> None:
        self._payloads = payloads
        self._wanted = wanted
        self._is_awaited = bool(wanted.store)

    def made(self) -> None:
        """The bytes have come from the store: it is not waited for any more."""
        if self._is_awaited:
            self._is_awaited = False
            self._payloads._made(self._wanted)

    def give_back(self) -> None:
        """They are sent, or given up."""
        self.made()
        self._payloads._remove(self._wanted)


class Payloads:
    """Answers in memory that are being made, or wait to be sent, of all connections of a process.

    Room is taken before the bytes are there, since there must be no more of them than it is. Of one store half of all
    room may be waited for: it may be one that does not answer.
    """

    def __init__(self, most_bytes: int = MAX_BYTES) -> None:
        self._most_bytes = most_bytes
        self._of: Counter[tuple[int, str]] = Counter()
        """(session, store) -> bytes; of those that have any."""
        self._awaited: Counter[str] = Counter()
        """Store -> bytes that have not come from it."""
        self._total_bytes = 0
        self._waiting: OrderedDict[trio.Event, _Wanted] = OrderedDict()

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    async def take(self, session: int, count: int, store: str = "") -> Room:
        """Wait until there is room for so many bytes of that store; empty: they are here. Cancelled: it has none."""
        wanted = _Wanted(session, store, count)
        room = Room(self, wanted)
        if self._has_room(wanted):
            self._add(wanted)
        else:
            turn = trio.Event()
            self._waiting[turn] = wanted
            try:
                await turn.wait()
            except trio.Cancelled:
                # It may have come after the cancellation, and before this task heard of that.
                if self._waiting.pop(turn, None) is None:
                    room.give_back()
                raise
        return room

    def _has_room(self, wanted: _Wanted) -> bool:
        if (wanted.session, wanted.store) not in self._of:
            return True
        if self._total_bytes + wanted.length > self._most_bytes:
            return False
        awaited = self._awaited[wanted.store] if wanted.store else 0
        return not awaited or awaited + wanted.length <= self._most_bytes // 2

    def _add(self, wanted: _Wanted) -> None:
        self._of[wanted.session, wanted.store] += wanted.length
        self._total_bytes += wanted.length
        if wanted.store:
            self._awaited[wanted.store] += wanted.length

    def _made(self, wanted: _Wanted) -> None:
        self._awaited[wanted.store] -= wanted.length
        if not self._awaited[wanted.store]:
            del self._awaited[wanted.store]
        self._hand_out()

    def _remove(self, wanted: _Wanted) -> None:
        self._total_bytes -= wanted.length
        self._of[wanted.session, wanted.store] -= wanted.length
        if not self._of[wanted.session, wanted.store]:
            del self._of[wanted.session, wanted.store]
        self._hand_out()

    def _hand_out(self) -> None:
        for turn, wanted in list(self._waiting.items()):
            if self._has_room(wanted):
                del self._waiting[turn]
                self._add(wanted)
                turn.set()


of_this_process = Payloads()
"""There is one memory, however many services and connections."""
