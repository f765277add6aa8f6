"""`cachefs load` and `cachefs free`: what is fetched, what is not fetched twice, what could not be, what is dropped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import probe
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

PAGE = 64 * 1024
DATA = {
    **{f"train/{number:03}": random.Random(number).randbytes(5_000 + number) for number in range(60)},
    "shards/0": random.Random("shard").randbytes(20 * PAGE + 17),
    "shards/deep/1": random.Random("other").randbytes(3 * PAGE),
    "empty": b"",
}
TOTAL = sum(map(len, DATA.values()))


@contextmanager
def up(bucket: Bucket, directory: Path, *flags: str, **options: str) -> Iterator[tuple[Path, Running]]:
    directory.mkdir(exist_ok=True)
    with mountpoint_below(directory) as mountpoint:
        arguments = [bucket.url, mountpoint, "--state-dir", directory / "state", "--page-size", "64K"]
        if "--tier" not in flags:
            arguments += ["--tier", f"ssd:{directory / 'tier'}:1G"]
        environment = {"CACHEFS_UFS_OPTIONS": json.dumps(bucket.options | options)}
        with running("up", *arguments, *flags, environment=environment) as process:
            yield mountpoint, process


def cachefs(process: Running, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs", *map(str, arguments), "--master", process.facts["master"]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, input=stdin)


def facts_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert "Traceback" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def fetched(process: Running) -> int:
    """Bytes from the under-store since the worker started."""
    facts = facts_of(cachefs(process, "report", "--json"))
    count: int = facts["workers"][0]["status"]["counters"]["under_store_bytes"]
    return count


@pytest.fixture
def bucket(s3_bucket: Bucket) -> Bucket:
    s3_bucket.put(DATA)
    return s3_bucket


def test_everything_is_fetched_once_and_read_without_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (mountpoint, process):
        dry = facts_of(cachefs(process, "load", "/", "--dry-run", "--json"))
        assert (dry["files"], dry["bytes"], dry["cached_bytes"]) == (len(DATA), TOTAL, 0)
        assert fetched(process) == 0
        first = facts_of(cachefs(process, "load", "--json"))
        assert (first["files"], first["bytes"]) == (len(DATA), TOTAL)
        assert (first["loaded_files"], first["loaded_bytes"]) == (len(DATA) - 1, TOTAL)
        assert first["failed"] == [] and fetched(process) == TOTAL
        again = cachefs(process, "load", "/", "/train")
        assert again.returncode == 0
        assert f"cached before: {len(DATA) + 60} files" in again.stdout and "loaded: 0 files" in again.stdout
        bucket.delete(*DATA)
        for name, content in DATA.items():
            assert subprocess.run(["cat", mountpoint / name], capture_output=True, timeout=60).stdout == content
        assert fetched(process) == TOTAL


def test_interrupted_and_run_again_nothing_is_fetched_twice(bucket: Bucket, tmp_path: Path) -> None:
    with (
        running_faulty_s3(bucket.server.endpoint) as far,
        up(bucket, tmp_path, endpoint_url=far.endpoint) as (_, process),
    ):
        cachefs(process, "load", "/", "--metadata")
        far.delay_s = 0.1
        command = [sys.executable, "-m", "cachefs", "load", "/", "--json", "--master", process.facts["master"]]
        # In the background of a shell SIGINT would be ignored; SIGTERM means the same to it.
        loading = subprocess.Popen([*command, "--concurrency", "2"], stdout=subprocess.PIPE, text=True)
        while fetched(process) < 50_000:
            pass
        loading.send_signal(signal.SIGTERM)
        output, _ = loading.communicate(timeout=30)
        first = json.loads(output)
        assert loading.returncode == 130 and first["interrupted"]
        assert 0 < first["loaded_files"] < len(DATA) - 1
        far.delay_s = 0.0
        second = facts_of(cachefs(process, "load", "/", "--json"))
        assert second["failed"] == [] and second["cached_files"] >= first["loaded_files"]
        assert second["cached_bytes"] + second["loaded_bytes"] == TOTAL
        # What was under way when it was interrupted may have been given up: two files, or the pages of one.
        assert TOTAL <= fetched(process) <= TOTAL + 2 * 20 * PAGE


def test_the_failures_are_listed_exactly(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        cachefs(process, "load", "/", "--metadata")
        bucket.delete("train/003", "shards/deep/1")
        done = cachefs(process, "load", "/", "/nowhere", "--json")
        assert done.returncode == 1
        facts = facts_of(done)
        assert sorted(each["path"] for each in facts["failed"]) == ["/nowhere", "/shards/deep/1", "/train/003"]
        assert all(each["reason"] for each in facts["failed"])
        assert facts["loaded_files"] == len(DATA) - 3


def test_paths_from_a_file_and_from_standard_input(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        listed = tmp_path / "list"
        listed.write_text("/train/001\n/shards/deep\n\n/missing\n")
        done = cachefs(process, "load", "--from-file", listed)
        assert done.returncode == 1
        assert "/missing: " in done.stderr and "1 failed" in done.stderr
        assert "loaded: 2 files" in done.stdout
        facts = facts_of(cachefs(process, "load", "--from-file", "-", "--json", stdin="/train/002\n"))
        assert (facts["files"], facts["loaded_files"]) == (1, 1)


def test_what_does_not_fit_is_told(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path, "--tier", f"ssd:{tmp_path / 'tier'}:1M") as (_, process):
        done = cachefs(process, "load", "/shards", "--json")
        assert done.returncode == 1
        (failed,) = facts_of(done)["failed"]
        assert failed["path"] == "/shards/0" and "not kept" in failed["reason"]


def test_wrong_calls(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        assert "1<=x<=256" in cachefs(process, "load", "/", "--concurrency", "0").stderr
        assert cachefs(process, "free").returncode == 2
        for nothing in ("", "\n\n"):
            done = cachefs(process, "load", "--from-file", "-", stdin=nothing)
            assert done.returncode == 1 and "--from-file: " in done.stderr and "there is none in it" in done.stderr


def test_a_path_is_the_same_to_every_command(bucket: Bucket, tmp_path: Path) -> None:
    """With and without the slash at the beginning, and what goes wrong is told with the path once."""
    with up(bucket, tmp_path) as (_, process):
        for command in (
            ["ls"],
            ["stat"],
            ["refresh"],
            ["load", "--dry-run"],
            ["free", "--dry-run"],
            ["pin", "--dry-run"],
        ):
            done, slashed = (cachefs(process, *command, path, "--json") for path in ("train/001", "//train/001/"))
            assert (done.returncode, slashed.returncode) == (0, 0), (command, done.stderr, slashed.stderr)
            facts, same = facts_of(done), facts_of(slashed)
            for each in (facts, same):
                each.pop("seconds", None)
            assert facts == same, command
            wrong = cachefs(process, *command, "nope")
            lines = [line for line in wrong.stderr.splitlines() if "no such file" in line]
            assert wrong.returncode == 1 and len(lines) == 1, (command, wrong.stderr)
            assert lines[0].removeprefix("Error: ") == "/nope: no such file or directory", command
        assert facts_of(cachefs(process, "pin", "train", "--no-load", "--json"))["paths"] == ["/train"]
        dry = cachefs(process, "unpin", "train", "--dry-run")
        assert dry.returncode == 0 and dry.stdout == "/train: would be not pinned any more\n"
        assert facts_of(cachefs(process, "unpin", "train", "--dry-run", "--json"))["dry_run"] is True
        assert "/train: it is not pinned" not in cachefs(process, "unpin", "train").stderr
        gone = cachefs(process, "unpin", "train", "--dry-run")
        assert gone.returncode == 1 and "/train: it is not pinned" in gone.stderr


def test_the_report_in_text(bucket: Bucket, tmp_path: Path) -> None:
    """How files were opened, and the whole path of the tier, however long."""
    tier = tmp_path / ("long" * 40) / "tier"
    with up(bucket, tmp_path, "--tier", f"ssd:{tier}:1G") as (mountpoint, process):
        cachefs(process, "load", "/train")
        subprocess.run(["cat", mountpoint / "train/001"], capture_output=True, timeout=60)
        deadline = time.monotonic() + 20
        while "0 by passthrough, 0 in cached mode" in (text := cachefs(process, "report").stdout):
            assert time.monotonic() < deadline, text
        assert f"ssd:{tier}" in text
        assert "1 by passthrough, 0 in cached mode" in text


def test_free_drops_what_nobody_uses_and_nothing_in_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    before = bucket.contents()
    with up(bucket, tmp_path) as (mountpoint, process):
        cachefs(process, "load", "/")
        holding = subprocess.Popen(
            ["sh", "-c", 'exec 3<"$1"; echo; read _', "sh", mountpoint / "train/000"], stdin=-1, stdout=-1
        )
        assert holding.stdout is not None and holding.stdout.readline()
        try:
            train = sum(len(content) for name, content in DATA.items() if name.startswith("train/"))
            dry = facts_of(cachefs(process, "free", "/train", "--dry-run", "--json"))
            assert (dry["blocks"], dry["bytes"]) == (60, train)
            facts = facts_of(cachefs(process, "free", "/train", "--json"))
            assert (facts["blocks"], facts["in_use"]) == (59, 1)
            left = facts_of(cachefs(process, "load", "/", "--dry-run", "--json"))
            assert left["cached_files"] == len(DATA) - 59
        finally:
            holding.communicate(b"\n", timeout=30)
        assert "0 blocks" not in cachefs(process, "free", "/").stdout
        assert facts_of(cachefs(process, "load", "/", "--dry-run", "--json"))["cached_bytes"] == 0
        assert bucket.contents() == before
        # Read again, it is fetched again.
        name = "train/007"
        assert subprocess.run(["cat", mountpoint / name], capture_output=True, timeout=60).stdout == DATA[name]
