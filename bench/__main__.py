"""Warm reads through the mount against native reads of the same bytes on the same medium, printed as ratios.

The two are read by one process in turns of milliseconds, because machines are noisy; the ratios are what counts. The
under-store is a local directory here: once data is cached, it has no part in what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import Up, run_readers, running_up, terminate_as_interrupt
from bench.machine import medium_of

ROUNDS = 7
SMALL_FILES = 1000
KINDS = {
    "sequential": "sequential 1 MiB",
    "random": "random 4 KiB",
    "small": "110 KB files, open+read+close",
}
SEAL_TIMEOUT_S = 300


def make_data(directory: Path, size_mib: int) -> None:
    directory.mkdir()
    with (directory / "large").open("wb") as file:
        for _ in range(size_mib):
            file.write(os.urandom(1 << 20))
    (directory / "small").mkdir()
    for number in range(SMALL_FILES):
        (directory / "small" / f"{number:04}").write_bytes(os.urandom(110_000))


def cache_everything(up: Up) -> None:
    """Read all once, and wait until it is sealed."""
    subprocess.run(["sh", "-c", 'find "$1" -type f -exec cat {} + > /dev/null', "sh", up.mountpoint], check=True)
    deadline = time.monotonic() + SEAL_TIMEOUT_S
    while up.report()["workers"][0]["status"]["tiers"][0]["blocks"] < SMALL_FILES + 1:
        if time.monotonic() > deadline:
            raise SystemExit("the data was not cached in time; is there room for it?")
        time.sleep(0.2)


def measure(mount: Path, native: Path) -> dict[str, dict[str, list[float]]]:
    """Kind of read -> place -> operations per second, one number per round."""
    measured: dict[str, dict[str, list[float]]] = {kind: {"mount": [], "native": []} for kind in KINDS}
    for round_ in range(ROUNDS):
        for kind in KINDS:
            places = {"mount": str(mount), "native": str(native)}
            job = {"job": "compare", "kind": kind, "places": places, "files": SMALL_FILES, "seed": round_}
            for place, result in run_readers([job])[0].items():
                measured[kind][place].append(result["operations"] / result["seconds"])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the large file (default 1024)")
    parser.add_argument("--dir", default=None, help="where to measure; default: the directory for temporary files")
    parser.add_argument("--tier", choices=["ssd", "mem"], default="ssd", help="kind of tier; mem needs --dir on tmpfs")
    parser.add_argument("--cached", action="store_true", help="measure the cached mode instead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir=arguments.dir))
    try:
        native = directory / "native"
        make_data(native, arguments.size)
        # A block larger than a quarter of the tier would not be admitted.
        tier = f"{arguments.tier}:{directory / 'tier'}:{5 * arguments.size + 1024}M"
        flags = ["--open-mode", "cached"] if arguments.cached else []
        with running_up(f"file://{native}", directory, tier, flags=flags) as up:
            cache_everything(up)
            measured = measure(up.mountpoint, native)
        medium = medium_of(directory)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps({"medium": medium, "operations_per_s": measured}))
        return
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title=f"warm reads, {ROUNDS} rounds in turns, cache and native on {medium}, one reader")
    for column in ("", "mount, /s", "native, /s", "median ratio", "worst round", "best round"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, places in measured.items():
        mounts, natives = places["mount"], places["native"]
        ratios = [one / other for one, other in zip(mounts, natives, strict=True)]
        table.add_row(
            KINDS[kind],
            f"{statistics.median(mounts):,.0f}",
            f"{statistics.median(natives):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
