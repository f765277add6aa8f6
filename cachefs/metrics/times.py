"""How long things took: counted into buckets, for less than half a microsecond each."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BOUNDS_S = (
    *(20e-6, 50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets, from an open answered from memory to an under-store that has to be asked again."""


class Times(Generic[K]):
    """One histogram for each key. Keys must be few. For one thread.

    Plain lists, read when somebody asks: the histograms of prometheus_client take a lock each time, and ten times as
    long with it (docs/decisions.md).
    """

    __slots__ = ("cells", "errors")

    def __init__(self) -> None:
        self.cells: dict[K, list[float]] = defaultdict(_empty_cell)
        """Key -> how many took up to each of `BOUNDS_S`, how many took longer, and the seconds of all."""
        self.errors: dict[K, int] = defaultdict(int)
        """Of those counted, how many did not go well."""

    def observe(self, key: K, seconds: float, ok: bool = True) -> None:
        cell = self.cells[key]
        cell[bisect_left(BOUNDS_S, seconds)] += 1
        cell[-1] += seconds
        if not ok:
            self.errors[key] += 1


def _empty_cell() -> list[float]:
    return [0] * (len(BOUNDS_S) + 1) + [0.0]
