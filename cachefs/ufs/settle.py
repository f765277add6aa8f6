"""For versions that are told by a time: a clock that ticks slowly gives two changes the same time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

import trio

from cachefs.ufs import options as opts

SETTLED_S = 2.0
"""Age from which another change also changes the time of the file: the tick of the slowest clock, that of FAT."""
MEANING = "seconds, 0 to 2, that a change must be old before a file is read; default 2"
_REMEMBERED = 1000


def settled_s(options: Mapping[str, str]) -> float:
    """The option `settle`. Raises ConfigError."""
    return opts.number(options, "settle", SETTLED_S, 0, SETTLED_S)


class Settling:
    """Says how long to wait before a version is read."""

    def __init__(self, settled_s: float = SETTLED_S, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._settled_s = settled_s
        self._now_ns = now_ns
        self._young: OrderedDict[tuple[str, str], float] = OrderedDict()
        """(path, tag) -> when a version was met before it had settled, in trio's time."""

    def pause_s(self, path: str, tag: str, changed_ns: int) -> float:
        """Seconds until a further change must change the tag; 0 or less for what has settled.

        Told by our clock or, if the clocks differ, by the time since the version was first met here.
        """
        by_clock_s = self._settled_s - (self._now_ns() - changed_ns) / 1e9
        if by_clock_s <= 0:
            return 0.0
        now = trio.current_time()
        met = self._young.setdefault((path, tag), now)
        if len(self._young) > _REMEMBERED:
            self._young.popitem(last=False)
        return min(by_clock_s, met + self._settled_s - now)
