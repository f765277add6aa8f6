"""`cachefs ufs`: under-stores attached to and detached from a running `cachefs up`, as a person does it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import probe
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import Running, mountpoint_below, running

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

PAGE = 64 * 1024
DATA = {"train/0": b"zero", "train/1": b"one"}
MORE = {
    "small": random.Random("small").randbytes(5_000),
    "deep/large": random.Random("large").randbytes(10 * PAGE + 17),
}
SECRET = "very-secret-password"


@pytest.fixture
def bucket(s3_bucket: Bucket) -> Bucket:
    s3_bucket.put(DATA)
    return s3_bucket


@pytest.fixture
def more(s3_bucket: Bucket) -> Bucket:
    other = Bucket(s3_bucket.server, s3_bucket.name, s3_bucket.prefix.rstrip("/") + "-more", s3_bucket.client)
    other.put(MORE)
    return other


@contextmanager
def up(bucket: Bucket, directory: Path) -> Iterator[tuple[Path, Running]]:
    with mountpoint_below(directory) as mountpoint, (directory / "log").open("ab") as log:
        arguments = [bucket.url, mountpoint, "--state-dir", directory / "state", "--page-size", "64K"]
        arguments += ["--tier", f"ssd:{directory / 'tier'}:1G", "--log-level", "DEBUG"]
        with running("up", *arguments, environment=bucket.environment, stderr=log) as process:
            yield mountpoint, process


def cachefs(
    process: Running, *arguments: str | Path, options: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs", *map(str, arguments), "--master", process.facts["master"]]
    told = {**os.environ, "CACHEFS_UFS_OPTIONS": json.dumps(options or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, env=told)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def paths(process: Running) -> list[str]:
    listed: list[dict[str, Any]] = json.loads(cachefs(process, "ufs", "list", "--json").stdout)
    return [each["path"] for each in listed]


def cat(path: Path) -> bytes:
    """By another process: ours must not wait for itself."""
    return subprocess.run(["cat", path], capture_output=True, timeout=60).stdout


def names(directory: Path) -> list[str]:
    done = subprocess.run(["ls", directory], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def until(condition: Callable[[], bool]) -> None:
    """For what a mount is told by the master, a moment after who asked has the answer."""
    limit = time.monotonic() + 30  # less than what the kernel believes by itself
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def exists(path: Path) -> bool:
    return subprocess.run(["test", "-e", path], timeout=60).returncode == 0


def test_attached_it_is_seen_at_once_and_read_and_is_there_after_a_restart(
    bucket: Bucket, more: Bucket, tmp_path: Path
) -> None:
    with up(bucket, tmp_path) as (mountpoint, process):
        # The kernel believes for a minute that there is no such name, and what there is.
        assert not exists(mountpoint / "more/small") and names(mountpoint) == ["train"]
        done = cachefs(process, "ufs", "add", "/more", more.url, options=more.options)
        assert done.returncode == 0 and "is attached at /more" in done.stdout, done.stderr
        until(lambda: names(mountpoint) == ["more", "train"])
        for name, content in MORE.items():
            assert cat(mountpoint / "more" / name) == content
        assert cachefs(process, "load", "/more").returncode == 0
        assert paths(process) == ["/", "/more"]
        assert "by ufs add" in cachefs(process, "ufs", "list").stdout
    with up(bucket, tmp_path) as (mountpoint, process):
        assert paths(process) == ["/", "/more"] and names(mountpoint) == ["more", "train"]
        facts = json.loads(cachefs(process, "load", "/more", "--json").stdout)
        assert (facts["cached_files"], facts["failed"]) == (len(MORE), [])
        more.put({"new": b"new"})
        assert cachefs(process, "refresh", "/more").returncode == 0
        until(lambda: cat(mountpoint / "more/new") == b"new")


def test_detached_its_names_are_gone_for_good_and_nothing_else(bucket: Bucket, more: Bucket, tmp_path: Path) -> None:
    before = more.contents()
    with up(bucket, tmp_path) as (mountpoint, process):
        cachefs(process, "ufs", "add", "/more", more.url, options=more.options)
        cachefs(process, "load", "/more")
        until(lambda: "more" in names(mountpoint))
        for name, content in MORE.items():
            assert cat(mountpoint / "more" / name) == content
        reading = subprocess.Popen(
            ["sh", "-c", 'exec 3<"$1"; echo; read _; cat <&3', "sh", mountpoint / "more/deep/large"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert reading.stdout is not None and reading.stdout.readline()
        try:
            refused = cachefs(process, "ufs", "remove", "/more")
            assert refused.returncode == 1 and "--yes" in refused.stderr
            dry = json.loads(cachefs(process, "ufs", "remove", "/more", "--dry-run", "--json").stdout)
            assert (dry["path"], dry["files"], dry["dry_run"]) == ("/more", len(MORE), True)
            assert paths(process) == ["/", "/more"] and exists(mountpoint / "more/small")
            blocks = json.loads(cachefs(process, "report", "--json").stdout)["workers"][0]["status"]["tiers"]
            assert cachefs(process, "ufs", "remove", "/more", "--yes").returncode == 0
            # The kernel was told: it believed in these for a minute.
            until(lambda: not exists(mountpoint / "more/small") and not exists(mountpoint / "more"))
            until(lambda: names(mountpoint) == ["train"])
            assert cat(mountpoint / "train/0") == DATA["train/0"]
            after = json.loads(cachefs(process, "report", "--json").stdout)["workers"][0]["status"]["tiers"]
            assert after[0]["blocks"] >= blocks[0]["blocks"] > 0
        finally:
            output, _ = reading.communicate(b"\n", timeout=60)
        assert output == MORE["deep/large"]
        assert more.contents() == before
    with up(bucket, tmp_path) as (mountpoint, process):
        assert paths(process) == ["/"] and names(mountpoint) == ["train"]


def test_wrong_calls_say_what_is_accepted(bucket: Bucket, more: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        for arguments, says in (
            (["add", "/", more.url], "PATH: '/' is not accepted; expected a path that nothing is attached at"),
            (["add", "/train", more.url], "would be hidden"),
            (["add", "/a/b", more.url], "right below it: /NAME"),
            (["add", "more", more.url], "an absolute path of the namespace"),
            (["add", "/more", "nosuch://bucket"], "with a scheme of "),
            (["add", "/more", "bucket"], "a URL such as"),
            (["add", "/more", f"s3://no-such-bucket-{os.getpid()}"], "cannot attach"),
            (["add", "/more", more.url, "--ufs-option", "colour=red"], "'colour' is not accepted; expected one of"),
            (["remove", "/nowhere", "--yes"], "one that an under-store is attached at: /"),
            (["remove", "/", "--yes"], "without the last one"),
        ):
            done = cachefs(process, "ufs", *arguments, options=more.options)
            assert done.returncode == 1 and says in done.stderr, (arguments, done.stderr)
        assert paths(process) == ["/"]


def test_secrets_are_kept_where_only_their_owner_reads_them(bucket: Bucket, tmp_path: Path) -> None:
    with up(bucket, tmp_path) as (_, process):
        done = cachefs(process, "ufs", "add", "/hush", "memory://", options={"password": SECRET})
        assert done.returncode == 0, done.stderr
        shown = [done.stdout, done.stderr]
        for command in (["ufs", "list"], ["ufs", "list", "--json"], ["report", "--json"], ["report"]):
            shown.append(cachefs(process, *command).stdout)
        for commandline in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                shown.append(commandline.read_bytes().decode(errors="replace"))
            except OSError:
                continue
        shown.append((tmp_path / "log").read_text())
        assert not any(SECRET in text for text in shown)
        files = list((tmp_path / "state/master").iterdir())
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        # It is there again after a restart.
        assert any(SECRET.encode() in path.read_bytes() for path in files)
