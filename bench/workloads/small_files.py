"""Many small files in directories, as a data set of images has them: shuffled epochs, and walks through the names."""

from __future__ import annotations

import math
import os
import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from bench.epoch import Epoch, ReadingFailed, look_epoch, read_epoch
from bench.pagecache import CannotDrop, drop_page_cache
from bench.results import Better, Figure, Gap
from bench.server import traffic
from bench.systems.base import Mounted
from bench.systems.native import forget_pages
from bench.workloads.base import Data, Scale, Workload
from bench.workloads.settling import settle

MEAN_BYTES = 112_000
SIGMA = 0.6
"""Of the sizes' logarithms."""
SMALLEST, LARGEST = 2_000, 2_000_000
PER_DIRECTORY = 50
SUFFIX = ".jpg"
LOOKING = 4
"""Processes of a storm of stat(2)."""


class Shape(msgspec.Struct, frozen=True):
    files: int
    cold: Sequence[int]
    """Readers; each of them has an equal share of the directories, as a file is cold only once."""
    cached: Sequence[int]
    warm: Sequence[int]


SHAPES = {
    Scale.SMOKE: Shape(20, (4,), (2,), (1, 4)),
    Scale.STANDARD: Shape(1_000, (8,), (4,), (1, 4, 8)),
    Scale.FULL: Shape(10_000, (1, 4, 8), (1, 4, 8), (1, 4, 8)),
}


