"""What a cache holds for work that is over, so that it counts as free.

The time since a block was read says little: a training job reads each block once an epoch, which may take hours, and
what is given up in between is fetched again. But blocks that came one after the other came for the same work, and of
some hundred of them a running job reads one every few minutes, in any random order. So blocks are put into groups as
they come, and a group is idle when none of it was read for long.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MIN_GROUP = 32
_MAX_GROUP = 256
_GROUPS = 8
"""A small cache is divided into so many, so that a new job's blocks do not keep all of the last one's alive."""


class _Group(Generic[K]):
    __slots__ = ("came", "sizes", "used_at")

    def __init__(self, now: float) -> None:
        self.sizes: dict[K, int] = {}
        self.came = 0
        self.used_at = now


class IdleGroups(Generic[K]):
    """The keys of a cache with their sizes, in groups. Pure: told of times, in any unit; not thread-safe."""

    def __init__(self, idle_after: float, max_group: int = _MAX_GROUP) -> None:
        """With `max_group` 1 each key is idle by itself."""
        self._idle_after = idle_after
        self._max_group = max_group
        self._group_of: dict[K, _Group[K]] = {}
        self._groups: dict[_Group[K], None] = {}
        self._open: _Group[K] | None = None
        """Takes what comes next."""

    def __len__(self) -> int:
        return len(self._group_of)

    def __contains__(self, key: K) -> bool:
        return key in self._group_of

    def add(self, key: K, size: int, now: float) -> None:
        """A key that is there already counts as used, and keeps its size."""
        if key in self._group_of:
            self.use(key, now)
            return
        group = self._open
        if group is None or group.came >= self._group_size() or group.used_at <= now - self._idle_after:
            group = self._open = _Group(now)
            self._groups[group] = None
        group.sizes[key] = size
        group.came += 1
        group.used_at = now
        self._group_of[key] = group

    def _group_size(self) -> int:
        return min(self._max_group, max(_MIN_GROUP, len(self._group_of) // _GROUPS))

    def use(self, key: K, now: float) -> None:
        """Somebody read it; an unknown key is ignored."""
        group = self._group_of.get(key)
        if group is not None:
            group.used_at = now

    def remove(self, key: K) -> None:
        """Forget a key that was evicted; an unknown one is ignored."""
        group = self._group_of.pop(key, None)
        if group is None:
            return
        del group.sizes[key]
        if not group.sizes:
            del self._groups[group]
            if group is self._open:
                self._open = None

    def idle_bytes(self, now: float) -> int:
        """O(groups)."""
        return sum(sum(group.sizes.values()) for group in self._idle(now))

    def is_idle(self, key: K, now: float) -> bool:
        group = self._group_of.get(key)
        return group is not None and group.used_at <= now - self._idle_after

    def candidates(self, now: float) -> Iterator[K]:
        """The keys that count as free, longest idle first. They may be removed, added and used meanwhile."""
        for group in sorted(self._idle(now), key=lambda group: group.used_at):
            for key in list(group.sizes):
                if group.used_at > now - self._idle_after:
                    break
                if key in group.sizes:
                    yield key

    def _idle(self, now: float) -> list[_Group[K]]:
        return [group for group in self._groups if group.used_at <= now - self._idle_after]
