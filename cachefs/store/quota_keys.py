"""Which contents count for which quotas, in packed form."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left

from cachefs.model import ContentKey

_SLOT_BITS = 12
_SLOT = (1 << _SLOT_BITS) - 1
MOST_SLOTS = 1 << _SLOT_BITS

Ids = tuple[int, ...]
"""Quotas that a content counts for, the innermost of each of its paths; what they lie below it counts for too."""


class QuotaKeys:
    """Which contents count for which quotas: eight bytes for each, in order.

    52 bits of a key tell it from others well enough, the other 12 say which quota: that one of a million contents
    that count for none is taken for one of a million that do has a chance of 1 in 4,500, and it is counted then.

    Changed from one thread, looked at from any.
    """

    def __init__(self) -> None:
        self._known: tuple[array[int], list[int]] = array("Q"), []
        """Ascending, and which quota each slot stands for. Never changed: another pair takes its place."""
        self._more: dict[int, Ids] = {}
        self._collected, self._slots = array("Q"), dict[int, int]()
        self._since: dict[int, Ids] = {}
        """What was added since `begin`."""

    def of(self, key: ContentKey) -> Ids:
        """None, as a rule; several for a content that is at several paths."""
        part = _part(key)
        known, slots = self._known
        at = bisect_left(known, part)
        found = self._more.get(part, ()) if self._more else ()
        while at < len(known) and known[at] & ~_SLOT == part:
            quota = slots[known[at] & _SLOT]
            if quota not in found:
                found = (*found, quota)
            at += 1
        return found

    def add(self, key: ContentKey, quota: int) -> None:
        """One more. It outlives the set that is being collected."""
        part = _part(key)
        for more in (self._since, self._more):
            ids = more.get(part, ())
            if quota not in ids:
                more[part] = (*ids, quota)

    def begin(self) -> None:
        """Another set is going to be told, in portions: until `finish`, the one before is in force."""
        self._collected, self._slots = array("Q"), {}
        self._since = {}

    def collect(self, quota: int, packed: bytes) -> None:
        """Keys of 16 bytes, one after the other. Of at most `MOST_SLOTS` quotas."""
        slot = self._slots.setdefault(quota, len(self._slots))
        if slot < MOST_SLOTS:
            self._collected.extend((half & ~_SLOT) | slot for half in memoryview(packed).cast("Q")[1::2].tolist())

    def ordered(self) -> array[int]:
        """What was collected, for `finish`. Takes a second for some millions: to be called in a thread."""
        return array("Q", sorted(self._collected))

    def finish(self, ordered: array[int]) -> None:
        """That is in force from now on, with what was added since `begin`."""
        self._collected = array("Q")
        # In this order: who looks in between finds too much, not too little.
        self._known = ordered, list(self._slots)
        self._more = dict(self._since)


def _part(key: ContentKey) -> int:
    return int.from_bytes(key[8:], sys.byteorder) & ~_SLOT
