"""`cachefs up` and processes of it that hang without being dead: started again, if it is really they who hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cachefs.fuse import probe
from cachefs.model import CachefsError
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, child_of, mountpoint_below, running
from tests.cli.test_http import metrics

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

FILES = {f"{number}": bytes([number]) * (1000 + number) for number in range(4)}
LIMIT_S = 3.0
HUNG = ["--restart-hung-after", f"{LIMIT_S:g}s"]


@contextmanager
def up(
    directory: Path, url: str, *flags: str | Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Path, Running]]:
    with mountpoint_below(directory) as mountpoint:
        own = ["--state-dir", directory / "state", "--tier", f"ssd:{directory / 'tier'}:100M"]
        with running("up", url, mountpoint, *own, *flags, environment=environment) as process:
            yield mountpoint, process


@pytest.fixture
def data(tmp_path: Path) -> str:
    root = tmp_path / "data"
    root.mkdir()
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    return root.as_uri()


def until(condition: Callable[[], Any], limit_s: float = 40.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def restarts(pid: int) -> dict[str, float]:
    """As the process that runs now shows them."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    address = words[len(words) - 1 - words[::-1].index("--http") + 1]
    shown = metrics(SimpleNamespace(facts={"http": address}))  # type: ignore[arg-type]
    return {reason: shown[f"cachefs_restarts_total reason={reason}"] for reason in ("ended", "hung")}


def read(path: Path) -> bytes:
    """By a process of its own, with a limit."""
    return subprocess.run(["cat", path], capture_output=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("role", ["master", "worker"])
def test_one_that_hangs_is_killed_and_started_again(tmp_path: Path, data: str, role: str) -> None:
    http = [f"--{role}-http", "127.0.0.1:0", "--ufs-option", "settle=0"]
    with up(tmp_path, data, *HUNG, *http) as (mountpoint, process):
        assert read(mountpoint / "0") == FILES["0"]
        before = child_of(process, role)
        began = time.monotonic()
        os.kill(before, signal.SIGSTOP)
        # Nobody gets an error: whoever needs it waits.
        assert read(mountpoint / "1") == FILES["1"]

        def is_another() -> int:
            try:
                pid = child_of(process, role)
            except (CachefsError, OSError):
                return 0  # it is just dying, or starting
            return pid if pid != before else 0

        until(is_another)
        assert time.monotonic() - began > LIMIT_S - 0.1
        assert not Path(f"/proc/{before}").exists()
        assert read(mountpoint / "2") == FILES["2"]
        until(lambda: _shown(is_another()))
        assert restarts(is_another()) == {"ended": 0, "hung": 1}
        # Told apart from one that dies.
        after = is_another()
        os.kill(after, signal.SIGKILL)
        assert read(mountpoint / "3") == FILES["3"]
        until(lambda: is_another() not in (0, after) and _shown(is_another()))
        assert restarts(is_another()) == {"ended": 1, "hung": 1}
        assert process.process.poll() is None


def _shown(pid: int) -> bool:
    try:
        return bool(pid and restarts(pid))
    except (OSError, ValueError, KeyError):
        return False  # it is not that far


def test_nobody_hangs_because_everybody_was_stopped(tmp_path: Path, data: str) -> None:
    """As a frozen cgroup, or a machine that was suspended."""
    with up(tmp_path, data, *HUNG) as (mountpoint, process):
        children = [child_of(process, role) for role in ("master", "worker")]
        for pid in (process.process.pid, *children):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * LIMIT_S)
        # The one who looks is the first to go on.
        os.kill(process.process.pid, signal.SIGCONT)
        time.sleep(LIMIT_S / 6)
        for pid in children:
            os.kill(pid, signal.SIGCONT)
        time.sleep(LIMIT_S)
        assert [child_of(process, role) for role in ("master", "worker")] == children
        assert read(mountpoint / "0") == FILES["0"]


def test_nobody_hangs_because_the_store_is_slow(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put(FILES)
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = [f"--ufs-option=endpoint_url={store.endpoint}"]
        with up(tmp_path, s3_bucket.url, *HUNG, *options, environment=s3_bucket.environment) as (mountpoint, process):
            children = [child_of(process, role) for role in ("master", "worker")]
            store.delay_s = 2 * LIMIT_S
            began = time.monotonic()
            assert read(mountpoint / "0") == FILES["0"]
            assert time.monotonic() - began > 2 * LIMIT_S
            store.delay_s = 0.0
            assert [child_of(process, role) for role in ("master", "worker")] == children


def test_limits_that_make_no_sense_are_told(tmp_path: Path, data: str) -> None:
    (tmp_path / "mnt").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "cachefs", "up", data, str(tmp_path / "mnt"), "--restart-hung-after", "1s"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    assert "--restart-hung-after" in done.stderr and "2s to 1h, or 0 for never" in done.stderr
