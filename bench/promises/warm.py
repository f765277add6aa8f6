"""What is in the cache, against the same bytes natively, on the same medium."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import process_of
from bench.promises.place import LIMIT_S, Place, Profile, measure, wait_for
from bench.results import Measure
from cachefs.fuse import find_mount, unmount


def warm_reads(place: Place) -> Iterator[Measure]:
    with place.mounted("passthrough") as up:
        for kind, case, required in (
            ("sequential", "warm sequential reads, 1 MiB / native", 0.95),
            ("random", "warm random reads, 4 KiB / native", 0.90),
            ("mapped", "warm random touches of a mapping / native", 0.90),
        ):
            places = {"mount": up.mountpoint, "native": place.native}
            yield measure(case, list(place.compare(kind, places)), required)
        profile = Profile()
        with bare_mount(place.native / "small", place.directory / "bare" / "small") as pid:
            pids = {"mount": process_of(place.directory / "passthrough", "mount"), "bare": pid}
            with profile.on(pids):
                places = {"mount": up.mountpoint, "bare": place.directory / "bare"}
                ratios = list(place.compare("small", places))
        note = profile.each((place.amounts.rounds + 1) * place.amounts.small_files, "file")
        case = (
            "warm 110 KB files, open + read + close / a bare loop on /dev/fuse that opens, registers, replies, closes"
        )
        yield measure(case, ratios, 0.9, note=note)


def no_open(place: Place) -> Iterator[Measure]:
    with place.mounted("no-open", "--open-mode", "no-open") as up:
        ratios = list(place.compare("small", {"mount": up.mountpoint, "native": place.native}))
    yield measure("110 KB files in no-open mode, second epoch / native", ratios, 0.8)


@contextmanager
def bare_mount(source: Path, mountpoint: Path) -> Iterator[int]:
    """The process that serves it."""
    mountpoint.mkdir(parents=True)
    root = Path(__file__).parent.parent.parent
    process = subprocess.Popen([sys.executable, "-m", "bench.bare_fuse", source, mountpoint], cwd=root)
    try:
        wait_for(lambda: find_mount(mountpoint) is not None)
        yield process.pid
    finally:
        unmount(mountpoint, lazy=True)
        process.wait(LIMIT_S)
