"""The product as its users meet it: real processes, a real mount, a real S3 API, several reading processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.cli import up as up_module
from cachefs.cli.instances import runtime_root
from cachefs.fuse import Driver, find_mount, is_mounted, probe
from cachefs.model import CachefsError
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, child_of, kill_mount, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

PAGE = 64 * 1024
SMALL_PAGES = ["--page-size", "64K", "--open-wait", "64K", "--read-ahead", "128K"]


def flags_of(driver: Driver) -> list[str]:
    """With small pages. Where every READ comes to us, no open waits."""
    if driver is Driver.KERNEL:
        return SMALL_PAGES
    return ["--driver", driver.value, "--page-size", "64K", "--read-ahead", "128K"]


def content(seed: object, size: int) -> bytes:
    return random.Random(str(seed)).randbytes(size)


DATA = {
    **{f"train/{number:03}.jpg": content(number, 20_000 + number) for number in range(40)},
    "shards/0.tar": content("shard", 20 * PAGE + 17),
    "shards/1.tar": content("other", 7 * PAGE),
    "empty": b"",
    "näme with späces": b"utf-8",
    "deep/er/and/deeper/leaf": b"leaf",
    "x" * 255: b"as long as a name can be",
    **{f"sizes/{size}": content(size, size) for size in (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 1)},
}


@contextmanager
def up(bucket: Bucket, directory: Path, *flags: str) -> Iterator[tuple[Path, Running]]:
    with mountpoint_below(directory) as mountpoint:
        tier = f"ssd:{directory / 'tier'}:1G"
        arguments = [bucket.url, mountpoint, "--state-dir", directory / "state", "--tier", tier, *flags]
        with running("up", *arguments, environment=bucket.environment) as process:
            yield mountpoint, process


def cachefs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cachefs", *arguments], capture_output=True, text=True, timeout=60)


def report(process: Running) -> dict[str, Any]:
    """Of the worker, as soon as it can be asked: it may just be started again."""
    found: list[dict[str, Any]] = []

    def can_be_asked() -> bool:
        told = cachefs("report", "--json", "--master", process.facts["master"]).stdout
        found[:] = [each["status"] for each in json.loads(told)["workers"] if each["status"] is not None]
        return bool(found)

    _wait_until(can_be_asked)
    return found[0]


READER = """
import hashlib, json, os, random, sys
root, keys, seed = json.load(sys.stdin)
random.Random(seed).shuffle(keys)
found = {}
for key in keys:
    with open(os.path.join(root, key), "rb", buffering=0) as file:
        data = b""
        while chunk := file.read(50_001):
            data += chunk
    found[key] = hashlib.sha256(data).hexdigest()
