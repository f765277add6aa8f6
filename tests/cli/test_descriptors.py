"""Few descriptors: too few are refused at the start, and with just enough everything is read, more slowly."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cachefs.cli.lifecycle import LEAST_OPEN_FILES
from cachefs.fuse import SessionOptions, probe
from cachefs.model import CachefsError, MiB
from cachefs.testing.pressure import SMALL_BYTES, make_files, memory_of
from cachefs.testing.processes import child_of, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LOOPBACK = ["--listen", "127.0.0.1:0", "--insecure"]
LEAST_MOUNT = LEAST_OPEN_FILES + 2 * SessionOptions.max_tasks
LEAST_WORKER = 496
FILES = 2500
"""Held open at once: three times what the mount may open."""


def limited(count: int) -> list[str]:
    return ["prlimit", f"--nofile={count}:{count}"]


def test_too_few_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    master = ["--data-dir", tmp_path / "master", "--mount", f"/={(tmp_path / 'data').as_uri()}", *LOOPBACK]
    with (
        pytest.raises(CachefsError, match=f"open files .hard limit.: {LEAST_OPEN_FILES - 1} .*at least 256"),
        running("master", *master, prefix=limited(LEAST_OPEN_FILES - 1)),
    ):
        pass
    with running("master", *master) as process, mountpoint_below(tmp_path) as mountpoint:
        where = ["--master", process.facts["listen"]]
        tier = ["--socket", tmp_path / "socket", "--tier", f"ssd:{tmp_path / 'tier'}:100M", *LOOPBACK]
        with (
            pytest.raises(CachefsError, match=f"{LEAST_WORKER - 1} .*at least {LEAST_WORKER} for a worker"),
            running("worker", *where, *tier, prefix=limited(LEAST_WORKER - 1)),
        ):
            pass
        mount = [mountpoint, *where, "--insecure", "--worker-socket", tmp_path / "socket"]
        with (
            pytest.raises(CachefsError, match=f"at least {LEAST_MOUNT} for a mount"),
            running("mount", *mount, prefix=limited(LEAST_MOUNT - 1)),
        ):
            pass


@pytest.mark.parametrize("open_mode", ["auto", "cached"])
def test_with_just_enough_any_number_of_files_is_open_and_read(tmp_path: Path, open_mode: str) -> None:
    data = tmp_path / "data"
    make_files(data, 2, 32 * MiB, FILES)
    master = ["--data-dir", tmp_path / "master", "--mount", f"/={data.as_uri()}", "--ufs-option", "settle=0"]
    log = tmp_path / "log"
    with (
        running("master", *master, *LOOPBACK) as process,
        mountpoint_below(tmp_path) as mountpoint,
        log.open("w") as err,
    ):
        where = ["--master", process.facts["listen"]]
        tier = ["--socket", tmp_path / "socket", "--tier", f"ssd:{tmp_path / 'tier'}:400M", *LOOPBACK]
        with (
            running("worker", *where, *tier, prefix=limited(LEAST_WORKER), stderr=err) as worker,
            running(
                *("mount", mountpoint, *where, "--insecure", "--worker-socket", tmp_path / "socket"),
                *("--open-mode", open_mode),
                prefix=limited(LEAST_MOUNT),
                stderr=err,
            ) as mount,
        ):
            server = child_of(mount, "mount")
            assert resource.prlimit(server, resource.RLIMIT_NOFILE) == (LEAST_MOUNT, LEAST_MOUNT)

            def held(number: int) -> int:
                fd = os.open(mountpoint / "small" / f"{number:05d}", os.O_RDONLY)
                assert os.pread(fd, SMALL_BYTES, 0) == b"%05d" % number * (SMALL_BYTES // 5)
                return fd

            with ThreadPoolExecutor(64) as pool:
                fds = list(pool.map(held, range(FILES)))
            try:
                for number in range(2):  # and what comes after them
                    with (mountpoint / "large" / str(number)).open("rb", buffering=0) as file:
                        assert file.read(MiB) == bytes(MiB)
            finally:
                for fd in fds:
                    os.close(fd)
            assert memory_of(server).descriptors <= LEAST_MOUNT
            assert worker.process.poll() is None
    # Told a few times in ten seconds, not for each file.
    lines = log.read_text().splitlines()
    told = sum("Too many open files" in line or "WARNING" in line or "ERROR" in line for line in lines)
    assert told <= FILES // 10, lines
