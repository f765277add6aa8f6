"""What a workload yielded, for tests of workloads."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import Figure, Gap


@dataclass
class Measured:
    figures: list[Figure]
    gaps: list[Gap]

    def of(self, metric: str) -> dict[str, float]:
        """Case -> value."""
        return {each.case: each.value for each in self.figures if each.metric == metric}
