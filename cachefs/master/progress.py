"""How far a job is, so that it can be gone on with: what is done in order is kept apart from what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from cachefs.master.walks import Position
from cachefs.wire.control import JobCounts

MOST_FAILURES = 100
"""Told of one job; all are counted."""


class Portion:
    """Some things of a job that are begun together."""

    def __init__(self, position: Position) -> None:
        self.position = position
        """Where to go on when all of it is done."""
        self.counts = JobCounts()
        self.failures: list[tuple[str, str]] = []
        self.open = 1
        """Things that are not done; one more until all are begun."""


class Progress:
    def __init__(
        self,
        position: Position | None = None,
        counts: JobCounts | None = None,
        failures: list[tuple[str, str]] | None = None,
    ) -> None:
        self.position = position
        """Everything before it is done; None: not even listed."""
        self.base = counts if counts is not None else JobCounts()
        """Up to there."""
        self.base_failures = failures if failures is not None else []
        self._portions: deque[Portion] = deque()

    def begin(self, position: Position) -> Portion:
        portion = Portion(position)
        self._portions.append(portion)
        return portion

    def settle(self) -> None:
        """What is done of all that is done before it counts for good."""
        while self._portions and not self._portions[0].open:
            portion = self._portions.popleft()
            self.position = portion.position
            add(self.base, portion.counts)
            self.base_failures = (self.base_failures + portion.failures)[:MOST_FAILURES]

    def fail(self, what: str, reason: str) -> None:
        """Something outside of portions."""
        self.base.failed += 1
        self.base_failures = [*self.base_failures, (what, reason)][:MOST_FAILURES]

    def begin_again(self) -> None:
        """All is looked at once more; what was copied stays counted."""
        self.settle()
        self.base = JobCounts(copies=self.base.copies, copied_bytes=self.base.copied_bytes)
        self.base_failures = []

    def counts(self) -> JobCounts:
        """With what is under way."""
        total = msgspec.structs.replace(self.base)
        for portion in self._portions:
            add(total, portion.counts)
        return total

    def failures(self) -> list[tuple[str, str]]:
        return list(_first(self.base_failures, *(portion.failures for portion in self._portions)))[:MOST_FAILURES]


def add(to: JobCounts, more: JobCounts) -> None:
    for name in JobCounts.__struct_fields__:
        setattr(to, name, getattr(to, name) + getattr(more, name))


def _first(*lists: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for each in lists:
        yield from each
