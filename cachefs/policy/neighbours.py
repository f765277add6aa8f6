"""How many to ask for when one is asked for: as many as are used before they are forgotten."""

from __future__ import annotations

_JUDGED = 64
_PROBE_EVERY = 1024


class Neighbours:
    """Pure, not thread-safe. `count` says how many to ask for now, the one that is wanted included; whoever asks tells
    what became of the others.
    """

    def __init__(self, first: int = 8, most: int = 64) -> None:
        self._first = first
        self._most = most
        self._used = 0
        self._wasted = 0
        self._alone = 0
        self._count = first

    @property
    def count(self) -> int:
        return self._count

    def asked(self) -> None:
        """`count` were asked for. Of one alone nothing is learned: now and then a few are tried again."""
        if self._count == 1:
            self._alone += 1
            if self._alone == _PROBE_EVERY:
                self._alone = 0
                self._count = self._first

    def used(self) -> None:
        """One that came along was asked for later."""
        self._used += 1
        self._judge()

    def wasted(self) -> None:
        """One that came along was forgotten before anybody asked for it."""
        self._wasted += 1
        self._judge()

    def _judge(self) -> None:
        if self._used + self._wasted == _JUDGED:
            self._count = min(self._most, 2 * self._count) if self._used >= self._wasted else max(1, self._count // 2)
            self._used = self._wasted = 0