json.dump(found, sys.stdout)
"""


def read_by_processes(root: Path, keys: list[str], count: int) -> None:
    """All keys, by each of several processes at once, in different orders; every byte compared."""
    readers = [
        subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for seed, reader in enumerate(readers):
        assert reader.stdin is not None
        json.dump([str(root), keys, seed], reader.stdin)
        reader.stdin.close()
    outputs = []
    for reader in readers:
        assert reader.stdout is not None
        outputs.append(reader.stdout.read())
        reader.stdout.close()
        assert reader.wait() == 0
    expected = {key: hashlib.sha256(DATA[key]).hexdigest() for key in keys}
    for output in outputs:
        assert json.loads(output) == expected


def run(script: str, *arguments: str | Path) -> str:
    """A shell in a process of its own: a test must not read the mount from where it holds the GIL of its server."""
    done = subprocess.run(["sh", "-c", script, "sh", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.fixture
def bucket(s3_bucket: Bucket) -> Bucket:
    s3_bucket.put(DATA)
    return s3_bucket


def assert_nothing_left(mountpoint: Path, directory: Path) -> None:
    assert find_mount(mountpoint) is None or not is_mounted(mountpoint)
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if str(directory) in line and "cachefs" in line]


def test_every_byte_read_cold_and_warm_by_four_processes(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    before = bucket.contents()
    with up(bucket, tmp_path, *flags_of(driver)) as (mountpoint, process):
        mode, why = {
            Driver.KERNEL: ("passthrough", "the kernel reads cached files by itself"),
            Driver.PYFUSE3: ("cached", "pyfuse3 cannot hand files to the kernel: every READ comes to us"),
        }[driver]
        assert (process.facts["driver"], process.facts["open_mode"]) == (driver.value, mode)
        assert process.facts["why"] == why
        read_by_processes(mountpoint, list(DATA), 4)
        cold = report(process)
        total = sum(map(len, DATA.values()))
        # Single-flight: four readers at once, and each byte left the bucket once.
        assert cold["counters"]["under_store_bytes"] == total
        read_by_processes(mountpoint, list(DATA), 2)
        assert report(process)["counters"]["under_store_bytes"] == total
        # What was read in cached mode is sealed a moment later.
        _wait_until(lambda: report(process)["tiers"][0]["blocks"] == sum(map(bool, DATA.values())))
    assert_nothing_left(mountpoint, tmp_path)
    assert bucket.contents() == before


def test_what_is_sealed_is_read_by_passthrough(bucket: Bucket, tmp_path: Path) -> None:
    keys = [key for key in DATA if DATA[key]]
    with up(bucket, tmp_path, *SMALL_PAGES) as (mountpoint, process):
        read_by_processes(mountpoint, keys, 1)
        _wait_until(lambda: report(process)["tiers"][0]["blocks"] == len(keys))
        # The opens are told a moment later.
        _wait_until(lambda: sum(report(process)["opens"].values()) == len(keys))
        before = report(process)["opens"]
        read_by_processes(mountpoint, keys, 1)
        _wait_until(lambda: report(process)["opens"]["passthrough"] == before["passthrough"] + len(keys))
        assert report(process)["opens"]["cached"] == before["cached"]


def _wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    """For what another process does in its own time; a poll, with a limit that only a failure meets."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_overlapping_opens_stay_in_one_mode_and_the_next_one_upgrades(bucket: Bucket, tmp_path: Path) -> None:
    """The kernel refuses (EIO) to mix modes on one inode; whoever holds it open decides, and nobody notices."""
    key = "shards/0.tar"
    with up(bucket, tmp_path, *SMALL_PAGES) as (mountpoint, process):
        script = 'exec 3<"$1"; head -c 70000 <&3 >/dev/null; head -c 70000 <&3 >/dev/null; echo open; read go; cat <&3'
        with subprocess.Popen(
            ["sh", "-c", script, "sh", mountpoint / key], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            assert holder.stdout.readline() == b"open\n"
            _wait_until(lambda: report(process)["tiers"][0]["blocks"] == 1)
            # Sealed by now, but open in cached mode.
            read_by_processes(mountpoint, [key], 2)
            _wait_until(lambda: report(process)["opens"] == {"passthrough": 0, "cached": 3})
            holder.stdin.write(b"\n")
            holder.stdin.close()
            assert holder.stdout.read() == DATA[key][140_000:]
        read_by_processes(mountpoint, [key], 1)
        _wait_until(lambda: report(process)["opens"] == {"passthrough": 1, "cached": 3})


def test_the_cache_is_kept_for_the_next_time(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (mountpoint, process):
        read_by_processes(mountpoint, list(DATA), 1)
        inode = run('stat -c %i "$1"', mountpoint / "shards/0.tar")
    with up(bucket, tmp_path) as (mountpoint, process):
        read_by_processes(mountpoint, list(DATA), 1)
        assert report(process)["counters"]["under_store_bytes"] == 0
        assert run('stat -c %i "$1"', mountpoint / "shards/0.tar") == inode


def test_names_sizes_and_listing(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    with up(bucket, tmp_path, "--driver", driver.value) as (mountpoint, _):
        found = run('cd "$1" && find . -type f -printf "%P %s\\n" | LC_ALL=C sort', mountpoint)
        expected = sorted((f"{key} {len(data)}" for key, data in DATA.items()), key=str.encode)
        assert found.splitlines() == expected
        assert run('cat "$1"', mountpoint / "nothing").strip().endswith("No such file or directory")
        assert run('stat -c "%F %a" "$1"', mountpoint / "deep/er").strip() == "directory 755"


def test_every_write_is_refused(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    before = bucket.contents()
    with up(bucket, tmp_path, "--driver", driver.value) as (mountpoint, _):
        for script in (
            'echo x > "$1/new"',
            'echo x >> "$1/empty"',
            'truncate -s 0 "$1/empty"',
            'rm "$1/empty"',
            'mkdir "$1/dir"',
            'rmdir "$1/deep"',
            'mv "$1/empty" "$1/other"',
            'ln -s x "$1/link"',
            'ln "$1/empty" "$1/hard"',
            'chmod 600 "$1/empty"',
            'touch "$1/empty"',
        ):
            assert "Read-only file system" in run(script, mountpoint), script
    assert bucket.contents() == before


def test_a_changed_object_is_read_anew_and_never_mixed(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    with up(bucket, tmp_path, *flags_of(driver), "--sync-interval", "0") as (mountpoint, _):
        shard = mountpoint / "shards/0.tar"
        assert run('sha256sum < "$1"', shard).split()[0] == hashlib.sha256(DATA["shards/0.tar"]).hexdigest()
        changed = content("changed", 9 * PAGE)
        bucket.put({"shards/0.tar": changed})
        assert run('sha256sum < "$1"', shard).split()[0] == hashlib.sha256(changed).hexdigest()
        bucket.delete("shards/0.tar")
        assert "No such file" in run('cat "$1"', shard)


def test_a_change_that_nobody_was_told_of_is_found_at_the_open(bucket: Bucket, tmp_path: Path) -> None:
    """The name is still believed, by the kernel too; the object is not what it was. The application never notices."""
    with up(bucket, tmp_path, "--sync-interval", "1h") as (mountpoint, _):
        assert "007.jpg" in run('ls -l "$1/train"', mountpoint)
        changed = content("changed", 30_000)
        bucket.put({"train/007.jpg": changed})
        assert run('sha256sum < "$1"', mountpoint / "train/007.jpg").split()[0] == hashlib.sha256(changed).hexdigest()


def test_in_cached_mode_it_is_found_by_the_read(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    flags = ["--driver", driver.value, "--open-mode", "cached", "--sync-interval", "1h"]
    with up(bucket, tmp_path, *flags) as (mountpoint, _):
        assert "007.jpg" in run('ls -l "$1/train"', mountpoint)
        changed = content("changed", 30_000)
        bucket.put({"train/007.jpg": changed})
        assert run('cat "$1"', mountpoint / "train/007.jpg").strip().endswith("Stale file handle")
        # Then the name is asked for again.
        assert run('sha256sum < "$1"', mountpoint / "train/007.jpg").split()[0] == hashlib.sha256(changed).hexdigest()


def test_sigterm_during_a_cold_read_leaves_nothing(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    bucket.put({"large": content("large", 512 * PAGE)})
    with up(bucket, tmp_path, *flags_of(driver)) as (mountpoint, process):
        with subprocess.Popen(
            ["dd", f"if={mountpoint / 'large'}", "of=/dev/null", "bs=4096"], stderr=subprocess.PIPE
        ) as reader:
            _wait_until(lambda: report(process)["counters"]["pages_fetched"] > 0)
            assert process.end(signal.SIGTERM) == 0
            assert reader.stderr is not None
            reader.stderr.read()
        assert_nothing_left(mountpoint, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(bucket: Bucket, tmp_path: Path, number: signal.Signals) -> None:
    with up(bucket, tmp_path) as (mountpoint, process):
        assert process.end(number) == 0
        assert_nothing_left(mountpoint, tmp_path)


def test_ends_when_somebody_unmounts(bucket: Bucket, tmp_path: Path, driver: Driver) -> None:
    with up(bucket, tmp_path, "--driver", driver.value) as (mountpoint, process):
        assert cachefs("umount", str(mountpoint)).returncode == 0
        assert process.process.wait(60) == 0
        assert_nothing_left(mountpoint, tmp_path)


def test_ends_when_it_is_killed(bucket: Bucket, tmp_path: Path) -> None:
    """The three notice by the end of their link to it, and the mount goes with them."""
    with up(bucket, tmp_path) as (mountpoint, process):
        process.process.kill()
        process.process.wait()
        _wait_until(lambda: not is_mounted(mountpoint))
        _wait_until(lambda: str(tmp_path) not in run("ps -eo args"))


def test_a_mount_that_is_killed_ends_all_with_an_error(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (mountpoint, process):
        kill_mount(process)
        assert process.process.wait(60) == 1
        assert_nothing_left(mountpoint, tmp_path)
        assert not list(Path(runtime_root()).rglob(f"*{process.process.pid}*"))


@pytest.mark.parametrize("role", ["master", "worker"])
def test_a_master_or_worker_that_is_killed_is_started_again(bucket: Bucket, tmp_path: Path, role: str) -> None:
    keys = sorted(DATA)
    with up(bucket, tmp_path, "--entry-timeout", "1s", f"--{role}-http", "127.0.0.1:0") as (mountpoint, process):
        read_by_processes(mountpoint, keys[::3], 1)
        for number in (1, 2):
            pid = child_of(process, role)
            os.kill(pid, signal.SIGKILL)
            # Cached and not: nobody gets an error.
            read_by_processes(mountpoint, keys[number::3], 1)
            read_by_processes(mountpoint, keys[::3], 1)
            _wait_until(partial(_is_another, process, role, pid))
        assert process.process.poll() is None
        assert report(process)["tiers"][0]["state"] == "healthy"
        assert process.end() == 0
        assert_nothing_left(mountpoint, tmp_path)


def _is_another(process: Running, role: str, pid: int) -> bool:
    try:
        return child_of(process, role) != pid
    except (CachefsError, OSError):
        return False  # it is just dying, or starting


def _children_with(argument: str) -> list[int]:
    """Of ours: not every master below this process is of this test."""
    found = []
    for pid in map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()):
        with suppress(OSError):
            if argument in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                found.append(pid)
    return found


@pytest.mark.expect_warnings("each death is told")
async def test_one_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up_module, "MOST_IN_A_ROW", 2)
    (tmp_path / "data").mkdir()
    own = ["--data-dir", str(tmp_path / "master"), "--mount", f"/={(tmp_path / 'data').as_uri()}", "--insecure"]
    seen: list[int] = []
    with pytest.raises(ExceptionGroup) as raised, trio.fail_after(60):
        async with up_module._restarted("master", own):
            while True:
                for pid in _children_with(own[1]):
                    if pid not in seen:
                        seen.append(pid)
                        os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.02)
    assert "started again 2 times in a row" in str(raised.value.exceptions[0])
    assert len(seen) == len(set(seen)) == 3


def test_what_killed_processes_left_is_removed_by_the_next(bucket: Bucket, tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, ours = (Path(runtime_root(), f"x-{pid}.sock") for pid in (ended.pid, os.getpid()))
    for path in (stale, ours):
        path.touch()
    try:
        with up(bucket, tmp_path):
            assert not stale.exists() and ours.exists()
    finally:
        ours.unlink()


def test_as_many_files_may_be_open_as_the_system_allows(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        for pid in [process.process.pid, *map(int, run('ps -o pid= --ppid "$1"', str(process.process.pid)).split())]:
            assert len(set(resource.prlimit(pid, resource.RLIMIT_NOFILE))) == 1


def test_the_three_processes_by_hand(bucket: Bucket, tmp_path: Path) -> None:
    data_dir, tier, socket = tmp_path / "master", f"ssd:{tmp_path / 'tier'}:1G", tmp_path / "s"
    loopback = ["--listen", "127.0.0.1:0", "--insecure"]
    environment = bucket.environment
    with (
        running(
            "master", "--data-dir", data_dir, "--mount", f"/sets/a={bucket.url}", *loopback, environment=environment
        ) as master,
        running("worker", "--master", master.facts["listen"], "--socket", socket, "--tier", tier, *loopback),
        mountpoint_below(tmp_path) as mountpoint,
    ):
        where = ["--master", master.facts["listen"], "--insecure"]
        with running("mount", mountpoint, *where, "--worker-socket", socket):
            assert run('ls "$1"', mountpoint).split() == ["sets"]
            read_by_processes(mountpoint / "sets/a", list(DATA), 2)
        # The worker of this node is found through the master, and a subtree can be mounted.
        with running("mount", mountpoint, *where, "--path", "/sets/a/train"):
            assert len(run('ls "$1"', mountpoint).split()) == 40
            assert run('sha256sum < "$1/007.jpg"', mountpoint).split()[0] == _sha256("train/007.jpg")
        listed = cachefs("ls", "/sets/a/train", "--master", master.facts["listen"])
        assert sorted(listed.stdout.split()) == sorted(key.split("/")[1] for key in DATA if key.startswith("train"))
        shown = json.loads(cachefs("stat", "/sets/a/shards/0.tar", "--json", "--master", master.facts["listen"]).stdout)
        assert shown["size"] == len(DATA["shards/0.tar"]) and shown["type"] == "file"


def _sha256(key: str) -> str:
    return hashlib.sha256(DATA[key]).hexdigest()
