"""How long names are believed."""

from __future__ import annotations

import time

NS_PER_S = 1_000_000_000


class Freshness:
    """Tells from the time when something was looked at whether it is still believed. Times are Unix times."""

    def __init__(self, sync_interval_s: float) -> None:
        self.sync_interval_s = sync_interval_s
        """0: nothing is believed; below 0: everything."""

    def now_ns(self) -> int:
        """To be taken before a look begins: what it finds is as old as that."""
        return time.time_ns()

    def is_fresh(self, checked_ns: int) -> bool:
        """0 stands for never."""
        if checked_ns == 0:
            return False
        if self.sync_interval_s < 0:
            return True
        # Checked in the future: the clock was set back since, and nobody knows how long ago that was.
        return 0 <= self.now_ns() - checked_ns < self.sync_interval_s * NS_PER_S
