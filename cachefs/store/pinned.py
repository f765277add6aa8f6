"""Which contents are never evicted: a set of keys in packed form."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left

from cachefs.model import ContentKey


class PinnedKeys:
    """Eight bytes for a key, in order: a set of Python objects would take a hundred for each of a million.

    Half of a key tells it from others well enough: where two share it, a content more is kept than was asked for, which
    happens to one of a million times a million with a chance of 1 in 20 million.

    Changed from one thread, looked at from any.
    """

    def __init__(self) -> None:
        self._known = array("Q")
        """Ascending. Never changed: another one takes its place."""
        self._more: set[int] = set()
        self._collected = array("Q")
        self._since: set[int] = set()
        """What was added since `begin`."""

    def __contains__(self, key: ContentKey) -> bool:
        half = int.from_bytes(key[8:], sys.byteorder)
        known = self._known
        at = bisect_left(known, half)
        return (at < len(known) and known[at] == half) or half in self._more

    def add(self, key: ContentKey) -> None:
        """One more. It outlives the set that is being collected."""
        half = int.from_bytes(key[8:], sys.byteorder)
        self._since.add(half)
        self._more.add(half)

    def begin(self) -> None:
        """Another set is going to be told, in portions: until `finish`, the one before is in force."""
        self._collected = array("Q")
        self._since = set()

    def collect(self, packed: bytes) -> None:
        """Keys of 16 bytes, one after the other."""
        self._collected.extend(memoryview(packed).cast("Q")[1::2].tolist())

    def ordered(self) -> array[int]:
        """What was collected, for `finish`. Takes a second for some millions: to be called in a thread."""
        return array("Q", sorted(self._collected))

    def finish(self, ordered: array[int]) -> None:
        """That is in force from now on, with what was added since `begin`."""
        self._collected = array("Q")
        # In this order: who looks in between finds too much, not too little.
        self._known = ordered
        self._more = set(self._since)
