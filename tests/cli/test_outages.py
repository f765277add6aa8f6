"""Readers of a mount while the master, the worker or the under-store is away, killed or hanging, for longer than names
are believed."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from cachefs.cli.connect import FIRST_CONTACT_S
from cachefs.fuse import probe
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import PAGE, RealCluster, real_cluster
from cachefs.testing.survivors import kill, wait_for
from tests.cli.test_http import get, metrics

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

SMALL = {f"dir/{number:02}": random.Random(number).randbytes(5000 + number) for number in range(12)}
LARGE = {"large": random.Random("large").randbytes(20 * PAGE + 5)}
COLD = {f"cold/{number}": random.Random(-number).randbytes(7000 + number) for number in range(3)}
DATA = SMALL | LARGE | COLD
PATIENCE_S = 2.0
TTL_S = 1.0
NOTICED_S = 3.0
"""How long it may take to see that a process hangs."""
HANGS_S = 4.5
"""The same, of a worker."""
SLACK_S = 15.0
"""For a machine that others use, too."""
TTLS = [f"--{kind}-timeout={TTL_S:g}s" for kind in ("attr", "entry", "negative")]
MOUNT = [*TTLS, f"--patience={PATIENCE_S:g}s", "--http", "127.0.0.1:0", "--hung-after", "60s"]


class Scene:
    def __init__(self, cluster: RealCluster, mountpoint: Path) -> None:
        self.cluster = cluster
        self.root = mountpoint

    async def try_(self, ask: Callable[[], object], limit_s: float) -> object:
        """What it returns, or the errno of what it raises. Never a hang."""

        def run() -> object:
            try:
                return ask()
            except OSError as error:
                return error.errno

        with trio.fail_after(limit_s):
            return await trio.to_thread.run_sync(run, abandon_on_cancel=True)

    async def read(self, name: str, limit_s: float = SLACK_S) -> object:
        return await self.try_((self.root / name).read_bytes, limit_s)

    async def check_known(self) -> None:
        """What was read before: contents, listings, names that do not exist."""
        for name in SMALL | LARGE:
            assert await self.read(name) == DATA[name], name
        names = {name.removeprefix("dir/") for name in SMALL}
        assert await self.try_(lambda: set(os.listdir(self.root / "dir")), SLACK_S) == names
        assert await self.try_(lambda: os.stat(self.root / "dir/absent"), SLACK_S) == errno.ENOENT
        assert await self.try_(lambda: os.stat(self.root / "dir/03").st_size, SLACK_S) == len(DATA["dir/03"])

    async def warm_up(self) -> None:
        for name in COLD:
            # Known, and not read.
            assert await self.try_(partial(lambda path: os.stat(path).st_size, self.root / name), SLACK_S)
        await self.check_known()
        with trio.fail_after(20):
            while not {len(DATA[name]) for name in SMALL | LARGE} <= {
                path.stat().st_size for path in self.cluster.sealed("a")
            }:
                await trio.sleep(0.05)

    def value(self, name: str, process: str = "mount") -> float:
        return metrics(self.cluster.processes[process])[name]

    def readiness(self, process: str = "mount") -> tuple[int, str]:
        return get(self.cluster.processes[process], "/readyz")

    async def until(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """One that raises OSError is not true yet: whoever asks before all is back may be told of that."""

        def holds() -> bool:
            try:
                return condition()
            except OSError:
                return False

        with trio.fail_after(limit_s):
            while not await trio.to_thread.run_sync(holds):
                await trio.sleep(0.1)

    def said(self, line: str) -> int:
        return self.cluster.log("mount").count(line)

    async def report(self, *flags: str | Path) -> tuple[int, dict[str, object], float]:
        """(status, what it says, seconds)"""
        command = [sys.executable, "-m", "cachefs", "report", "--json", "--insecure", *map(str, flags)]
        command += ["--master", f"127.0.0.1:{self.cluster.port}"]
        began = time.monotonic()
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout), time.monotonic() - began


def troubles(report: Mapping[str, object]) -> set[tuple[str, str]]:
    found = report["troubles"]
    assert isinstance(found, list)
    return {(each["of"], each["state"]) for each in found}


@asynccontextmanager
async def scene(
    directory: Path, url: str, *, workers: tuple[str, ...] = ("a",), ufs_options: Mapping[str, str] | None = None
) -> AsyncIterator[Scene]:
    with mountpoint_below(directory) as mountpoint:
        async with real_cluster(
            directory,
            url,
            ufs_options=ufs_options or {"settle": "0"},
            master_flags=["--sync-interval", "1s", "--http", "127.0.0.1:0"],
        ) as cluster:
            for name in workers:
                await cluster.start_worker(name, "--http", "127.0.0.1:0")
            await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"), *MOUNT)
            found = Scene(cluster, mountpoint)
            await found.warm_up()
            yield found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, content in DATA.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


async def expired() -> None:
    """What the kernel and we were told is not believed any more."""
    await trio.sleep(TTL_S + 0.2)


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_without_the_master(tmp_path: Path, data: Path, how: str) -> None:
    async with scene(tmp_path, data.as_uri()) as it:
        cluster = it.cluster
        assert it.readiness() == (200, "ready\n")
        if how == "killed":
            await cluster.kill("master")
        else:
            cluster.stop("master")
        await expired()
        await it.check_known()
        known = time.monotonic()
        await it.check_known()
        # Nobody waits for each answer anew.
        assert time.monotonic() - known < 2 * NOTICED_S
        first = it.value("cachefs_metadata_served_stale_total")
        await expired()
        await it.check_known()
        assert it.value("cachefs_metadata_served_stale_total") > first > 0
        assert it.value("cachefs_master_away_seconds") > TTL_S
        assert it.value("cachefs_master_outages_total") == 1
        status, reason = it.readiness()
        assert status == 503 and reason.startswith("the master does not answer")
        # Names that nobody knows, and a file that was looked at and never read: the worker does not know where it is.
        for name in ("dir/unknown", "unknown/file", "cold/0"):
            began = time.monotonic()
            found = await it.try_((it.root / name).read_bytes, PATIENCE_S + NOTICED_S + SLACK_S)
            assert found == errno.ETIMEDOUT
            assert time.monotonic() - began > PATIENCE_S - 0.5

        # Whoever asks is told at once, and what a worker here has to say.
        status, told, seconds = await it.report("--worker-socket", cluster.socket("a"))
        assert status == 1 and seconds < FIRST_CONTACT_S + SLACK_S
        assert ("master", "does not answer") in troubles(told)
        assert [each["name"] for each in told["workers"]] == ["a"]  # type: ignore[attr-defined]

        changed = b"changed meanwhile"
        (data / "dir/00").write_bytes(changed)
        (data / "dir/01").unlink()
        (data / "dir/new").write_bytes(b"new")
        if how == "killed":
            await cluster.start_master()
        else:
            cluster.go_on("master")

        def is_fresh() -> bool:
            return (
                not (it.root / "dir/01").exists()
                and (it.root / "dir/00").read_bytes() == changed
                and "new" in os.listdir(it.root / "dir")
            )

        await it.until(is_fresh)
        assert await it.read("cold/0") == DATA["cold/0"]
        await it.until(lambda: it.said("the master is back") == 1)
        assert it.said("the master is away") == 1
        assert it.value("cachefs_master_away_seconds") == 0
        await it.until(lambda: it.readiness() == (200, "ready\n"))
        await it.until(lambda: it.readiness("a") == (200, "ready\n"))
        assert (await it.report())[1]["troubles"] == []


async def test_a_server_of_the_mount_that_dies_while_the_master_is_away(tmp_path: Path, data: Path) -> None:
    async with scene(tmp_path, data.as_uri()) as it:
        with (it.root / "dir/02").open("rb", buffering=0) as held:
            await it.cluster.kill("master")
            await it.until(lambda: it.said("names are kept for whoever goes on") == 1)
            # And the one after it, which has heard of nothing itself.
            for count in (1, 2):
                pid = await trio.to_thread.run_sync(kill, "mount-server", it.root)
                await trio.to_thread.run_sync(partial(wait_for, "mount-server", it.root, other_than=pid))
                await it.until(lambda: it.said("names of an earlier server are remembered") == count)  # noqa: B023
                # What is open goes on, and so do names.
                assert await it.try_(partial(os.pread, held.fileno(), 10_000, 0), SLACK_S) == DATA["dir/02"]
                await it.check_known()
                limit_s = PATIENCE_S + NOTICED_S + SLACK_S
                assert await it.read("dir/unknown", limit_s) == errno.ETIMEDOUT
            (data / "dir/04").write_bytes(b"changed meanwhile")
            (data / "dir/05").unlink()
            await it.cluster.start_master()

            def is_fresh() -> bool:
                return not (it.root / "dir/05").exists() and (it.root / "dir/04").read_bytes() == b"changed meanwhile"

            await it.until(is_fresh)
            assert await it.read("dir/03") == DATA["dir/03"]


async def test_a_server_of_the_mount_that_dies_with_the_master(tmp_path: Path, data: Path) -> None:
    async with scene(tmp_path, data.as_uri()) as it:
        with (it.root / "dir/02").open("rb", buffering=0) as held:
            # Neither notices that the other one is gone.
            it.cluster.stop("master")
            pid = await trio.to_thread.run_sync(kill, "mount-server", it.root)
            await it.cluster.kill("master")
            await expired()
            await trio.to_thread.run_sync(partial(wait_for, "mount-server", it.root, other_than=pid))
            assert await it.try_(partial(os.pread, held.fileno(), 10_000, 0), SLACK_S) == DATA["dir/02"]
            # Names are known to nobody any more.
            assert await it.read("dir/03", PATIENCE_S + NOTICED_S + SLACK_S) == errno.ETIMEDOUT
            assert it.said("names of an earlier server are remembered") == 0
            await it.cluster.start_master()
            await it.until(lambda: (it.root / "dir/03").exists())
            await it.check_known()


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_without_the_worker(tmp_path: Path, data: Path, how: str) -> None:
    async with scene(tmp_path, data.as_uri()) as it:
        cluster = it.cluster
        if how == "killed":
            await cluster.kill("a")
        else:
            cluster.stop("a")
        await it.check_known()
        # It takes 4 s to see that one hangs.
        assert await it.read("cold/1", PATIENCE_S + HANGS_S + SLACK_S) == errno.ETIMEDOUT
        await it.check_known()
        assert it.value("cachefs_worker_away_seconds") > 0
        assert it.value("cachefs_worker_outages_total") == 1
        assert it.readiness()[0] == 200
        assert "degraded: no worker has answered for" in it.readiness()[1]
        state = "away" if how == "killed" else "silent"
        await it.until(lambda: metrics(cluster.processes["master"])[f"cachefs_workers state={state}"] == 1)
        status, told, _ = await it.report()
        assert (status, troubles(told)) == (
            0,
            {("worker", "away" if how == "killed" else "connected, and silent")},
        )
        if how == "killed":
            await cluster.start_worker("a", "--http", "127.0.0.1:0")
        else:
            cluster.go_on("a")

        await it.until(lambda: (it.root / "cold/1").read_bytes() == DATA["cold/1"])
        assert it.value("cachefs_worker_away_seconds") == 0
        await it.until(lambda: it.readiness() == (200, "ready\n"))


async def test_through_another_worker(tmp_path: Path, data: Path) -> None:
    async with scene(tmp_path, data.as_uri(), workers=("a", "b")) as it:
        await it.cluster.kill("a")
        await it.check_known()
        for name in COLD:
            assert await it.read(name, PATIENCE_S + 20) == DATA[name]
        assert it.value("cachefs_worker_away_seconds") == 0
        assert troubles((await it.report())[1]) == {("worker", "away")}


async def test_through_another_worker_while_that_of_the_node_hangs(tmp_path: Path, data: Path) -> None:
    async with scene(tmp_path, data.as_uri(), workers=("a", "b")) as it:
        it.cluster.stop("a")
        try:
            began = time.monotonic()
            assert await it.read("cold/0", 30) == DATA["cold/0"]
            # Before its master misses it, after 10 s.
            assert time.monotonic() - began < HANGS_S + 4
            assert it.said("worker does not answer, reading through another name=a") == 1
            began = time.monotonic()
            assert await it.read("cold/2") == DATA["cold/2"]
            assert time.monotonic() - began < 2
        finally:
            it.cluster.go_on("a")
        assert it.value("cachefs_worker_outages_total") == 1
        assert it.value("cachefs_worker_away_seconds") == 0


async def test_a_slow_store_is_no_worker_that_hangs(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put(DATA)
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = {**s3_bucket.options, "endpoint_url": store.endpoint}
        async with scene(tmp_path, s3_bucket.url, workers=("a", "b"), ufs_options=options) as it:
            store.delay_s = 10.0
            began = time.monotonic()
            try:
                assert await it.read("cold/0", 60) == DATA["cold/0"]
            finally:
                store.delay_s = 0.0
            assert time.monotonic() - began > 9
            assert it.value("cachefs_worker_outages_total") == 0
            assert it.said("reading through another") == 0
            # Nobody asked twice.
            assert len([path for method, path in store.requests if method == "GET" and "cold/0" in path]) == 1


async def test_without_master_and_worker(tmp_path: Path, data: Path) -> None:
    async with scene(tmp_path, data.as_uri()) as it:
        cluster = it.cluster
        cluster.stop("a")
        await cluster.kill("master")
        await expired()
        await it.check_known()
        # It hangs, and nobody is left who could say so.
        assert await it.read("cold/1", PATIENCE_S + 20) == errno.ETIMEDOUT
        # Known to be away, it is waited for no longer than was asked for.
        began = time.monotonic()
        assert await it.read("cold/2", PATIENCE_S + SLACK_S) == errno.ETIMEDOUT
        assert time.monotonic() - began < PATIENCE_S + NOTICED_S
        await it.check_known()
        status, told, _ = await it.report("--worker-socket", cluster.socket("a"))
        assert (status, troubles(told)) == (1, {("master", "does not answer"), ("worker", "does not answer")})
        await cluster.start_master()
        cluster.go_on("a")
        for process in ("a", "mount"):
            await it.until(partial(lambda process: it.readiness(process) == (200, "ready\n"), process))
        assert await it.read("cold/1", PATIENCE_S + SLACK_S) == DATA["cold/1"]


async def test_without_the_under_store(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put(DATA)
    with running_faulty_s3(s3_bucket.server.endpoint) as store:
        options = {**s3_bucket.options, "endpoint_url": store.endpoint, "deadline": "1"}
        async with scene(tmp_path, s3_bucket.url, ufs_options=options) as it:
            for method in ("GET", "HEAD"):
                store.inject("internal-error", method=method, times=10**9)
            await expired()
            await it.check_known()
            assert await it.read("cold/2") == errno.EIO
            await it.check_known()
            # It looks again behind everybody's back.
            failing = "cachefs_under_store_failing_seconds path=/"
            await it.until(lambda: metrics(it.cluster.processes["master"])[failing] > 0)
            status, told, _ = await it.report()
            assert (status, troubles(told)) == (0, {("under-store", "fails")})
            of_worker = [each for each in told["troubles"] if "(worker a)" in each["name"]]  # type: ignore[attr-defined]
            assert len(of_worker) == 1 and of_worker[0]["for_s"] > 0 and of_worker[0]["error"]
            assert len(told["troubles"]) == 2  # type: ignore[arg-type]
            shown = metrics(it.cluster.processes["a"])
            values = [value for name, value in shown.items() if name.startswith("cachefs_under_store_failing")]
            assert len(values) == 1 and values[0] > 0
            of_master = metrics(it.cluster.processes["master"])
            assert of_master[failing] > 0
            assert of_master["cachefs_under_store_failures_total path=/"] > 0
            status, text = it.readiness("a")
            assert status == 200 and text.startswith("ready\ndegraded: the under-store")
            # Whoever may look at that is not to learn names of files.
            assert "cold" not in text and "dir" not in text
            assert it.cluster.log("master").count("under-store fails, serving what is known") == 1
            assert it.cluster.log("a").count("under-store fails, what is cached goes on") == 1

            store.forget()
            s3_bucket.put({"dir/00": b"changed meanwhile"})
            await it.until(lambda: (it.root / "dir/00").read_bytes() == b"changed meanwhile")
            assert await it.read("cold/2") == DATA["cold/2"]
            assert it.cluster.log("master").count("under-store answers again") == 1
            assert (await it.report())[1]["troubles"] == []


def test_patience_is_checked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cachefs", "mount", str(tmp_path), "--master", "127.0.0.1:1", "--insecure"]
    done = subprocess.run([*command, "--patience", "2h"], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "--patience: '7200s' is not accepted; expected 0 to 1h" in done.stderr