class SmallFiles(Workload):
    name = "small_files"
    what = "files of 112 KB in directories: shuffled epochs by 1, 4 and 8 processes, find, ls -lR, storms of stat"
    axes = ("work", "readers", "state")
    options: Mapping[str, str] = {"files": "1000 in the standard scale; any number from 20 on"}

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for an option that makes no sense."""
        super().__init__(scale, options)
        self.shape = SHAPES[scale]
        files = self.chosen.get("files", str(self.shape.files))
        if not files.isdecimal() or int(files) < 20:
            raise ValueError(f"small_files.files={files}: it must be a number from 20 on")
        self.files = files_of(int(files), 2 if scale is Scale.SMOKE else PER_DIRECTORY)

    def data(self) -> Data:
        return Data(name="small_files", files=self.files)

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        try:
            yield from self._measure(mounted, round_)
        except _Failed as error:
            yield error.gap

    def _measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        yield from self._walk(mounted, "find", "first")
        shares = len(self.shape.cold)
        epochs: list[tuple[int, str, int | None]] = [
            (readers, "cold", share) for share, readers in enumerate(self.shape.cold)
        ]
        epochs += [(readers, "cached", None) for readers in self.shape.cached]
        epochs += [(readers, "warm", None) for readers in self.shape.warm]
        checksums = self._checksums(mounted.source.native)
        before = self._sent(mounted)
        for number, (readers, state, share) in enumerate(epochs, 1):
            case = f"epoch, {_processes(readers)}, {state}"
            if state == "cached":
                try:
                    drop_page_cache()
                except CannotDrop as error:
                    yield self._gap(mounted, "skipped", str(error), case)
                    continue
            files = list(self.files) if share is None else share_of(self.files, share, shares)
            random.Random(f"{round_} {number}").shuffle(files)
            # In warm epochs nothing but reading is done.
            compared = [(mounted.path / each, "" if state == "warm" else checksums[each]) for each in files]
            epoch = self._epoch(mounted, case, lambda: read_epoch(compared, readers))  # noqa: B023
            if epoch.wrong or epoch.bytes != sum(self.files[each] for each in files):
                named = epoch.wrong[0] if epoch.wrong else f"{epoch.bytes} bytes were read"
                raise _Failed(self._gap(mounted, "failed", f"WRONG BYTES: {named}", case))
            if state == "cold":
                settle(mounted)
            after = self._sent(mounted, (before or 0) + (epoch.bytes if state == "cold" else 0))
            labels = {"work": "epoch", "readers": str(readers), "state": state, "epoch": str(number)}
            yield self._figure(case, labels, "files_per_s", epoch.files_per_s, "1/s", "more")
            yield self._figure(case, labels, "bytes_per_s", epoch.bytes_per_s, "B/s", "more")
            yield self._figure(case, labels, "p50_s", epoch.percentile(50), "s", "less")
            yield self._figure(case, labels, "p99_s", epoch.percentile(99), "s", "less")
            if after is not None and before is not None:
                yield self._figure(case, labels, "under_store_bytes", after - before, "B", "less")
            before = after
        yield from self._walk(mounted, "find", "again")
        yield from self._walk(mounted, "ls -lR", "again")
        yield from self._storm(mounted, round_)

    def _walk(self, mounted: Mounted, work: str, state: str) -> Iterator[Figure]:
        """The whole tree, by one of the usual programs."""
        # Some systems have files of their own at the top.
        path = str(mounted.path)
        command = ["find", path, "-type", "f", "-name", f"*{SUFFIX}"] if work == "find" else ["ls", "-lR", path]
        case = f"{work}, {state}"
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        seconds = time.perf_counter() - begin
        found = sum(line.endswith(SUFFIX) for line in done.stdout.splitlines())
        if done.returncode or found != len(self.files):
            why = f"{work} found {found} of {len(self.files)} files {done.stderr[-200:]}".strip()
            raise _Failed(self._gap(mounted, "failed", why, case))
        yield self._figure(case, {"work": work, "state": state}, "files_per_s", found / seconds, "1/s", "more")

    def _storm(self, mounted: Mounted, round_: int) -> Iterator[Figure]:
        files = [mounted.path / each for each in self.files]
        random.Random(f"storm {round_}").shuffle(files)
        case = f"stat of every file, {_processes(LOOKING)}, again"
        epoch = self._epoch(mounted, case, lambda: look_epoch(files, LOOKING))
        labels = {"work": "stat", "readers": str(LOOKING), "state": "again"}
        yield self._figure(case, labels, "files_per_s", epoch.files_per_s, "1/s", "more")
        yield self._figure(case, labels, "p50_s", epoch.percentile(50), "s", "less")
        yield self._figure(case, labels, "p99_s", epoch.percentile(99), "s", "less")

    def _epoch(self, mounted: Mounted, case: str, run: Any) -> Epoch:
        try:
            epoch: Epoch = run()
        except ReadingFailed as error:
            raise _Failed(self._gap(mounted, "failed", str(error), case)) from None
        return epoch

    def _checksums(self, native: Path) -> dict[str, str]:
        """Of what was made, which is what has to be read. The native files are not in the page cache afterwards."""
        checksums = {each: xxhash.xxh3_64_hexdigest((native / each).read_bytes()) for each in self.files}
        forget_pages(native)
        return checksums

    def _sent(self, mounted: Mounted, at_least: int = 0) -> int | None:
        """Bytes that the under-store has sent so far, see `traffic`; None for plain files, which have none."""
        return None if mounted.system == "native" else traffic(mounted.source.traffic_url, at_least).sent_bytes

    def _figure(
        self, case: str, labels: dict[str, str], metric: str, value: float, unit: str, better: Better
    ) -> Figure:
        return Figure(case=case, metric=metric, value=value, unit=unit, better=better, labels=labels)

    def _gap(self, mounted: Mounted, kind: Any, why: str, case: str) -> Gap:
        return Gap(workload=self.name, system=mounted.system, kind=kind, why=why, case=case)


class _Failed(Exception):
    """Nothing can be measured from here on."""

    def __init__(self, gap: Gap) -> None:
        super().__init__(gap.why)
        self.gap = gap


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def files_of(count: int, per_directory: int) -> dict[str, int]:
    """Path -> bytes; the same whenever it is asked for."""
    random_ = random.Random(f"small files {count}")
    mu = math.log(MEAN_BYTES) - SIGMA**2 / 2
    return {
        f"{number // per_directory:04}/{number:07}{SUFFIX}": min(
            max(int(random_.lognormvariate(mu, SIGMA)), SMALLEST), LARGEST
        )
        for number in range(count)
    }


def share_of(files: Mapping[str, int], share: int, shares: int) -> list[str]:
    """Of so many shares, whole directories."""
    directories = sorted({path.partition("/")[0] for path in files})
    mine = set(directories[share::shares])
    return [path for path in files if path.partition("/")[0] in mine]
