"""Readers of a real mount while system calls on the files of one of two tiers fail."""

from __future__ import annotations

import errno
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cachefs.fuse import probe
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.failing_files import Call, Faults
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import PAGE, Host, RealCluster, real_cluster
from tests.cli.test_http import metrics

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

LIMIT_S = 400
DATA = {
    # Of three pages, which are filled page by page, and of one, which is written and sealed in one go.
    f"{number:03}": random.Random(number).randbytes((2 * PAGE if number % 2 else 3000) + number)
    for number in range(160)
}


class Scene:
    def __init__(self, cluster: RealCluster, mountpoint: Path, tiers: tuple[Path, Path]) -> None:
        self.cluster = cluster
        self.root = mountpoint
        self.failing, self.other = tiers
        self.unread: Iterator[str] = iter(DATA)
        self.was_read: list[str] = []

    async def check(self, *names: str) -> None:
        for name in names:
            found = await trio.to_thread.run_sync((self.root / name).read_bytes, abandon_on_cancel=True)
            assert found == DATA[name], name

    async def read_new(self) -> str:
        name = next(self.unread)
        await self.check(name)
        self.was_read.append(name)
        return name

    def sealed(self, tier: Path) -> dict[int, tuple[int, int]]:
        """Size, which each has of its own -> what tells its file from another one that has it."""
        paths = [path for path in tier.glob("sealed/??/*") if path.suffix != SUMS_SUFFIX]
        return {each.st_size: (each.st_ino, each.st_mtime_ns) for each in (path.stat() for path in paths)}

    async def until_new_ones_are_kept(self, tier: Path) -> None:
        while True:
            size = len(DATA[await self.read_new()])
            with trio.move_on_after(10):  # one of which the writing failed is kept nowhere
                while not any(size in self.sealed(each) for each in (self.failing, self.other)):
                    await trio.sleep(0.02)
            if size in self.sealed(tier):
                return

    async def state(self, tier: Path) -> str:
        (found,) = [each.state for each in (await self.cluster.status("a")).tiers if each.path == str(tier)]
        return found

    async def until_reported(self, *states: str) -> None:
        """A person is told that the failing tier is in one of these, and of no other trouble; none: of no trouble. A
        worker that is slow to answer may be a trouble for a while.
        """
        while True:
            found = await self.reported()
            if bool(found) == bool(states) and found <= {(str(self.failing), state) for state in states}:
                return
            await trio.sleep(0.1)

    async def reported(self) -> set[tuple[str, str]]:
        """(path, state) of what is in trouble."""
        command = [sys.executable, "-m", "cachefs", "report", "--json", "--insecure"]
        command += ["--master", f"127.0.0.1:{self.cluster.port}"]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        troubles = json.loads(done.stdout)["troubles"]
        return {(each["name"].split()[0].removeprefix("ssd:"), each["state"]) for each in troubles}

    def shown(self, tier: Path) -> set[str]:
        """By the metrics: the states it is in, of which there is one."""
        values, number = metrics(self.cluster.processes["a"]), (self.failing, self.other).index(tier)
        start, end = "cachefs_tier_state kind=ssd state=", f" tier={number}"
        return {
            name.removeprefix(start).removesuffix(end)
            for name, value in values.items()
            if name.startswith(start) and name.endswith(end) and value == 1
        }


FAULTS: list[tuple[list[Call], str, int]] = [
    (["write"], "*", errno.EIO),
    (["write"], f"*{SUMS_SUFFIX}", errno.EIO),
    (["sync"], "*", errno.EIO),
    (["read"], f"*{SUMS_SUFFIX}", errno.EIO),
    (["change"], "*", errno.EROFS),
]
"""The calls that fail, of which files, and how: the last one is a disk that is read-only."""


async def test_each_way_in_which_files_of_a_tier_fail(tmp_path: Path, s3_bucket: Bucket) -> None:
    """One after the other. Nobody who reads notices, the other tier goes on and keeps what it has, it is seen from
    outside, and once it is over the tier is used again.
    """
    s3_bucket.put(DATA)
    faults, tiers = Faults(tmp_path / "faults"), (tmp_path / "failing", tmp_path / "other")
    with mountpoint_below(tmp_path) as mountpoint, trio.fail_after(LIMIT_S):
        async with real_cluster(tmp_path, s3_bucket.url, ufs_options=s3_bucket.options) as cluster:
            flags = [flag for tier in tiers for flag in ("--tier", f"ssd:{tier}:32M")]
            host = Host(prefix=faults.prefix)
            await cluster.start_worker("a", *flags, "--http", "127.0.0.1:0", host=host)
            await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"))
            it = Scene(cluster, mountpoint, tiers)
            for calls, pattern, code in FAULTS:
                await it.until_new_ones_are_kept(it.failing)
                await it.until_new_ones_are_kept(it.failing)
                held = it.sealed(it.other)
                with faults.failing(calls, f"{it.failing}/{pattern}", code):
                    while await it.state(it.failing) == "healthy":
                        if "read" not in calls:
                            await it.read_new()
                        # Else it is the scrub that finds it, as long as nothing is fetched.
                        await trio.sleep(0.05)
                    await it.check(*it.was_read)
                    if pattern == "*":
                        # What fails for some files only is well again as far as can be tried.
                        await it.until_reported("limited", "down")
                        assert it.shown(it.failing) <= {"limited", "down"}
                        await it.until_new_ones_are_kept(it.other)
                    assert it.shown(it.other) == {"healthy"}
                    assert held.items() <= it.sealed(it.other).items()
                while await it.state(it.failing) != "healthy":
                    await trio.sleep(0.1)
                await it.until_reported()
                await it.check(*it.was_read)
            await it.until_new_ones_are_kept(it.failing)
