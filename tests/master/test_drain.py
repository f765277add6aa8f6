"""A drain waits for what its worker was filling when it began: that is the only copy, as soon as it is sealed."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.master import work
from cachefs.net import Hello, open_peer
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.wire.cluster import RegisterWorker, ReportBlocks, Unsettled
from cachefs.wire.control import GetJob, JobInfo, JobSpec
from cachefs.worker import master_link

pytestmark = pytest.mark.anyio

FILES = {name: random.Random(name).randbytes(6 * PAGE) for name in ("slow", "looked-at")}
EARLY = 2


async def until(client: Client, job: JobInfo, so: Callable[[JobInfo], bool]) -> JobInfo:
    with trio.fail_after(60):
        while not so(info := await client.ask(GetJob(job.job_id))):
            await trio.sleep(0.02)
    return info


class Scene:
    """`w2` is to be drained; its under-store stops after the first pages of /slow."""

    def __init__(self, cluster: TestCluster, client: Client, store: FaultyS3) -> None:
        self.cluster = cluster
        self.client = client
        """Of w2."""
        self.store = store

    async def read(self, path: str, length: int) -> bytes:
        reader = self.client.open_content(await self.client.metadata.resolve(path))
        try:
            return b"".join([bytes(await reader.read(at, PAGE)) for at in range(0, length, PAGE)])
        finally:
            reader.close()

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[None]:
        """While somebody waits for the rest of /slow, which stalls. It has to come before the end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.read, "/slow", len(FILES["slow"]))
            await trio.to_thread.run_sync(self.store.wait_stalled, abandon_on_cancel=True)
            while (await self.cluster.worker_status("w2")).counters.pages_fetched < EARLY:
                await trio.sleep(0.02)
            yield

    async def drain(self) -> JobInfo:
        return await self.client.start_job(JobSpec("drain", workers=["w2"]))

    async def until(self, job: JobInfo, so: Callable[[JobInfo], bool]) -> JobInfo:
        return await until(self.client, job, so)

    async def state(self) -> str:
        return {info.name: info.state for info in (await self.client.master_status()).workers}["w2"]

    async def sealed_there(self) -> int:
        return sum(tier.blocks for tier in (await self.cluster.worker_status("w2")).tiers)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten reports in the time of one."""
    monkeypatch.setattr(master_link, "REPORT_EVERY_S", 0.1)
    monkeypatch.setattr(work, "_REPORTED_S", 0.15)


@asynccontextmanager
async def scene(tmp_path: Path, bucket: Bucket) -> AsyncIterator[Scene]:
    bucket.put(FILES)
    with running_faulty_s3(bucket.server.endpoint) as store, trio.fail_after(60):
        options = bucket.options | {"endpoint_url": store.endpoint}
        async with running_cluster(tmp_path, bucket.url, ufs_options=options) as cluster:
            config = await cluster.add_worker("w2")
            async with cluster.client(worker_socket=config.socket) as client:
                store.inject("stall", part="/slow", after=EARLY, times=1000)
                yield Scene(cluster, client, store)


async def test_what_is_under_way_when_it_begins_is_moved_too(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as each:
        async with each.filling():
            # Of a partial that nobody fills, nothing is waited for.
            assert await each.read("/looked-at", PAGE) == FILES["looked-at"][:PAGE]
            job = await each.until(await each.drain(), lambda info: bool(info.waits_for or info.ended_ns))
            assert (job.state, job.waits_for) == ("running", "worker w2, with blocks under way: 1")
            assert (await each.state(), await each.sealed_there()) == ("draining", 0)
            each.store.forget()
            each.store.release()
        job = await each.until(job, lambda info: bool(info.ended_ns))
        assert (job.state, job.counts.failed, job.counts.copies) == ("done", 0, 1)
        assert (await each.state(), await each.sealed_there()) == ("drained", 1)
        moved = await each.client.metadata.resolve("/slow")
        while await each.client.holders(moved, 0) != ["w2", "worker"]:
            await trio.sleep(0.02)
        # Nor is that partial gone on with: what is read here is kept by the other one.
        assert await each.read("/looked-at", 6 * PAGE) == FILES["looked-at"]
        attr = await each.client.metadata.resolve("/looked-at")
        while await each.client.holders(attr, 0) != ["worker"]:
            await trio.sleep(0.02)
        assert await each.sealed_there() == 1


async def test_what_does_not_go_on_ends_the_drain_and_is_told(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_STALLED_S", 2.0)
    async with scene(tmp_path, s3_bucket) as each, each.filling():
        job = await each.until(await each.drain(), lambda info: bool(info.ended_ns))
        assert (job.state, job.counts.failed, job.waits_for) == ("done", 1, "")
        assert job.failures == [("w2", "waited 2 s for worker w2, with blocks under way: 1")]
        assert await each.state() == "draining"
        each.store.release()


async def test_a_worker_that_goes_away_is_not_waited_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_SETTLED_S", 0.5)
    async with running_cluster(tmp_path, tmp_path.as_uri()) as cluster, cluster.client() as client:
        async with open_peer(cluster.master_address, Hello("worker", name="w3")) as peer:
            epoch = (await peer.call(RegisterWorker("w3", "127.0.0.1:1", "", "boot"))).message.epoch
            await peer.call(ReportBlocks(epoch, [], [], full=True))
            job = await client.start_job(JobSpec("drain", workers=["w3"]))
            job = await until(client, job, lambda info: bool(info.waits_for))
            assert job.waits_for == "worker w3, to say that it takes no new blocks"
            await peer.call(ReportBlocks(epoch, [], [], unsettled=Unsettled(2, 3 * PAGE)))
            job = await until(client, job, lambda info: info.waits_for.endswith("w3, with blocks under way: 2"))
        job = await until(client, job, lambda info: bool(info.ended_ns))
        assert (job.state, job.counts.failed) == ("done", 0)
