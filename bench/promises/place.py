"""Where promises are measured, and how much is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.harness import Up, run_readers, running_up
from bench.processes import all_processor_seconds, busiest_of, process_of
from bench.results import Better, Measure
from bench.workloads.base import Scale
from cachefs.testing.s3server import S3Server

WORKLOAD = "promises"
BUCKET = "promises"
MIB = 1 << 20
SMALL_BYTES = 110_000
LIMIT_S = 120.0


class Amounts(msgspec.Struct, frozen=True):
    rounds: int
    large_mib: int
    """Of the file that is read warm."""
    small_files: int
    objects: int
    object_mib: int
    """Of those that are read cold."""
    listed_files: int
    listings: int
    """Rounds of that: each is a mount of its own, and a first listing."""
    in_order_files: int
    """Read in the order of their directory; each waits for a store that is far away."""


AMOUNTS = {
    Scale.SMOKE: Amounts(1, 8, 60, 1, 8, 300, 1, 30),
    Scale.STANDARD: Amounts(3, 256, 1000, 2, 128, 100_000, 1, 150),
    Scale.FULL: Amounts(5, 512, 1000, 4, 128, 100_000, 5, 500),
}


class Place:
    """A directory with data, its cache, and the mounts of this run."""

    def __init__(self, directory: Path, amounts: Amounts) -> None:
        self.directory = directory
        self.amounts = amounts
        self.native = directory / "native"

    def make_local_data(self) -> None:
        """One file `large`, and small ones below `small`."""
        if self.native.exists():
            return
        (self.native / "small").mkdir(parents=True)
        with (self.native / "large").open("wb") as file:
            for _ in range(self.amounts.large_mib):
                file.write(os.urandom(MIB))
        for number in range(self.amounts.small_files):
            (self.native / "small" / f"{number:04}").write_bytes(os.urandom(SMALL_BYTES))

    @contextmanager
    def mounted(self, name: str, *flags: str) -> Iterator[Up]:
        """`cachefs up` of the local data, all of it cached."""
        self.make_local_data()
        place = self.directory / name
        place.mkdir()
        tier = f"ssd:{place / 'tier'}:{5 * self.amounts.large_mib + 1024}M"
        options = {"settle": "0"}
        with running_up(f"file://{self.native}", place, tier, options, [*flags, "--sync-interval", "-1"]) as up:
            sh('find "$1" -type f -exec cat {} + > /dev/null', up.mountpoint)
            wait_for(lambda: blocks_of(up) >= self.amounts.small_files + 1)
            yield up
        shutil.rmtree(place)

    def compare(self, kind: str, places: dict[str, Path], rounds: int = 0) -> Iterator[float]:
        """The first place's operations per second over the second's, once per round; the first round warms both.

        In turns of milliseconds by one process, so that whatever else the machine does meets both alike.
        """
        first, second = places
        for round_ in range((rounds or self.amounts.rounds) + 1):
            paths = {name: str(path) for name, path in places.items()}
            files = self.amounts.small_files
            job = {"job": "compare", "kind": kind, "places": paths, "files": files, "seed": round_}
            (result,) = run_readers([job])
            speeds = {name: each["operations"] / each["seconds"] for name, each in result.items()}
            if round_:
                yield speeds[first] / speeds[second]


def blocks_of(up: Up) -> int:
    """That are cached whole."""
    return int(up.report()["workers"][0]["status"]["tiers"][0]["blocks"])


def measure(
    case: str,
    values: list[float],
    required: float | None,
    *,
    metric: str = "ratio",
    unit: str = "",
    better: Better = "more",
    note: str = "",
) -> Measure:
    return Measure(
        workload=WORKLOAD,
        case=case,
        system="",
        metric=metric,
        unit=unit,
        better=better,
        values=values,
        required=required,
        note=note,
    )


def sh(script: str, *arguments: str | Path) -> None:
    subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], check=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the data was not cached in time; is there room for it?")
        time.sleep(0.1)


class Profile:
    """The processor time that processes take while the blocks of `on` run."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextmanager
    def on(self, pids: dict[str, int]) -> Iterator[None]:
        before = {name: all_processor_seconds([pid]) for name, pid in pids.items()}
        yield
        for name, pid in pids.items():
            self._spent[name] = self._spent.get(name, 0.0) + all_processor_seconds([pid]) - before[name]

    def each(self, count: float, what: str) -> str:
        parts = (f"{name} {seconds / count * 1000:.2f}" for name, seconds in self._spent.items())
        return f"processor time in ms a {what}: {', '.join(parts)}"


def all_of(server: S3Server, directory: Path) -> dict[str, int]:
    """The S3 server, and the processes of the `cachefs up` below this directory."""
    ours = {role: process_of(directory, role) for role in ("worker", "mount", "master")}
    return {"server": busiest_of(server.pid), **ours}
