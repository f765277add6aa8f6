"""SIEVE, the order in which a cache gives things up (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024).

One queue, newest at the head, and a hand that walks from the tail to the head and around. A hit only sets a bit, so
nothing moves on the hot path. The hand clears the bit of what was visited and stops at the first that was not: the
candidate. What survives keeps its place, which is what makes one-time scans leave soon.

What is pinned is kept outside of the queue: it is never a candidate, and walking past it costs nothing, however much
of the cache it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class _Node(Generic[K]):
    __slots__ = ("key", "newer", "older", "visited")

    def __init__(self, key: K) -> None:
        self.key = key
        self.visited = False
        self.newer: _Node[K] | None = None
        self.older: _Node[K] | None = None


class Sieve(Generic[K]):
    """The keys of a cache in SIEVE order. Every operation is O(1); not thread-safe."""

    def __init__(self) -> None:
        self._nodes: dict[K, _Node[K]] = {}
        self._pinned: set[K] = set()
        self._newest: _Node[K] | None = None
        self._oldest: _Node[K] | None = None
        self._hand: _Node[K] | None = None
        """The node to look at next; None stands for the oldest."""

    def __len__(self) -> int:
        return len(self._nodes) + len(self._pinned)

    def __contains__(self, key: K) -> bool:
        return key in self._nodes or key in self._pinned

    def is_pinned(self, key: K) -> bool:
        return key in self._pinned

    def is_visited(self, key: K) -> bool:
        """It was hit since the hand came by last; False for what is pinned or not there."""
        node = self._nodes.get(key)
        return node is not None and node.visited

    def pin(self, key: K) -> bool:
        """Make a key no candidate until `unpin` or `remove`; False if it is not there, or is pinned already."""
        if key not in self._nodes:
            return False
        self._unlink(key)
        self._pinned.add(key)
        return True

    def unpin(self, key: K) -> bool:
        """Put a pinned key back, as a new one; False if it is none."""
        if key not in self._pinned:
            return False
        self._pinned.discard(key)
        self.add(key)
        return True

    def add(self, key: K) -> None:
        """Put a new key at the head, not visited. A key that is there already counts as visited."""
        if key in self._pinned:
            return
        if key in self._nodes:
            self._nodes[key].visited = True
            return
        node = self._nodes[key] = _Node(key)
        node.older = self._newest
        if self._newest is not None:
            self._newest.newer = node
        else:
            self._oldest = node
        self._newest = node

    def visit(self, key: K) -> None:
        """Note a hit; an unknown key is ignored (it was evicted meanwhile)."""
        node = self._nodes.get(key)
        if node is not None:
            node.visited = True

    def remove(self, key: K) -> None:
        """Forget a key, evicted or dropped; an unknown key is ignored."""
        self._pinned.discard(key)
        self._unlink(key)

    def _unlink(self, key: K) -> None:
        node = self._nodes.pop(key, None)
        if node is None:
            return
        if self._hand is node:
            self._hand = node.newer
        if node.newer is not None:
            node.newer.older = node.older
        else:
            self._newest = node.older
        if node.older is not None:
            node.older.newer = node.newer
        else:
            self._oldest = node.newer

    def candidates(self) -> Iterator[K]:
        """The keys that are not pinned, in eviction order, each at most once; ends when all were offered.

        The hand moves only as far as candidates are taken: it stays at the offered key until the next one is asked
        for. The caller evicts by calling `remove(key)`; a key it leaves alone (in use) keeps its place in the queue
        and is offered again by a later walk, when the hand has come around. Adding, visiting and removing keys
        between two steps is allowed.
        """
        left_alone: set[K] = set()
        # One lap clears what was visited, a second one offers it; keys visited meanwhile must not keep us walking.
        steps = 2 * len(self._nodes)
        while steps > 0 and len(left_alone) < len(self._nodes):
            steps -= 1
            node = self._hand or self._oldest
            if node is None:
                return
            if node.visited:
                node.visited = False
                self._hand = node.newer
                continue
            if node.key in left_alone:
                self._hand = node.newer
                continue
            self._hand = node
            yield node.key
            if self._nodes.get(node.key) is node:
                left_alone.add(node.key)
                if self._hand is node:
                    self._hand = node.newer
