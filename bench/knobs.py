"""What a setting changes: the same work under two values of it, in turns, on fresh mounts; the ratio is what counts.

    python -m bench.knobs                  all of them, some four minutes
    python -m bench.knobs --only threads   settings whose name has this in it

The under-store is a local directory. Where reads are measured, the page cache is dropped before, so that the kernel
asks: what the cache holds is in memory (tmpfs) and stays, but for settings that are about waiting for a disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import Up, run_readers, running_up, terminate_as_interrupt

ROUNDS = 3
MIB = 1 << 20
LARGE_MIB = 256
SMALL_FILES = 500
SMALL_BYTES = 110_000


def sh(script: str, *arguments: str | Path) -> None:
    subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], check=True)


def drop_page_cache() -> None:
    sh("sync; echo 3 > /proc/sys/vm/drop_caches")


def spent(jobs: Sequence[dict[str, object]]) -> float:
    return max(float(result["seconds"]) for result in run_readers(jobs))


def fill(up: Up) -> None:
    """All of it cached."""
    sh('find "$1" -type f -exec cat {} + > /dev/null', up.mountpoint)


def sequential(up: Up) -> float:
    """MB/s of one reader of a large file."""
    fill(up)
    drop_page_cache()
    return LARGE_MIB * MIB / 1e6 / spent([{"job": "read_blindly", "files": [str(up.mountpoint / "large")]}])


def random_reads(up: Up) -> float:
    """4 KiB reads per second of eight readers."""
    fill(up)
    drop_page_cache()
    return 8 * 500 / spent([_at_random(up, 500, seed) for seed in range(8)])


def cold_random_reads(up: Up) -> float:
    """The first 4 KiB reads of a file of which nothing is here."""
    return 20 / spent([_at_random(up, 20, 1)])


def _at_random(up: Up, reads: int, seed: int) -> dict[str, object]:
    return {"job": "read_at_random", "file": str(up.mountpoint / "large"), "reads": reads, "seed": seed}


def small(up: Up, times: int = 1) -> float:
    files = [str(up.mountpoint / "small" / f"{number:04}") for number in range(SMALL_FILES)]
    return times * SMALL_FILES / spent([{"job": "read_blindly", "files": files * times}])


def cold_small(up: Up) -> float:
    """Small files per second, first epoch."""
    return small(up)


def warm_small(up: Up) -> float:
    """Small files per second, later epochs."""
    fill(up)
    return small(up, 4)


def looks(up: Up) -> float:
    """stat(2) of known names per second."""
    names = [str(up.mountpoint / "small" / f"{number:04}") for number in range(SMALL_FILES)]
    sh('ls -l "$1" > /dev/null', up.mountpoint / "small")
    return 4 * SMALL_FILES / spent([{"job": "look", "files": names * 4}])


@dataclass(frozen=True)
class Experiment:
    setting: str
    values: tuple[str, str]
    work: Callable[[Up], float]
    flags: tuple[str, ...] = ()
    on_disk: bool = False


CACHED = ("--open-mode", "cached")
EXPERIMENTS = (
    Experiment("--read-ahead", ("1M", "128K"), sequential, CACHED),
    Experiment("--read-ahead", ("4M", "1M"), sequential, CACHED),
    Experiment("--max-read", ("1M", "128K"), sequential, CACHED),
    Experiment("--max-background", ("64", "1"), sequential, CACHED),
    Experiment("--threads", ("32", "1"), random_reads, CACHED, on_disk=True),
    Experiment("--open-mode", ("auto", "cached"), sequential),
    Experiment("--open-mode", ("auto", "cached"), warm_small),
    Experiment("--open-mode", ("no-open", "auto"), warm_small),
    Experiment("--open-wait", ("8M", "0"), cold_small),
    Experiment("--page-size", ("1M", "8M"), cold_random_reads),
    Experiment("--promote", ("if-space", "never"), warm_small),
    Experiment("--attr-timeout", ("60s", "0"), looks),
)


def measure(experiment: Experiment, directory: Path) -> dict[str, list[float]]:
    """Value -> what was measured, one number per round."""
    measured: dict[str, list[float]] = {value: [] for value in experiment.values}
    for round_ in range(ROUNDS):
        for value in experiment.values if round_ % 2 else reversed(experiment.values):
            place = directory / "place"
            place.mkdir()
            tiers = place if experiment.on_disk else Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir="/dev/shm"))
            try:
                flags = [*experiment.flags, experiment.setting, value]
                tier = f"ssd:{tiers / 'tier'}:4G"
                with running_up((directory / "data").as_uri(), place, tier, {"settle": "0"}, flags) as up:
                    measured[value].append(experiment.work(up))
            finally:
                shutil.rmtree(tiers, ignore_errors=True)
                shutil.rmtree(place, ignore_errors=True)
    return measured


def make_data(directory: Path) -> None:
    (directory / "data" / "small").mkdir(parents=True)
    with (directory / "data" / "large").open("wb") as file:
        for _ in range(LARGE_MIB):
            file.write(os.urandom(MIB))
    for number in range(SMALL_FILES):
        (directory / "data" / "small" / f"{number:04}").write_bytes(os.urandom(SMALL_BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("dropping the page cache needs root")
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-"))
    table = Table(title=f"{ROUNDS} rounds, medians")
    for column in ("setting", "of what", "one", "other", "ratio", "lowest", "highest"):
        table.add_column(column)
    try:
        make_data(directory)
        for experiment in EXPERIMENTS:
            if arguments.only not in experiment.setting:
                continue
            begin = time.monotonic()
            measured = measure(experiment, directory)
            first, second = (measured[value] for value in experiment.values)
            ratios = [one / other for one, other in zip(first, second, strict=True)]
            named = [
                f"{value}: {statistics.median(found):,.0f}"
                for value, found in zip(experiment.values, (first, second), strict=True)
            ]
            numbers = (f"{each:.2f}" for each in (statistics.median(ratios), min(ratios), max(ratios)))
            table.add_row(experiment.setting, (experiment.work.__doc__ or "").strip(" ."), *named, *numbers)
            print(f"{experiment.setting}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
