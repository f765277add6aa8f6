"""What a run measured, as it is kept: one JSON file, bench/results/NAME.json."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

import msgspec

Better = Literal["more", "less", ""]
"""Which way is better; empty: neither, it explains others."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number out of one round of one system."""

    case: str
    """What was done, in words that are the same for all systems and unique within the workload."""
    metric: str
    """Such as "bytes_per_s", "files_per_s", "p99_s", "utilisation", "under_store_bytes"."""
    value: float
    unit: str
    """In "B/s", "1/s", "s", "B", "" for a ratio or share."""
    better: Better
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    """The same as `case` for programs: {"pattern": "random", "size": "4k", "jobs": "4", "state": "cached"}; "epoch":
    counted from 1, which is the cold one."""


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """A figure's values over all rounds."""

    workload: str
    case: str
    system: str
    """ "" where a workload knows no systems."""
    metric: str
    unit: str
    better: Better
    values: list[float]
    """One for each round, in order."""
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    required: float | None = None
    """Promised: at least (better "more"), or at most."""
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """What was to be measured and was not."""

    workload: str
    system: str
    kind: Literal["missing", "crashed", "hung", "failed", "skipped"]
    why: str
    """For a missing one: how to install it."""
    case: str = ""
    """Empty: all of them from here on."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    kernel: str
    cpu: str
    processors: int
    memory_bytes: int
    medium: str
    """Type of the file system that caches and native data lie on."""
    python: str


class Results(msgspec.Struct, kw_only=True):
    name: str
    began: str
    """ISO 8601, UTC."""
    seconds: float
    command: list[str]
    revision: str
    """Of git, with "+" where the tree was changed."""
    machine: Machine
    versions: dict[str, str]
    """System or library -> version."""
    flags: dict[str, list[str]]
    """System -> how it was started."""
    scale: str
    measures: list[Measure]
    gaps: list[Gap]


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


def load(path: Path) -> Results:
    """Raises OSError, or msgspec.ValidationError where that is something else."""
    return msgspec.json.decode(path.read_bytes(), type=Results)
