"""A directory of very many names, in a bucket that makes them up: peers would need a real object for each of them.

What the master is asked is counted by the master itself, at its metrics.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.epoch import Epoch, ReadingFailed, look_epoch, read_epoch
from bench.harness import Up, running_up
from bench.results import Better, Gap, Measure
from bench.workloads.base import Alone, Scale
from cachefs.fuse import probe
from cachefs.metrics.monitor import KEPT_S
from cachefs.model import CachefsError
from cachefs.testing.huge_s3 import DIRECTORY, name_of, running_huge_s3
from cachefs.testing.ports import hold_port, port_of

NAMES = {Scale.SMOKE: 2_000, Scale.STANDARD: 100_000, Scale.FULL: 1_000_000}
READ = {Scale.SMOKE: 40, Scale.STANDARD: 400, Scale.FULL: 5_000}
"""Files of an epoch: the store answers some hundred a second."""
PROCESSES = 4
_REQUESTS = re.compile(r'^cachefs_request_seconds_count\{operation="(\w+)"\} (\S+)$', re.MULTILINE)
_EVERY_SECOND = {"Ping", "ReportBlocks"}
"""Asked by workers and mounts whatever is done meanwhile."""


class Metadata(Alone):
    name = "metadata"
    what = "a directory of a million names (a hundred thousand, two thousand): listed, looked up, walked, read"
    axes = ("work", "state")
    options: Mapping[str, str] = {"names": "1000000 in the full scale; any number from 1000 on"}

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for an option that makes no sense."""
        super().__init__(scale, options)
        names = self.chosen.get("names", str(NAMES[scale]))
        if not names.isdecimal() or int(names) < 1_000:
            raise ValueError(f"metadata.names={names}: it must be a number from 1000 on")
        self.count = int(names)

    def needs_bytes(self) -> int:
        """The master's database, and a block of the file system for each file that is read."""
        return 2_000 * self.count + (256 << 20)

    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        if (why := probe().why_no_mount) is not None:
            yield Gap(workload=self.name, system="", kind="skipped", why=why)
            return
        try:
            with (
                hold_port() as held,
                running_huge_s3(self.count) as store,
                running_up(
                    *(store.url, directory, f"ssd:{directory / 'tier'}:1G", store.options),
                    ["--master-http", f"127.0.0.1:{port_of(held)}"],
                ) as up,
            ):
                yield from self._measures(up, f"http://127.0.0.1:{port_of(held)}/metrics")
        except (CachefsError, ReadingFailed, ValueError, OSError) as error:
            yield Gap(workload=self.name, system="", kind="failed", why=str(error))

    def _measures(self, up: Up, url: str) -> Iterator[Measure]:
        directory = up.mountpoint / DIRECTORY
        names = [directory / name_of(number) for number in range(self.count)]
        random.Random(0).shuffle(names)
        some = names[: READ[self.scale]]
        asked = requests(url)

        def measures(work: str, state: str, rate: float, epoch: Epoch | None = None) -> Iterator[Measure]:
            nonlocal asked
            now = requests(url)
            figures: list[tuple[str, float, str, Better]] = [("files_per_s", rate, "1/s", "more")]
            if epoch is not None:
                figures += [
                    ("p50_s", epoch.percentile(50), "s", "less"),
                    ("p99_s", epoch.percentile(99), "s", "less"),
                ]
            figures.append(("master_requests", now - asked, "", "less"))
            asked = now
            for metric, value, unit, better in figures:
                yield Measure(
                    workload=self.name,
                    case=f"{work}, {state}",
                    system="",
                    metric=metric,
                    unit=unit,
                    better=better,
                    values=[value],
                    labels={"work": work, "state": state},
                )

        few, all_ = f"of {len(some):,} names", f"of {self.count:,} names"
        epoch = look_epoch(some, PROCESSES)
        yield from measures(f"stat {few}", "before their directory is listed", epoch.files_per_s, epoch)
        for state in ("first", "again"):
            yield from measures(f"ls -U {all_}", state, self._walk("ls", "-U", directory))
        yield from measures(f"ls -l {all_}", "listed", self._walk("ls", "-l", directory))
        yield from measures(f"find {all_}", "listed", self._walk("find", up.mountpoint, "-type", "f"))
        epoch = look_epoch(names, PROCESSES)
        yield from measures(f"stat {all_}", "listed", epoch.files_per_s, epoch)
        for state in ("cold", "warm"):
            epoch = read_epoch([(each, "") for each in some], PROCESSES)
            yield from measures(f"epoch {few.replace('names', 'files')}", state, epoch.files_per_s, epoch)

    def _walk(self, *command: str | Path) -> float:
        """Files a second. Raises ValueError when not all were found."""
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C"})
        seconds = time.perf_counter() - begin
        # `ls -l` begins with a line of its own.
        found = done.stdout.count(b"\n") - ("-l" in command)
        if done.returncode or found != self.count:
            raise ValueError(f"{command[0]} found {found} of {self.count} names {done.stderr[-200:].decode()}".strip())
        return found / seconds


def requests(url: str) -> int:
    """That the master has answered so far, without those that come by the clock."""
    time.sleep(KEPT_S)  # otherwise it may tell what it has told last
    with urllib.request.urlopen(url, timeout=60) as answer:
        found = _REQUESTS.findall(answer.read().decode())
    return int(sum(float(count) for operation, count in found if operation not in _EVERY_SECOND))
