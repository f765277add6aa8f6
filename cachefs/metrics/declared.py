"""What a metric is: its name, what it says, and how its value is read when somebody asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from cachefs.metrics.times import Times

P = TypeVar("P")

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]
Value = float | Mapping[Labels, float] | None
"""One number; one for each combination of labels; or None where there is nothing to tell."""

_NAME = re.compile("cachefs(_[a-z]+)+")


@dataclass(frozen=True)
class Metric(Generic[P]):
    """Of a process whose parts are a `P`. Raises ValueError for a name that does not follow the rules."""

    name: str
    """With its unit: `_bytes`, `_seconds`; what only grows ends in `_total`, as Prometheus has it."""
    kind: Kind
    help: str
    read: Callable[[P], Any]
    """A `Value`; of a histogram, `Times` or None."""
    labels: Labels = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.endswith("_total") is not (self.kind == "counter"):
            raise ValueError(f"{self.name}: not a name for a {self.kind}")


def counter(name: str, text: str, read: Callable[[P], Value], *labels: str) -> Metric[P]:
    """What only grows, until the process starts again."""
    return Metric(name, "counter", text, read, labels)


def gauge(name: str, text: str, read: Callable[[P], Value], *labels: str) -> Metric[P]:
    """What goes up and down."""
    return Metric(name, "gauge", text, read, labels)


def histogram(name: str, text: str, read: Callable[[P], Times[Any] | None], *labels: str) -> Metric[P]:
    """How long something took, in seconds. A label at most: the key of the `Times`."""
    return Metric(name, "histogram", text, read, labels)


def by_label(values: Mapping[Any, float]) -> dict[Labels, float]:
    """With one label, from what has plain keys."""
    return {(str(key),): value for key, value in values.items()}


def errors_of(times: Times[Any] | None) -> dict[Labels, float] | None:
    """How many did not go well, for each key that was ever counted."""
    return None if times is None else {(str(key),): times.errors.get(key, 0) for key in times.cells}


def read_histogram(times: Times[Any], labels: Labels) -> list[tuple[Labels, list[float]]]:
    """(labels, cell) of each key."""
    keys: list[Hashable] = list(times.cells)
    return [((str(key),) if labels else (), times.cells[key]) for key in keys]
