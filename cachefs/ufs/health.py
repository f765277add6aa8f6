"""Whether an under-store answers, as whoever reads from it has seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachefs.model import CachefsError, DeniedError, UnderStoreError

_LONGEST_ERROR = 300
"""Characters of an error that are kept."""
_AWAY_S = 120.0
"""For so long after a request that failed nobody waits for the next one; it is longer than a request takes to fail."""


class StoreHealth:
    """Of one under-store. What is refused counts as what fails; an object that is gone or changed is an answer."""

    def __init__(self) -> None:
        self.failures = 0
        """Requests that failed, each after its retries."""
        self.last_error = ""
        """Kept when it answers again."""
        self._since: float | None = None
        """None: it did what was asked the last time, or was not asked."""
        self._away_until = -math.inf

    @property
    def is_failing(self) -> bool:
        return self._since is not None

    @property
    def is_away(self) -> bool:
        """Whether it failed to answer a moment ago. One that failed and was not asked since may long be well, and one
        that refuses something answers.
        """
        return time.monotonic() < self._away_until

    @property
    def failing_s(self) -> float:
        """Seconds; 0: it is well."""
        return time.monotonic() - self._since if self._since is not None else 0.0

    def answered(self) -> None:
        self._since = None
        self._away_until = -math.inf

    def failed(self, error: Exception) -> None:
        self.failures += 1
        self.last_error = " ".join(str(error).split())[:_LONGEST_ERROR]
        if self._since is None:
            self._since = time.monotonic()
        self._away_until = -math.inf if isinstance(error, DeniedError) else time.monotonic() + _AWAY_S

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A request to it."""
        try:
            yield
        except UnderStoreError as error:
            self.failed(error)
            raise
        except CachefsError:
            self.answered()
            raise
        self.answered()
