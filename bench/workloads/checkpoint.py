"""Saving and loading checkpoints: a place for it among the figures, until mounts can be written to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.results import Gap, Measure
from bench.workloads.base import Alone

WHY = "mounts of cachefs are read-only: large sequential writes, fsync, rename and reading back wait until it can write"


class Checkpoint(Alone):
    name = "checkpoint"
    what = "a large sequential write, fsync, rename and read back: skipped until mounts can be written to"

    def needs_bytes(self) -> int:
        return 0

    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        yield Gap(workload=self.name, system="cachefs", kind="skipped", why=WHY)
