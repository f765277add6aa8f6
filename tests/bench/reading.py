"""A workload and systems for the tests of the runner: what real ones do once in a while, done on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.results import Figure, Gap, Measure
from bench.systems.base import Missing, Mounted, Source, System
from bench.systems.serving import is_running, serving
from bench.workloads.base import Alone, Data, Scale, Workload


class Reading(Workload):
    """Reads everything once; then does what its option for the system says."""

    name = "reading"
    what = "every file once"
    options: Mapping[str, str] = {"do": "SYSTEM:stop, :kill, :raise or :gap for each system, with commas"}

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        super().__init__(scale, options)
        self.hangs = False

    def data(self) -> Data:
        return Data(name="reading", files={"one": 100_000, "own": 3, "empty": 0, "large": 3_000_000})

    def content(self, path: str, size: int) -> bytes | None:
        return b"own" if path == "own" else None

    def measure(self, mounted: Mounted, round_: int) -> Iterator[Figure | Gap]:
        total = 0
        begin = time.perf_counter()
        for path, size in self.data().files.items():
            content = (mounted.path / path).read_bytes()
            if content != (mounted.source.native / path).read_bytes() or len(content) != size:
                raise ValueError(f"{path} is another file")
            total += size
        spent = time.perf_counter() - begin
        yield Figure(case="all", metric="bytes_per_s", value=total / spent, unit="B/s", better="more")
        yield Figure(case="all", metric="round", value=round_, unit="", better="")
        what = dict(each.split(":") for each in self.chosen.get("do", "").split(",") if each).get(mounted.system)
        if what == "gap":
            yield Gap(workload=self.name, system="", kind="skipped", why="asked for", case="other")
        elif what == "raise":
            raise ValueError("asked to fail")
        elif what is not None:
            _signal_all(mounted, {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[what])
            (mounted.source.native.parent / "reached").touch()
            os.stat(mounted.path / "was never there")


def _signal_all(mounted: Mounted, number: signal.Signals) -> None:
    for pid in mounted.pids:
        os.kill(pid, number)
    while number == signal.SIGKILL and any(is_running(pid) for pid in mounted.pids):
        time.sleep(0.01)


class Leaving(Alone):
    """Finds something, and fails with a process of its own still there, and a mount."""

    name = "leaving"
    what = "leaves things behind"

    def needs_bytes(self) -> int:
        return 1000

    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        yield Measure(workload=self.name, case="one", system="", metric="n", unit="", better="more", values=[1.0])
        yield Gap(workload=self.name, system="", kind="skipped", why="not today", case="two")
        (directory / "files").mkdir()
        (directory / "files" / "file").write_bytes(b"content")
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        command = [sys.executable, "-m", "bench.bare_fuse", str(directory / "files"), str(mountpoint)]
        # A session of its own: it is in no process group that anybody knows of.
        subprocess.Popen(command, start_new_session=True)
        while not (mountpoint / "file").exists():
            time.sleep(0.01)
        raise ValueError(f"left {mountpoint}")


class Bare(System):
    """A real FUSE mount of the native files, by the least there is of a server."""

    title = "bare"

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self) -> str:
        return "1"

    def flags(self) -> list[str]:
        return ["--bare"]

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        mountpoint = place / "mnt"
        # The measuring process runs it, too, and is at home in the tree; this one's directory is the mount's.
        command = [sys.executable, "-m", "bench.bare_fuse", str(source.native), str(mountpoint)]
        environment = {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
        with serving(command, mountpoint, place, environment) as pids:
            yield Mounted(system=self.name, path=mountpoint, source=source, place=place, facts={}, pids=pids)


class Absent(Bare):
    def check(self) -> str:
        raise Missing("buy it")


class Broken(Bare):
    """Its program ends instead of mounting."""

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        with serving(["sh", "-c", "echo no such mount; exit 3"], place / "mnt", place):
            raise AssertionError("not reached")
        yield
