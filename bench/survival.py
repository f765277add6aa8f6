"""What readers notice when processes of ours are killed under them: errors, and the longest wait of each kind of read.

Real processes on one machine, two readers that compare every byte: of files they hold open, have mapped, hold open in
cached mode, open anew, and open for the first time; and they list a directory. For each row the same is done for as
long without killing anything, since machines stop by themselves at times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import terminate_as_interrupt
from cachefs.testing.processes import Running, mountpoint_below, running
from cachefs.testing.survivors import KINDS, Report, kill, make_source, reading, wait_for

SETTLE_S = 2.0
"""Between two kills: a new server has long answered by then."""
COLD = 4000


class Cluster:
    """A master, a worker and a mount, any of which can be killed and is started again."""

    def __init__(self, directory: Path) -> None:
        self.source = directory / "source"
        self._directory = directory
        self._stack = ExitStack()
        self._master: Running | None = None
        self._worker: Running | None = None
        self._listen = "127.0.0.1:0"
        self.mountpoint = directory / "mnt"

    def start(self) -> None:
        self.start_master()
        self.start_worker()
        self._stack.enter_context(mountpoint_below(self._directory))
        where = ["--master", self._listen, "--insecure", "--worker-socket", self._socket]
        self._stack.enter_context(running("mount", self.mountpoint, *where, "--open-wait", "512K", stderr=_quiet()))

    @property
    def _socket(self) -> Path:
        return self._directory / "socket"

    def start_master(self) -> None:
        """Where it was, if it ran before."""
        store = ["--mount", f"/={self.source.as_uri()}", "--ufs-option", "settle=0", "--page-size", "64K"]
        place = ["--data-dir", str(self._directory / "master"), "--listen", self._listen, "--insecure"]
        self._master = self._stack.enter_context(running("master", *place, *store, stderr=_quiet()))
        self._listen = self._master.facts["listen"]

    def start_worker(self) -> None:
        tier = f"ssd:{self._directory / 'tier'}:1G"
        place = ["--master", self._listen, "--listen", "127.0.0.1:0", "--socket", self._socket, "--insecure"]
        self._worker = self._stack.enter_context(running("worker", *place, "--tier", tier, stderr=_quiet()))

    def kill(self, role: str) -> None:
        """And wait until it is there again."""
        if role == "master":
            assert self._master is not None
            self._master.end(signal.SIGKILL)
            self.start_master()
        elif role == "worker":
            assert self._worker is not None
            self._worker.end(signal.SIGKILL)
            self.start_worker()
        else:
            wait_for(role, self.mountpoint, other_than=kill(role, self.mountpoint))

    def upgrade(self) -> None:
        command = [sys.executable, "-m", "cachefs", "mount", "--upgrade", str(self.mountpoint)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stderr)

    def close(self) -> None:
        self._stack.close()


def _quiet() -> int | None:
    return None if os.environ.get("CACHEFS_BENCH_LOGS") else subprocess.DEVNULL


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    directory.mkdir()
    it = Cluster(directory)
    make_source(it.source, COLD)
    try:
        it.start()
        yield it
    finally:
        it.close()


def measure(directory: Path, times: int, act: Callable[[Cluster], None] | None, seconds: float | None) -> Report:
    """`act` so many times, or `seconds` of nothing. The report says how long it took."""
    with cluster(directory) as it, reading(it.mountpoint, it.source) as readers:
        time.sleep(SETTLE_S)
        if act is None:
            time.sleep(seconds or 0.0)
        else:
            for _ in range(times):
                act(it)
                time.sleep(SETTLE_S)
        return readers.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of the mount's server (default 20); a fifth of the rest")
    parser.add_argument("--dir", default=None, help="where to measure; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("passthrough needs root")
    terminate_as_interrupt()
    fewer = max(1, arguments.kills // 5)
    rows: dict[str, tuple[int, Callable[[Cluster], None]]] = {
        "kill -9 of the mount's server": (arguments.kills, lambda it: it.kill("mount-server")),
        "kill -9 of the keeper": (fewer, lambda it: it.kill("mount-keeper")),
        "kill -9 of the worker": (fewer, lambda it: it.kill("worker")),
        "kill -9 of the master": (fewer, lambda it: it.kill("master")),
        "upgrade of the mount's server": (fewer, lambda it: it.upgrade()),
    }
    directory = Path(tempfile.mkdtemp(prefix="cachefs-survival-", dir=arguments.dir))
    found: dict[str, dict[str, Any]] = {}
    try:
        began = time.monotonic()
        for name, (times, act) in rows.items():
            report = measure(directory / str(len(found)), times, act, None)
            found[f"{name}, {times} times"] = report._asdict()
            if len(found) == 1:
                quiet = measure(directory / "quiet", 0, None, time.monotonic() - began)
                found["nothing, for as long"] = quiet._asdict()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    if any(each["errors"] for each in found.values()):
        sys.exit(1)


def _show(found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Longest wait of a read, ms")
    for title in ("what", "rounds of reads", "errors", *KINDS):
        table.add_column(title, justify="left" if title == "what" else "right")
    for name, each in found.items():
        gaps = [f"{each['gaps'][kind] * 1000:.0f}" if kind in each["gaps"] else "" for kind in KINDS]
        table.add_row(name, str(each["rounds"]), str(len(each["errors"])), *gaps)
    Console(width=140).print(table)
    for name, each in found.items():
        for error in each["errors"][:5]:
            print(f"{name}: {error}")


if __name__ == "__main__":
    main()
