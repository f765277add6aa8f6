"""Readers of a real mount while their worker is killed in the middle of comparing what its tier holds."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from cachefs.fuse import probe
from cachefs.model import CachefsError, MiB
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.disks import small_disk, why_no_disks
from cachefs.testing.failing_files import Faults
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import Host, RealCluster, real_cluster

pytestmark = [
    pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse"),
    pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks())),
]

DATA = {f"file{number}": random.Random(number).randbytes(3 * MiB + number) for number in range(6)}
LIMIT_S = 120


class Scene:
    def __init__(self, cluster: RealCluster, mountpoint: Path, tier: Path, faults: Faults) -> None:
        self.cluster = cluster
        self.root = mountpoint
        self.tier = tier
        self.faults = faults

    async def start_worker(self) -> None:
        await self.cluster.start_worker("a", "--tier", f"ssd:{self.tier}:32M", host=Host(prefix=self.faults.prefix))

    async def check(self, *names: str) -> None:
        for name in names:
            found = await trio.to_thread.run_sync((self.root / name).read_bytes, abandon_on_cancel=True)
            assert found == DATA[name], name

    async def keep_checking(self, *names: str) -> None:
        """Until cancelled; whoever has to wait for the worker waits."""
        while True:
            await self.check(*names)

    def held(self, directory: str = "sealed") -> dict[str, Path]:
        """Name -> its file there."""
        names = {len(content): name for name, content in DATA.items()}
        paths = (self.tier / directory).glob("??/*")
        return {names[path.stat().st_size]: path for path in paths if path.suffix != SUMS_SUFFIX}

    def files(self) -> dict[str, tuple[int, int]]:
        """What tells the files of what is sealed from others: what was dropped and fetched again is another file."""
        found = {name: path.stat() for name, path in self.held().items()}
        return {name: (each.st_ino, each.st_mtime_ns) for name, each in found.items()}

    async def until_sealed(self) -> None:
        while set(self.held()) != set(DATA):
            await trio.sleep(0.05)

    async def kill_while_it_compares(self, directory: str) -> None:
        """It may be about to start yet."""
        with self.faults.stopping_while_it_compares(f"{self.tier / directory}/*"):
            while (pid := pid_of(self.cluster.socket("a"))) is None or not is_stopped(pid):
                await trio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)


def pid_of(socket: Path) -> int | None:
    """Of the worker with that socket."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if "worker" in words and str(socket) in words:
                return int(entry)
    return None


def is_stopped(pid: int) -> bool:
    try:
        return " (stopped)" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@asynccontextmanager
async def scene(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Scene]:
    """All of it is kept."""
    bucket.put(DATA)
    with small_disk(tmp_path, 48 * MiB) as disk, mountpoint_below(tmp_path) as mountpoint:
        with trio.fail_after(LIMIT_S):
            async with real_cluster(tmp_path, bucket.url, ufs_options=bucket.options) as cluster:
                it = Scene(cluster, mountpoint, disk / "tier", Faults(tmp_path / "faults"))
                await it.start_worker()
                await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"))
                await it.check(*DATA)
                await it.until_sealed()
                yield it


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(MiB)
        (byte,) = file.read(1)
        file.seek(MiB)
        file.write(bytes([byte ^ 1]))


async def test_killed_during_the_scrub(tmp_path: Path, s3_bucket: Bucket) -> None:
    """Again and again: nobody notices, nothing that is good goes, and in the end what is damaged is found."""
    async with scene(tmp_path, s3_bucket) as it:
        before = it.files()
        # The last one to be looked at by a scrub that begins.
        *good, bad = sorted(DATA, key=lambda name: it.held()[name])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.keep_checking, *good)
            for number in range(3):
                await it.kill_while_it_compares("sealed")
                await it.cluster.kill("a")
                assert {name: it.files()[name] for name in good} == {name: before[name] for name in good}
                assert bad in it.files()
                if number == 1:
                    # By passthrough the kernel reads it by itself: nobody does, until it was found.
                    damage(it.held()[bad])
                await it.start_worker()
            while bad in it.files():
                await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        assert "block dropped, it is damaged" in it.cluster.log("a")
        await it.check(*DATA)
        await it.until_sealed()
        after = it.files()
        assert {name: after[name] for name in good} == {name: before[name] for name in good}
        status = await it.cluster.status("a")
        assert status.counters.corrupt == 1 and status.counters.under_store_bytes == len(DATA[bad])


async def test_killed_while_it_verifies_what_is_of_an_earlier_boot(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as it:
        before = it.files()
        await it.cluster.kill("a")
        facts = it.tier / "tier.json"
        told = json.loads(facts.read_text())
        facts.write_text(json.dumps({**told, "boot_id": "of another boot"}))
        # The last one to be looked at.
        *good, bad = sorted(DATA, key=lambda name: it.held()[name])
        damage(it.held()[bad])

        async def start() -> None:
            with suppress(CachefsError):  # killed before it was ready
                await it.start_worker()

        async with trio.open_nursery() as reading:
            for number in range(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(start)
                    await it.kill_while_it_compares("suspect")
                if "a" in it.cluster.processes:
                    await it.cluster.kill("a")
                # Nothing is lost between the two, and what was not looked at counts for nothing.
                assert len(it.held("suspect")) + len(it.held()) == len(DATA) and bad in it.held("suspect")
                if number == 0:
                    # Also of what is damaged, by whatever way.
                    reading.start_soon(it.keep_checking, *DATA)
            await it.start_worker()
            while it.held("suspect"):
                await trio.sleep(0.05)
            await it.check(*DATA)
            reading.cancel_scope.cancel()
        await it.until_sealed()
        after = it.files()
        assert {name: after[name] for name in good} == {name: before[name] for name in good}
        assert after[bad] != before[bad]
        status = await it.cluster.status("a")
        assert status.counters.under_store_bytes == len(DATA[bad])
        assert "block dropped, it is damaged since the last boot" in it.cluster.log("a")
