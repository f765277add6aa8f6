"""Limits on memory, as containers have them: whom page cache is counted for, and what the OOM killer leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from cachefs.fuse import probe
from cachefs.model import CachefsError, MiB
from cachefs.testing.cgroups import memory_group, why_no_groups
from cachefs.testing.pressure import make_files, pressing
from cachefs.testing.processes import Running, child_of, mountpoint_below, running
from cachefs.testing.survivors import wait_for

pytestmark = [
    pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse"),
    pytest.mark.skipif(os.geteuid() != 0 or bool(why_no_groups()), reason=why_no_groups() or "needs root"),
]

LARGE, LARGE_BYTES = 4, 192 * MiB
LOOPBACK = ["--listen", "127.0.0.1:0", "--insecure"]
LIMIT_S = 60.0


class Scene(NamedTuple):
    mountpoint: Path
    worker: Running
    mount: Running


@contextmanager
def scene(
    tmp_path: Path,
    worker_prefix: list[str],
    *flags: str,
    large: int = LARGE,
    small: int = 20,
    log: IO[str] | None = None,
) -> Iterator[Scene]:
    data = tmp_path / "data"
    make_files(data, large, LARGE_BYTES, small)
    namespace: list[str | Path] = [
        "--data-dir",
        tmp_path / "master",
        "--mount",
        f"/={data.as_uri()}",
        "--ufs-option",
        "settle=0",
    ]
    tier: list[str | Path] = ["--tier", f"ssd:{tmp_path / 'tier'}:2G", "--socket", tmp_path / "socket"]
    with running("master", *namespace, *LOOPBACK) as master, mountpoint_below(tmp_path) as mountpoint:
        where = ["--master", master.facts["listen"]]
        with (
            running("worker", *where, *tier, *LOOPBACK, prefix=worker_prefix) as worker,
            running(
                *("mount", mountpoint, *where, "--insecure", "--worker-socket", tmp_path / "socket", *flags), stderr=log
            ) as mount,
        ):
            yield Scene(mountpoint, worker, mount)


READ = """
import sys
wanted = int(sys.argv[1])
for name in sys.argv[2:]:
    with open(name, "rb", buffering=0) as file:
        number = 0
        while data := file.read(1 << 20):
            assert data.count(bytes([number % 251])) == 1 << 20, name
            number += 1
        assert number == wanted, name
"""


def read(*paths: Path, prefix: list[str]) -> None:
    """Whole large files, every byte compared."""
    done = subprocess.run(
        [*prefix, sys.executable, "-S", "-c", READ, str(LARGE_BYTES // MiB), *map(str, paths)], timeout=120
    )
    assert done.returncode == 0


def sealed(tmp_path: Path) -> list[Path]:
    """The cached files of large ones."""
    return [path for path in (tmp_path / "tier" / "sealed").rglob("*") if path.stat().st_size == LARGE_BYTES]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_fetches_and_serves_more_than_its_limit_and_readers_do_not_pay_for_it(tmp_path: Path) -> None:
    """768 MiB through a worker that may have 320 MiB, page cache included, to a reader that may have 48."""
    with memory_group(320 * MiB) as of_worker, memory_group(48 * MiB) as of_reader:
        with scene(tmp_path, of_worker.prefix) as (mountpoint, worker, _):
            files = [mountpoint / "large" / str(number) for number in range(LARGE)]
            read(*files, prefix=of_reader.prefix)  # cold: the worker writes what it reads
            read(*files, prefix=of_reader.prefix)  # warm
            assert worker.process.poll() is None
        assert of_worker.kills == of_reader.kills == 0


def test_page_cache_is_counted_for_whoever_touched_it_first(tmp_path: Path) -> None:
    with memory_group(1024 * MiB) as of_worker, memory_group(48 * MiB) as of_reader:
        with scene(tmp_path, of_worker.prefix, large=1) as (mountpoint, _, mount):
            if mount.facts["open_mode"] != "passthrough":
                pytest.skip("no passthrough here")
            file = mountpoint / "large" / "0"
            read(file, prefix=[])
            until(lambda: len(sealed(tmp_path)) == 1)
            before = of_worker.cache_bytes
            assert before > LARGE_BYTES * 0.9  # what it fetched
            read(file, prefix=of_reader.prefix)
            # Found in the page cache: the pod pays for no more than what its program is.
            assert of_reader.cache_bytes < 24 * MiB
            with sealed(tmp_path)[0].open("rb") as cached:
                os.fsync(cached.fileno())
                os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert of_worker.cache_bytes < before - LARGE_BYTES // 2
            # Not there any more: the pod brings it in, and its own limit gives it back.
            read(file, prefix=of_reader.prefix)
            assert of_worker.cache_bytes < before - LARGE_BYTES // 2
            assert 8 * MiB < of_reader.cache_bytes <= 48 * MiB
        assert of_worker.kills == of_reader.kills == 0


def test_tiers_in_memory_that_the_limit_does_not_allow_are_refused(tmp_path: Path) -> None:
    where = ["--master", "127.0.0.1:1", "--socket", tmp_path / "socket", *LOOPBACK]
    with (
        memory_group(768 * MiB) as group,
        pytest.raises(CachefsError, match=r"mem tiers of up to 256.0 MiB together: the memory limit .* is 768.0 MiB"),
        running("worker", *where, "--tier", f"mem:{tmp_path / 'tier'}:1G", prefix=group.prefix),
    ):
        pass


def test_the_oom_killer_takes_a_mounts_server_and_readers_notice_nothing(tmp_path: Path) -> None:
    with (
        memory_group(2 * MiB) as group,
        (tmp_path / "log").open("w") as log,
        scene(tmp_path, [], "--open-mode", "cached", large=1, log=log) as (mountpoint, _, mount),
    ):
        keeper, server = child_of(mount, "mount-keeper"), child_of(mount, "mount")
        adjusted = Path("/proc/self/oom_score_adj").read_text()
        for pid in (keeper, server):
            assert Path(f"/proc/{pid}/oom_score_adj").read_text() == adjusted
        group.add(server)  # what it has is counted elsewhere, what it takes from now on is too much
        with pressing(mountpoint, 1, 20, 32) as readers:
            until(lambda: group.kills > 0)
            wait_for("mount-server", mountpoint, other_than=server)
            assert child_of(mount, "mount-keeper") == keeper
            found = readers.stop()
        assert found.errors == []
        assert found.done["large"] > 0
    assert " ERROR " not in (tmp_path / "log").read_text()
