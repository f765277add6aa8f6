"""All files at and below some paths, in an order that a walk which was broken off can be gone on with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from cachefs.meta import Content, Inode, MetaStore
from cachefs.model import NO_INO, ROOT_INO, Ino

_CHUNK = 500
_LOOKS = 20
"""Pages of directories looked at in one go."""


class Position(msgspec.Struct, frozen=True, array_like=True):
    root: int = 0
    """Paths begun."""
    levels: list[tuple[Ino, Ino]] = []
    """(directory, the last of its entries that was passed), from the outermost to where it is."""


class _Level:
    def __init__(self, ino: Ino, after: Ino) -> None:
        self.ino = ino
        self.after = after
        self.waiting: deque[Content] = deque()


class Walk:
    """By inode number within each directory, and down into each that is met. What is known, the under-store is not
    asked. Memory: a page of entries for each level.
    """

    def __init__(self, store: MetaStore, paths: Sequence[str], position: Position | None = None) -> None:
        self._store = store
        self._paths = paths
        position = position if position is not None else Position()
        self._root = position.root
        self._levels = [_Level(ino, after) for ino, after in position.levels]

    @property
    def position(self) -> Position:
        """After all that `next` has returned."""
        return Position(self._root, [(each.ino, each.after) for each in self._levels])

    @property
    def ended(self) -> bool:
        return not self._levels and self._root >= len(self._paths)

    def next(self) -> list[Content]:
        """The next files, all of one directory; may be none."""
        for _ in range(_LOOKS):
            if not self._levels:
                if self.ended:
                    break
                inode = find(self._store, self._paths[self._root])
                self._root += 1
                if inode is not None and not inode.attr.is_dir:
                    attr = inode.attr
                    return [Content(attr.ino, False, attr.size_bytes, attr.key, 0)]
                if inode is not None:
                    self._levels.append(_Level(inode.attr.ino, NO_INO))
                continue
            level = self._levels[-1]
            if not level.waiting:
                level.waiting.extend(self._store.contents(level.ino, level.after, _CHUNK, with_cached=False))
            if not level.waiting:
                self._levels.pop()
                continue
            files = []
            while level.waiting:
                content = level.waiting.popleft()
                level.after = content.ino
                if content.is_dir:
                    self._levels.append(_Level(content.ino, NO_INO))
                    break
                files.append(content)
            if files:
                return files
        return []


def find(store: MetaStore, path: str) -> Inode | None:
    """What is known at a path."""
    inode = store.get(ROOT_INO)
    for name in [part for part in path.split("/") if part]:
        if inode is None:
            return None
        inode = store.child(inode.attr.ino, name)
    return inode
