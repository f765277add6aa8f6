"""Logs that stay readable when the same thing fails thousands of times a second."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable


class _Window:
    """What was logged of one kind since `began_s`."""

    def __init__(self, level: int, began_s: float) -> None:
        self.level = level
        self.began_s = began_s
        self.logged = 0
        self.kept_back = 0


class LogLimiter:
    """Logs at most `limit` lines of a kind in `period_s` seconds, and then says how many more there were.

    The count comes with the next line, of whatever kind, after the period: nothing runs in the background. For one
    thread at a time. Keep kinds few: each is remembered for a period.
    """

    def __init__(
        self,
        logger: logging.Logger,
        limit: int = 10,
        period_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._limit = limit
        self._period_s = period_s
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._next_look_s = 0.0

    def log(
        self, level: int, kind: Hashable, message: str, *values: object, exc_info: BaseException | None = None
    ) -> None:
        """As `Logger.log`, unless there were too many of this kind."""
        if not self._logger.isEnabledFor(level):
            return
        now_s = self._clock()
        if now_s >= self._next_look_s:
            self._end_windows(now_s)
        window = self._windows.get(kind)
        if window is None:
            window = self._windows[kind] = _Window(level, now_s)
        if window.logged == self._limit:
            window.kept_back += 1
            return
        window.logged += 1
        if window.logged == self._limit:
            message += " (more of these are counted and not shown for %g s)"
            values = (*values, self._period_s)
        self._logger.log(level, message, *values, exc_info=exc_info)

    def _end_windows(self, now_s: float) -> None:
        for kind, window in list(self._windows.items()):
            if now_s - window.began_s >= self._period_s:
                del self._windows[kind]
                if window.kept_back:
                    what = " ".join(map(str, kind)) if isinstance(kind, tuple) else kind
                    seconds = now_s - window.began_s
                    self._logger.log(
                        window.level, "not shown count=%d kind=%s seconds=%.0f", window.kept_back, what, seconds
                    )
        self._next_look_s = now_s + self._period_s / 10
