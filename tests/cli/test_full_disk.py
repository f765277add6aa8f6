"""Readers of a real mount while the disk of their worker's tier, or of the master, is full."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.fuse import probe
from cachefs.model import KiB, MiB
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.disks import small_disk, why_no_disks
from cachefs.testing.fixtures import Bucket
from cachefs.testing.processes import mountpoint_below
from cachefs.testing.real_cluster import PAGE, RealCluster, real_cluster
from tests.cli.test_http import get

pytestmark = [
    pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse"),
    pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks())),
]

DATA = {
    # Filled page by page, and written and sealed in one go: more than there is room for.
    f"{number:02}": random.Random(number).randbytes((12 * PAGE if number % 3 else 9000) + number)
    for number in range(36)
}
KNOWN = list(DATA)[:6]
LIMIT_S = 120


class Scene:
    def __init__(self, cluster: RealCluster, mountpoint: Path, disk: Path) -> None:
        self.cluster = cluster
        self.root = mountpoint
        self.disk = disk
        self.rounds = 0

    async def check(self, *names: str) -> None:
        for name in names:
            found = await trio.to_thread.run_sync((self.root / name).read_bytes, abandon_on_cancel=True)
            assert found == DATA[name], name

    async def keep_checking(self, seed: int) -> None:
        """Until cancelled; each time in another order."""
        names, chance = list(DATA), random.Random(seed)
        while True:
            chance.shuffle(names)
            await self.check(*names)
            self.rounds += 1

    async def refused(self) -> int:
        return (await self.cluster.status("a")).counters.not_admitted

    async def evicted(self) -> int:
        return (await self.cluster.status("a")).tiers[0].evictions

    def files(self, directory: str) -> list[Path]:
        return [path for path in (self.disk / "tier" / directory).glob("??/*") if path.suffix != SUMS_SUFFIX]


@asynccontextmanager
async def scene(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Scene]:
    """The tier was promised four times what the disk has."""
    bucket.put(DATA)
    with small_disk(tmp_path, 16 * MiB) as disk, mountpoint_below(tmp_path) as mountpoint, trio.fail_after(LIMIT_S):
        async with real_cluster(tmp_path, bucket.url, ufs_options=bucket.options) as cluster:
            flags = ["--tier", f"ssd:{disk / 'tier'}:64M", "--promote", "always"]
            await cluster.start_worker("a", *flags)
            await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"))
            yield Scene(cluster, mountpoint, disk)


def take_what_is_left(file: Path) -> None:
    """As somebody else does who has the disk too."""
    with pytest.raises(OSError, match="No space left"), file.open("ab", 0) as theirs:
        while True:
            theirs.write(bytes(16 * KiB))


async def test_a_disk_that_is_full_again_and_again(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as it:
        theirs = it.disk / "theirs"
        async with trio.open_nursery() as nursery:
            for seed in range(3):
                nursery.start_soon(it.keep_checking, seed)
            for number in itertools.count():
                if number >= 4 and "No space left on device" in it.cluster.log("a"):
                    break
                # In the middle of whatever is being written.
                while not it.files("partial"):
                    await trio.sleep(0.001)
                refused = await it.refused()
                while await it.refused() < refused + 3:
                    await trio.to_thread.run_sync(take_what_is_left, theirs)
                theirs.unlink()
                # With room again it is kept again, and others go for it.
                evicted, rounds = await it.evicted(), it.rounds
                while not (await it.evicted() > evicted and it.rounds > rounds):
                    await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
        await it.check(*DATA)
        while it.files("partial"):
            await trio.sleep(0.05)  # what nobody waits for any more
        status = await it.cluster.status("a")
        (tier,) = status.tiers
        assert (tier.state, tier.partials, status.counters.corrupt) == ("healthy", 0, 0)
        whole = {len(content): content for content in DATA.values()}
        kept = it.files("sealed")
        assert kept and len(kept) == tier.blocks < len(DATA)
        for path in kept:
            assert path.read_bytes() == whole[path.stat().st_size]


async def test_the_disk_of_the_master_is_full(tmp_path: Path, s3_bucket: Bucket) -> None:
    """What is known is read on; what would have to be written down is an error, and nothing once there is room."""
    s3_bucket.put({name: DATA[name] for name in KNOWN} | {f"new/{name}": DATA[name] for name in KNOWN})
    with small_disk(tmp_path, 8 * MiB) as disk, mountpoint_below(tmp_path) as mountpoint, trio.fail_after(LIMIT_S):
        flags = ["--data-dir", disk / "master", "--http", "127.0.0.1:0"]
        async with real_cluster(
            tmp_path, s3_bucket.url, workers=["a"], ufs_options=s3_bucket.options, master_flags=flags
        ) as cluster:
            await cluster.start_mount("mount", mountpoint, "--worker-socket", cluster.socket("a"))
            it = Scene(cluster, mountpoint, disk)
            await it.check(*KNOWN)
            theirs = disk / "theirs"
            await trio.to_thread.run_sync(take_what_is_left, theirs)
            await it.check(*KNOWN)
            with pytest.raises(OSError, match="Input/output error"):
                await trio.to_thread.run_sync((mountpoint / "new" / KNOWN[0]).read_bytes, abandon_on_cancel=True)
            await it.check(*KNOWN)
            while get(cluster.processes["master"], "/readyz") != (
                503,
                "the database fails: database or disk is full\n",
            ):
                await trio.sleep(0.1)
            theirs.unlink()
            for name in KNOWN:
                path = mountpoint / "new" / name
                assert await trio.to_thread.run_sync(path.read_bytes, abandon_on_cancel=True) == DATA[name]
            await it.check(*KNOWN)
            while get(cluster.processes["master"], "/readyz") != (200, "ready\n"):
                await trio.sleep(0.1)
