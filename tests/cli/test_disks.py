"""Readers of a real mount while the disk of their worker's tier fails, or the worker is killed at its busiest."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from cachefs.fuse import probe
from cachefs.model import CachefsError, MiB
from cachefs.net import UnixAddress, open_peer
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.disks import small_disk, unreadable, why_no_disks
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import PAGE, RealCluster, real_cluster
from cachefs.wire import Hello
from cachefs.wire.messages import Verify

pytestmark = [
    pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse"),
    pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks())),
]

OLD = {f"old{number}": random.Random(number).randbytes(8 * PAGE + number) for number in range(6)}
NEW = {f"new{number}": random.Random(-number - 1).randbytes(8 * PAGE + number) for number in range(24)}
DATA = OLD | NEW
LIMIT_S = 180


class Scene:
    def __init__(self, cluster: RealCluster, mountpoint: Path, disk: Path) -> None:
        self.cluster = cluster
        self.root = mountpoint
        self.disk = disk

    async def check(self, *names: str) -> None:
        """They can be read, each from a handle of its own, and are right."""
        for name in names:
            found = await trio.to_thread.run_sync((self.root / name).read_bytes, abandon_on_cancel=True)
            assert found == DATA[name], name

    def sealed(self) -> set[int]:
        """The sizes of what is sealed: each file has one of its own."""
        paths = (self.disk / "tier/sealed").glob("??/*")
        return {path.stat().st_size for path in paths if path.suffix != SUMS_SUFFIX}

    async def until_sealed(self, *names: str) -> None:
        while not {len(DATA[name]) for name in names} <= self.sealed():
            await trio.sleep(0.02)

    async def state(self) -> str:
        return (await self.cluster.status("a")).tiers[0].state

    async def until_state(self, *states: str) -> None:
        while await self.state() not in states:
            await trio.sleep(0.1)


@asynccontextmanager
async def scene(tmp_path: Path, size_bytes: int = 64 * MiB) -> AsyncIterator[Scene]:
    """The six old ones are kept."""
    (tmp_path / "data").mkdir()
    for name, content in DATA.items():
        (tmp_path / "data" / name).write_bytes(content)
    with small_disk(tmp_path, size_bytes) as disk, mountpoint_below(tmp_path) as mountpoint:
        with trio.fail_after(LIMIT_S):
            async with real_cluster(tmp_path, (tmp_path / "data").as_uri(), ufs_options={"settle": "0"}) as cluster:
                await cluster.start_worker("a", "--tier", f"ssd:{disk / 'tier'}:32M")
                await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"))
                it = Scene(cluster, mountpoint, disk)
                await it.check(*OLD)
                await it.until_sealed(*OLD)
                yield it


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True, capture_output=True)


@asynccontextmanager
async def remounted_read_only(disk: Path) -> AsyncIterator[None]:
    """The file system itself, once nothing on it is open for writing: also for those who have directories open."""
    while True:
        try:
            await trio.to_thread.run_sync(remount, disk, "ro")
            break
        except subprocess.CalledProcessError:
            await trio.sleep(0.02)
    try:
        yield
    finally:
        remount(disk, "rw")


async def test_a_disk_that_becomes_read_only_and_is_writable_again(tmp_path: Path) -> None:
    """Nobody notices, and nothing is restarted: what is there is read on, what is not is read through."""
    async with scene(tmp_path) as it:
        new = iter(NEW)
        held = (it.root / "old0").open("rb", buffering=0)
        async with remounted_read_only(it.disk):
            while await it.state() == "healthy":
                await it.check(next(new))
            kept = it.sealed()
            await it.check(*OLD, next(new))
            assert it.sealed() == kept
            assert os.pread(held.fileno(), PAGE, PAGE) == DATA["old0"][PAGE : 2 * PAGE]
        await it.until_state("healthy")
        name = next(new)
        await it.check(name)
        await it.until_sealed(name)
        await it.check(*DATA)
        held.close()


async def test_a_disk_that_fails_to_read_what_is_kept(tmp_path: Path) -> None:
    """EIO from the medium, of a file that is sealed and nobody has open."""
    async with scene(tmp_path) as it:
        (file,) = [path for path in (it.disk / "tier/sealed").glob("??/*") if path.stat().st_size == len(DATA["old3"])]
        with unreadable(tmp_path, file):
            try:
                await it.check("old3")
            except OSError as error:
                # By passthrough the kernel reads by itself; whoever opens it next gets its bytes.
                assert error.errno == errno.EIO
            address = UnixAddress(str(it.cluster.socket("a")))
            async with open_peer(address, Hello("client")) as worker, worker.stream(Verify(repair=True)) as progress:
                async for _ in progress:
                    pass
            await it.check(*OLD)
        await it.until_state("healthy")
        await it.check(*DATA)


@pytest.mark.parametrize("during", ["fetch", "seal", "verify"])
async def test_a_worker_that_is_killed_serves_nothing_wrong_afterwards(tmp_path: Path, during: str) -> None:
    async with scene(tmp_path) as it:
        partials = it.disk / "tier/partial"

        async def work() -> None:
            with suppress(CachefsError):
                if during == "verify":
                    address = UnixAddress(str(it.cluster.socket("a")))
                    async with (
                        open_peer(address, Hello("client")) as worker,
                        worker.stream(Verify(repair=True)) as progress,
                    ):
                        async for _ in progress:
                            reached.set()
                else:
                    await it.check(*unread)
            done.set()

        reached, caught = trio.Event(), 0
        for number in range(3):
            # Each time others, that are not here yet.
            unread, done = list(NEW)[number * 8 : number * 8 + 8], trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work)
                before = len(it.sealed())
                if during == "fetch":
                    while not (list(partials.glob("??/*")) or done.is_set()):
                        await trio.lowlevel.checkpoint()
                elif during == "seal":
                    while len(it.sealed()) == before and not done.is_set():
                        await trio.lowlevel.checkpoint()
                else:
                    await reached.wait()
                caught += not done.is_set()
                await it.cluster.kill("a")
                await it.cluster.start_worker("a", "--tier", f"ssd:{it.disk / 'tier'}:32M")
        await it.check(*DATA)
        address = UnixAddress(str(it.cluster.socket("a")))
        damaged: list[str] = []
        async with open_peer(address, Hello("client")) as worker, worker.stream(Verify(repair=False)) as progress:
            async for each in progress:
                damaged += each.damaged
        assert damaged == [] and caught
