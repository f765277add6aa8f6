"""`cachefs load` and `cachefs free`: what is fetched, what is not fetched twice, what could not be, what is dropped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cachefs.fuse import probe
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.huge_s3 import running_huge_s3
from cachefs.testing.processes import Running, mountpoint_below, running
from cachefs.worker import WorkerConfig

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


def test_interrupted_and_run_again_no_file_is_fetched_twice(bucket: Bucket, tmp_path: Path) -> None:
    with (
        running_faulty_s3(bucket.server.endpoint) as far,
        up(bucket, tmp_path, endpoint_url=far.endpoint) as (_, process),
    ):
        cachefs(process, "load", "/", "--metadata")
        # So that it is not done before it is interrupted.
        far.inject("stall", part="train/", after=10, times=1000)
        with loading(process, "/train", "--json", "--concurrency", "2") as started:
            far.wait_stalled()
            # In the background of a shell SIGINT would be ignored; SIGTERM means the same to it.
            started.send_signal(signal.SIGTERM)
            output, _ = started.communicate(timeout=60)
        first = json.loads(output)
        assert started.returncode == 130 and first["interrupted"]
        assert 0 < first["loaded_files"] < 58
        far.release()
        second = facts_of(cachefs(process, "load", "/train", "--json"))
        assert second["failed"] == [] and second["cached_files"] >= first["loaded_files"]
        wanted = sum(len(content) for name, content in DATA.items() if name.startswith("train/"))
        assert second["cached_bytes"] + second["loaded_bytes"] == wanted
        # Two were under way when it was interrupted, and may have been given up.
        assert wanted <= far.asked_bytes <= wanted + 2 * 5_060


PAGES = 300
SHARD = random.Random("many pages").randbytes(PAGES * PAGE - 5)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_interrupted_in_its_middle_is_resumed_by_pages(
    s3_bucket: Bucket, tmp_path: Path, restarted: bool
) -> None:
    s3_bucket.put({"shard": SHARD})
    with running_faulty_s3(s3_bucket.server.endpoint) as far:
        # So that it comes no further before it is interrupted.
        far.inject("stall", part="shard", after=PAGES // 3, times=1000)
        with up(s3_bucket, tmp_path, endpoint_url=far.endpoint) as (mountpoint, process):
            with loading(process, "/shard", "--json") as started:
                far.wait_stalled()
                started.send_signal(signal.SIGTERM)
                output, _ = started.communicate(timeout=60)
            far.release()
            assert started.returncode == 130 and json.loads(output)["loaded_files"] == 0
            if not restarted:
                go_on(far, mountpoint, process)
        if restarted:
            with up(s3_bucket, tmp_path, endpoint_url=far.endpoint) as (mountpoint, process):
                go_on(far, mountpoint, process)


def go_on(far: FaultyS3, mountpoint: Path, process: Running) -> None:
    in_flight = WorkerConfig.load_slots * PAGE
    assert far.asked_bytes < len(SHARD) // 2
    before = far.asked_bytes
    second = facts_of(cachefs(process, "load", "/shard", "--json"))
    assert second["failed"] == [] and second["loaded_bytes"] == len(SHARD)
    # What it has on its disk beside the pages, their checksums, is counted as well.
    assert before - in_flight <= second["resumed_bytes"] <= before + PAGE
    assert len(SHARD) <= far.asked_bytes <= len(SHARD) + in_flight
    assert subprocess.run(["cat", mountpoint / "shard"], capture_output=True, timeout=60).stdout == SHARD


@pytest.mark.slow
def test_a_line_now_and_then_tells_how_much_of_a_file_has_come(s3_bucket: Bucket, tmp_path: Path) -> None:
    s3_bucket.put({"gone": SHARD, "shard": SHARD})
    with (
        running_faulty_s3(s3_bucket.server.endpoint) as far,
        up(s3_bucket, tmp_path, endpoint_url=far.endpoint) as (_, process),
    ):
        cachefs(process, "load", "/", "--metadata")
        s3_bucket.delete("gone")
        # 300 pages, 8 at a time: some 15 seconds.
        far.delay_s = 0.4
        with loading(process, "/", "--concurrency", "1", stderr=subprocess.PIPE) as started:
            output, said = started.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("loading: ")]
    assert started.returncode == 1 and "loaded: 1 files, 18.7 MiB" in output
    found = [LINE.fullmatch(line) for line in lines]
    assert len(lines) >= 2 and all(found), said
    done = [float(each["done"]) for each in found if each]
    # The one that failed is done with; of the other there is more in each line.
    assert done == sorted(set(done)) and done[0] > 18.7 and done[-1] < 37.5
    assert all(each["total"] == "37.5 MiB" and each["failed"] == "1" for each in found if each)
    # The rate is of what came: in 5 seconds and more, none of what failed.
    assert all(each["unit"] == "KiB" or float(each["rate"]) < 3 for each in found if each), said


LINE = re.compile(
    r"loading: 1 of 2 files, (?P<done>[0-9.]+) MiB of (?P<total>.*), (?P<rate>[0-9.]+) (?P<unit>[KM]iB)/s,"
    r" (?P<failed>\d+) failed, .* left"
)


def test_a_bar_on_a_terminal_has_totals_and_grows_with_the_bytes(s3_bucket: Bucket, tmp_path: Path) -> None:
    s3_bucket.put({"shard": SHARD})
    with (
        running_faulty_s3(s3_bucket.server.endpoint) as far,
        up(s3_bucket, tmp_path, endpoint_url=far.endpoint) as (_, process),
    ):
        cachefs(process, "load", "/", "--metadata")
        far.delay_s = 0.15
        ours, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (25, 150))
        with (
            open(ours, "rb", buffering=0) as screen,
            open(terminal, "wb", buffering=0) as theirs,
            loading(process, "/", stderr=theirs) as started,
        ):
            theirs.close()
            said = read_screen(screen)
    found = re.findall(r"loading .*?(\d) of (\d) files, ([0-9.]+) (\w+) of 18.7 MiB", said)
    assert found, said
    done = [float(number) for _, _, number, unit in found if unit == "MiB"]
    assert {total for _, total, _, _ in found} == {"1"}
    assert done == sorted(done) and len(set(done)) >= 4 and done[-1] == 18.7, done
    assert started.returncode == 0 and " left" in said and "━" in said


def read_screen(screen: BinaryIO) -> str:
    """All that is written until everybody who had the terminal has ended."""
    said = b""
    with suppress(OSError):  # how a terminal ends
        while more := screen.read(65536):
            said += more
    return said.decode()


@pytest.mark.slow
def test_a_long_listing_tells_that_it_goes_on(tmp_path: Path) -> None:
    with running_huge_s3(3000) as store, mountpoint_below(tmp_path) as mountpoint:
        state = ["--state-dir", tmp_path / "state", "--tier", f"ssd:{tmp_path / 'tier'}:1G"]
        with running("up", store.url, mountpoint, *state, environment=store.environment) as process:
            store.hold(1)
            with loading(process, "/", "--metadata", stderr=subprocess.PIPE) as started:
                assert started.stderr is not None
                line = started.stderr.readline()
                store.release()
                output, _ = started.communicate(timeout=60)
    assert re.fullmatch(r"listing: \d+ files, .* so far\n", line)
    assert started.returncode == 0 and "/: 3000 files" in output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("free", r"freeing .*60 of 60 files, 60 blocks, "),
        ("verify", r"verifying .*62 of 62 blocks, .* 0 damaged"),
    ],
)
def test_free_and_verify_have_totals_on_a_terminal(bucket: Bucket, tmp_path: Path, command: str, said: str) -> None:
    with up(bucket, tmp_path) as (_, process):
        cachefs(process, "load", "/")
        arguments = ["/train", "--master", process.facts["master"]]
        if command == "verify":
            report = facts_of(cachefs(process, "report", "--json"))
            arguments = ["--worker-socket", report["workers"][0]["socket"]]
        ours, terminal = os.openpty()
        termios.tcsetwinsize(terminal, (25, 150))
        with (
            open(ours, "rb", buffering=0) as screen,
            open(terminal, "wb", buffering=0) as theirs,
            subprocess.Popen(
                [sys.executable, "-m", "cachefs", command, *arguments], stdout=subprocess.DEVNULL, stderr=theirs
            ) as started,
        ):
            theirs.close()
            shown = read_screen(screen)
    assert started.returncode == 0 and re.search(said, shown), shown


@contextmanager
def loading(process: Running, *arguments: str, stderr: Any = None) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "cachefs", "load", *arguments, "--master", process.facts["master"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as started:
        yield started


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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

        def is_all_gone() -> bool:
            """The mount hears of the close a moment later, and holds the file until then."""
            cachefs(process, "free", "/")
            return bool(facts_of(cachefs(process, "load", "/", "--dry-run", "--json"))["cached_bytes"] == 0)

        wait_for(is_all_gone)
        assert bucket.contents() == before
        # Read again, it is fetched again.
        name = "train/007"
        assert subprocess.run(["cat", mountpoint / name], capture_output=True, timeout=60).stdout == DATA[name]
