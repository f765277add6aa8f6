"""Names that were asked for and are missing."""

from __future__ import annotations

from collections import OrderedDict

from cachefs.model import Ino

_MOST = 100_000
"""A few hundred bytes each."""


class Denied:
    """The names that somebody was told do not exist, with the time of the look that said so; the latest ones only."""

    def __init__(self) -> None:
        self._asked_ns: OrderedDict[tuple[Ino, str], int] = OrderedDict()
        self.has_forgotten = False
        """Whoever was told that there is no such name cannot be told of it by name any more."""

    def __contains__(self, name: tuple[Ino, str]) -> bool:
        return name in self._asked_ns

    def asked_ns(self, directory: Ino, name: str) -> int:
        """The Unix time of the look; 0: none is known."""
        return self._asked_ns.get((directory, name), 0)

    def add(self, directory: Ino, name: str, asked_ns: int) -> None:
        self._asked_ns[(directory, name)] = asked_ns
        self._asked_ns.move_to_end((directory, name))
        if len(self._asked_ns) > _MOST:
            self._asked_ns.popitem(last=False)
            self.has_forgotten = True

    def discard(self, directory: Ino, name: str) -> bool:
        """It exists now; whether it was among these."""
        return self._asked_ns.pop((directory, name), None) is not None
