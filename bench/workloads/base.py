"""What a workload has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from bench.results import Figure, Gap, Measure
from bench.systems.base import Mounted


class Scale(StrEnum):
    SMOKE = "smoke"
    """A few files, seconds: for tests."""
    STANDARD = "standard"
    """`make bench`: all workloads in under ten minutes on two processors."""
    FULL = "full"
    """`make bench-full`: the whole matrix."""


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """Files of random bytes that `seed` and the path determine; or made by `Workload.content`."""

    name: str
    """Data sets of one name are made once in a run, and shared."""
    files: Mapping[str, int]
    """Path -> bytes."""

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())


class Work(ABC):
    """What both kinds have."""

    name: str
    what: str
    """One line."""
    axes: Sequence[str] = ()
    """Labels in the order in which tables show them."""
    options: Mapping[str, str] = {}
    """Name of an option of this workload alone -> its default and what it accepts, for `--option NAME=VALUE`."""

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        self.scale = scale
        self.chosen = dict(options or {})


class Workload(Work):
    """Work on files, the same on every system: for each round, each system in alternating order is mounted afresh, with
    an empty cache, and measured.

    The runner makes the data, mounts, and calls `measure` in a process of its own that is ended, with its readers, when
    it takes too long; what was yielded before counts.
    """

    @abstractmethod
    def data(self) -> Data:
        """What has to be there."""

    def content(self, path: str, size: int) -> bytes | None:
        """Of a file where random bytes would not do."""
        return None

    def rounds(self) -> int:
        return {Scale.SMOKE: 1, Scale.STANDARD: 3, Scale.FULL: 5}[self.scale]

    def cache_bytes(self) -> int:
        """Of each system: room for everything. cachefs keeps no block that takes more than a quarter of its tier."""
        data = self.data()
        return max(2 * data.size_bytes, 5 * max(data.files.values(), default=0)) + (1 << 30)

    def limit_s(self) -> float:
        """One measurement of one system may take so long; then it hangs."""
        return {Scale.SMOKE: 60.0, Scale.STANDARD: 120.0, Scale.FULL: 600.0}[self.scale]

    @abstractmethod
    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        """Called once for each mount, which is cold. Figures of all rounds and systems have the same cases. `round_`
        counts from 0, and seeds what is random.
        """


class Alone(Work):
    """Work that brings its own processes, and knows no other systems."""

    @abstractmethod
    def needs_bytes(self) -> int:
        """Of disk, at most at a time."""

    @abstractmethod
    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        """In an empty directory that is taken away afterwards."""
