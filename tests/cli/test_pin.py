"""`cachefs pin` and `unpin` over real processes: what is pinned outlives whatever else is read, restarts included."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import probe
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

SIZE = 60_000
PINNED = {f"train/{number:02}": random.Random(number).randbytes(SIZE) for number in range(20)}
OTHERS = {f"other/{number:02}": random.Random(-1 - number).randbytes(SIZE) for number in range(60)}
TIER = "3M"
"""Half of all: what is pinned takes 1.3 MB of it, the others 4."""


@contextmanager
def up(bucket: Bucket, directory: Path, *flags: str, **options: str) -> Iterator[tuple[Path, Running]]:
    with mountpoint_below(directory) as mountpoint:
        arguments = [bucket.url, mountpoint, "--state-dir", directory / "state", "--page-size", "64K"]
        arguments += ["--tier", f"ssd:{directory / 'tier'}:{TIER}"]
        environment = {"CACHEFS_UFS_OPTIONS": json.dumps(bucket.options | options)}
        with running("up", *arguments, *flags, environment=environment) as process:
            yield mountpoint, process


def cachefs(process: Running, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs", *map(str, arguments), "--master", process.facts["master"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def facts_of(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout)


def read(path: Path) -> bytes:
    return subprocess.run(["cat", path], capture_output=True, timeout=60).stdout


def read_all(mountpoint: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        assert read(mountpoint / name) == content


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker(process: Running) -> dict[str, Any]:
    status: dict[str, Any] = facts_of(cachefs(process, "report", "--json"))["workers"][0]["status"]
    return status


def cached(process: Running, path: str) -> int:
    count: int = facts_of(cachefs(process, "load", path, "--dry-run", "--json"))["cached_files"]
    return count


@pytest.fixture
def bucket(s3_bucket: Bucket) -> Bucket:
    s3_bucket.put(PINNED | OTHERS)
    return s3_bucket


@pytest.fixture
def always() -> tuple[str, str]:
    """Whatever is read goes into the cache, and others out of it."""
    return ("--promote", "always")


def test_what_is_pinned_is_loaded_and_stays_whatever_is_read_and_restarted(
    bucket: Bucket, tmp_path: Path, always: tuple[str, str]
) -> None:
    with up(bucket, tmp_path, *always) as (mountpoint, process):
        read_all(mountpoint, OTHERS)
        # There is no room left: what is pinned takes it from the others.
        facts = facts_of(cachefs(process, "pin", "/train", "--json"))
        assert (facts["files"], facts["bytes"]) == (len(PINNED), len(PINNED) * SIZE)
        assert (facts["loaded_files"], facts["failed"], facts["unconfirmed"]) == (len(PINNED), [], [])
        read_all(mountpoint, OTHERS)
        assert cached(process, "/train") == len(PINNED)
        (tier,) = worker(process)["tiers"]
        assert tier["evictions"] > len(OTHERS) // 2 and tier["pinned_bytes"] > len(PINNED) * SIZE
        (listed,) = facts_of(cachefs(process, "pin", "--list", "--json"))["pins"]
        assert (listed["path"], listed["cached_files"], listed["cached_bytes"]) == (
            "/train",
            len(PINNED),
            len(PINNED) * SIZE,
        )
        assert "/train" in cachefs(process, "pin", "--list").stdout
        assert "pinned: /train" in cachefs(process, "report").stdout
    bucket.delete(*PINNED)
    with up(bucket, tmp_path, *always, "--sync-interval", "-1") as (mountpoint, process):
        # From the first moment on, before anything has asked for it.
        read_all(mountpoint, OTHERS)
        before = worker(process)["counters"]["under_store_bytes"]
        read_all(mountpoint, PINNED)
        assert worker(process)["counters"]["under_store_bytes"] == before
        # Unpinned, it goes like anything else.
        assert cachefs(process, "unpin", "/train").returncode == 0
        assert worker(process)["tiers"][0]["pinned_bytes"] == 0
        read_all(mountpoint, OTHERS)
        read_all(mountpoint, OTHERS)
        assert cached(process, "/train") < len(PINNED)
        assert facts_of(cachefs(process, "pin", "--list", "--json"))["pins"] == []


def test_what_appears_and_changes_below_a_pin_is_pinned_and_what_is_gone_is_not(
    bucket: Bucket, tmp_path: Path, always: tuple[str, str]
) -> None:
    with up(bucket, tmp_path, *always) as (mountpoint, process):
        assert cachefs(process, "pin", "/train", "--no-load").returncode == 0
        assert cached(process, "/train") == 0
        read_all(mountpoint, PINNED)
        changed = {"train/00": b"changed" * 5000, "train/new": b"new" * 10_000, "train/deep/er": b"deeper" * 5000}
        bucket.put(changed)
        bucket.delete("train/01")
        assert cachefs(process, "refresh", "/train", "--recursive").returncode == 0
        # The mount is told a moment after who asked has the answer.
        for name, content in changed.items():
            until(lambda name=name, content=content: read(mountpoint / name) == content)
        read_all(mountpoint, OTHERS)
        now = {name: content for name, content in (PINNED | changed).items() if name != "train/01"}
        assert cached(process, "/train") == len(now)
        # What is gone from there takes no room for long: the worker hears of it within seconds.
        whole = sum(-(-len(content) // 4096) * 4096 + 4096 for content in now.values())
        until(lambda: worker(process)["tiers"][0]["pinned_bytes"] <= whole)
        read_all(mountpoint, OTHERS)
        assert cached(process, "/train") == len(now)
        before = worker(process)["counters"]["under_store_bytes"]
        read_all(mountpoint, now)
        assert worker(process)["counters"]["under_store_bytes"] == before


def test_more_than_fits_is_refused_with_the_numbers(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        dry = cachefs(process, "pin", "/", "--dry-run")
        assert dry.returncode == 1 and "it does not fit" in dry.stderr
        done = cachefs(process, "pin", "/")
        assert done.returncode == 1
        assert "4.6 MiB in 80 files" in done.stderr and "2.7 MiB may be pinned: 90% of the 3.0 MiB" in done.stderr
        assert "Nothing was changed" in done.stderr
        assert facts_of(cachefs(process, "pin", "--list", "--json"))["pins"] == []
        assert worker(process)["counters"]["under_store_bytes"] == 0
        dry = cachefs(process, "pin", "/train", "--dry-run", "--json")
        assert dry.returncode == 0
        facts = facts_of(dry)
        assert facts["dry_run"] and facts["needed_bytes"] <= facts["limit_bytes"] == int(0.9 * facts["capacity_bytes"])
        assert facts_of(cachefs(process, "pin", "--list", "--json"))["pins"] == []
        # Two that fit alone, and not together.
        assert cachefs(process, "pin", "/train", "--no-load").returncode == 0
        assert "Nothing was changed" in cachefs(process, "pin", "/other").stderr
        assert cachefs(process, "pin", "/train", "/train/00", "--no-load").returncode == 0
        assert [each["path"] for each in facts_of(cachefs(process, "pin", "--list", "--json"))["pins"]] == [
            "/train",
            "/train/00",
        ]


def test_an_interrupted_pin_goes_on_and_failures_are_listed_exactly(bucket: Bucket, tmp_path: Path) -> None:
    with (
        running_faulty_s3(bucket.server.endpoint) as far,
        up(bucket, tmp_path, endpoint_url=far.endpoint) as (_, process),
    ):
        cachefs(process, "load", "/", "--metadata")
        # So that it is not done before it is interrupted.
        far.inject("stall", part="train/", after=2, times=1000)
        command = [sys.executable, "-m", "cachefs", "pin", "/train", "--json", "--master", process.facts["master"]]
        pinning = subprocess.Popen([*command, "--concurrency", "1"], stdout=subprocess.PIPE, text=True)
        far.wait_stalled()
        pinning.send_signal(signal.SIGTERM)
        output, _ = pinning.communicate(timeout=60)
        first = json.loads(output)
        assert pinning.returncode == 130 and first["interrupted"] and 0 < first["loaded_files"] < len(PINNED)
        far.release()
        bucket.delete("train/19")
        done = cachefs(process, "pin", "/train", "--json")
        assert done.returncode == 1
        second = facts_of(done)
        assert [each["path"] for each in second["failed"]] == ["/train/19"]
        assert second["cached_files"] >= first["loaded_files"]
        assert second["cached_files"] + second["loaded_files"] == len(PINNED) - 1
        (listed,) = facts_of(cachefs(process, "pin", "--list", "--json"))["pins"]
        assert listed["path"] == "/train" and listed["cached_files"] >= second["cached_files"]


def test_pinned_paths_are_not_freed(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path, "--files-ahead", "0") as (mountpoint, process):
        some = dict(list(OTHERS.items())[:5])
        read_all(mountpoint, some)
        assert cachefs(process, "pin", "/train").returncode == 0
        for path in ("/train", "/train/", "/train/03"):
            done = cachefs(process, "free", path)
            assert done.returncode == 1 and "cachefs unpin /train comes first" in done.stderr
        dry = facts_of(cachefs(process, "free", "/", "--dry-run", "--json"))
        assert (dry["blocks"], dry["pinned"]) == (len(some), len(PINNED))
        done = cachefs(process, "free", "/")
        assert f"{len(some)} blocks" in done.stdout and f"{len(PINNED)} are pinned and stay" in done.stdout
        assert cached(process, "/train") == len(PINNED) and cached(process, "/other") == 0
        assert cachefs(process, "unpin", "/train").returncode == 0
        assert facts_of(cachefs(process, "free", "/train", "--json"))["blocks"] == len(PINNED)


def test_wrong_calls_say_what_is_accepted(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        assert cachefs(process, "pin").returncode == 2
        assert cachefs(process, "pin", "--list", "/train").returncode == 2
        missing = cachefs(process, "pin", "/train", "/nowhere")
        assert missing.returncode == 1 and "/nowhere: " in missing.stderr and "nothing was pinned" in missing.stderr
        assert "/train: it is not pinned; nothing is" in cachefs(process, "unpin", "/train").stderr
        cachefs(process, "pin", "/train", "--no-load")
        below = cachefs(process, "unpin", "/train/00")
        assert below.returncode == 1 and "it is pinned by /train" in below.stderr
        assert "it is not pinned; /train is" in cachefs(process, "unpin", "/train", "/other").stderr
        assert [each["path"] for each in facts_of(cachefs(process, "pin", "--list", "--json"))["pins"]] == ["/train"]
