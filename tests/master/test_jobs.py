"""Jobs over a real cluster: what they copy, drop and move, and that they go on whatever is restarted meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.model import ConfigError, ContentKey, MiB, NotFoundError
from cachefs.net import Hello, Peer, open_peer
from cachefs.store import TierConfig
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.wire.cluster import AskDrops, HeldBlock, RegisterWorker, ReportBlocks, ReportReply
from cachefs.wire.control import (
    BlockTask,
    CancelJob,
    ForgetWorker,
    GetJob,
    JobCounts,
    JobInfo,
    JobSpec,
    ListJobs,
    StartJob,
    TaskEnd,
    UndrainWorker,
)
from cachefs.wire.messages import Free, GetMasterStatus
from cachefs.worker.blocks import Blocks
from cachefs.worker.tasks import Tasks

pytestmark = pytest.mark.anyio

SMALL = {f"small/{number:02}": random.Random(number).randbytes(PAGE // 4 + number) for number in range(30)}
LARGE = {"large": random.Random("l").randbytes(5 * PAGE + 3), "blocks": random.Random("b").randbytes(2 * BLOCK + 5)}
FILES = {**SMALL, **LARGE, "empty": b""}
BLOCKS = len(SMALL) + 1 + 3
TOTAL = sum(map(len, FILES.values()))


@dataclass
class Scene:
    cluster: TestCluster
    client: Client
    data: Path

    async def start(self, kind: str, *paths: str, **more: object) -> JobInfo:
        spec = JobSpec(kind, list(paths), **more)  # type: ignore[arg-type]
        return await self.client.start_job(spec)

    async def end(self, job: JobInfo) -> JobInfo:
        return await self.until(job, lambda info: bool(info.ended_ns))

    async def until(self, job: JobInfo, so: Callable[[JobInfo], bool]) -> JobInfo:
        with trio.fail_after(60):
            while not so(info := await self.client.ask(GetJob(job.job_id))):
                await trio.sleep(0.02)
        return info

    async def holders(self) -> list[list[str]]:
        """Of each block of each file."""
        found = []
        for name, content in FILES.items():
            attr = await self.client.metadata.resolve(f"/{name}")
            blocks = -(-len(content) // BLOCK)
            found += [await self.client.holders(attr, index) for index in range(blocks)]
        return found

    async def until_held(self, copies: int) -> list[list[str]]:
        """By so many workers each, as they report."""
        with trio.fail_after(60):
            while True:
                found = await self.holders()
                if all(len(each) == copies for each in found):
                    return found
                await trio.sleep(0.05)

    async def under_store_bytes(self) -> int:
        names = ["worker", *self.cluster.workers]
        return sum([(await self.cluster.worker_status(name)).counters.under_store_bytes for name in names])

    async def read_all(self, **client: object) -> None:
        async with self.cluster.client(**client) as other:
            for name, content in FILES.items():
                got = b"".join([bytes(part) async for part in other.read_file(f"/{name}", 100_000)])
                assert got == content, name


@asynccontextmanager
async def scene(tmp_path: Path, *names: str, capacity: int = 64 * MiB) -> AsyncIterator[Scene]:
    data = tmp_path / "data"
    for name, content in FILES.items():
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    worker = {"tiers": (TierConfig("ssd", str(tmp_path / "tier"), capacity),), "scrub_bytes_per_s": 0}
    async with running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=worker) as cluster:
        for name in names:
            await cluster.add_worker(name)
        async with cluster.client() as client:
            yield Scene(cluster, client, data)


async def test_a_job_spreads_files_and_copies_them_as_often_as_is_asked(tmp_path: Path) -> None:
    async with scene(tmp_path, "w2", "w3") as each:
        would = await each.client.ask(StartJob(JobSpec("load", ["/"]), dry_run=True))
        assert (would.job_id, would.counts.copies, would.counts.copied_bytes) == (0, BLOCKS, TOTAL)
        assert await each.under_store_bytes() == 0
        job = await each.end(await each.start("load", "/", "/small"))
        assert (job.state, job.failures) == ("done", [])
        assert job.counts == JobCounts(len(FILES), TOTAL, len(FILES), TOTAL, 0, BLOCKS, TOTAL)
        found = await each.until_held(1)
        assert {name for (name,) in found} == {"worker", "w2", "w3"}
        # Each byte left the under-store once, also for the second copies.
        job = await each.end(await each.start("load", "/", replicas=2))
        assert (job.state, job.counts.copies, job.counts.present) == ("done", BLOCKS, 0)
        assert await each.under_store_bytes() == TOTAL
        await each.until_held(2)
        job = await each.end(await each.start("load", "/", replicas=2))
        assert (job.counts.copies, job.counts.present) == (0, BLOCKS)
        # All of it on one that is named.
        job = await each.end(await each.start("load", "/", workers=["w2"]))
        assert job.counts.copies + job.counts.present == BLOCKS
        with trio.fail_after(60):
            while not all("w2" in names for names in await each.holders()):
                await trio.sleep(0.05)
        assert await each.under_store_bytes() == TOTAL
        listed = await each.client.ask(ListJobs())
        assert [info.job_id for info in listed.jobs] == [1, 2, 3, 4]
        await each.read_all()


async def test_what_cannot_be_is_refused_before_it_begins(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        with pytest.raises(ConfigError, match=r"--replicas.*at most 1"):
            await each.start("load", "/", replicas=2)
        with pytest.raises(ConfigError, match=r"nobody.*one of worker"):
            await each.start("load", "/", workers=["nobody"])
        with pytest.raises(NotFoundError, match="nowhere"):
            await each.start("load", "/nowhere")
        with pytest.raises(NotFoundError, match="no job 7"):
            await each.client.ask(GetJob(7))
        with pytest.raises(ConfigError, match="a worker that is away"):
            await each.client.ask(ForgetWorker("worker"))


async def test_files_that_fail_are_counted_and_named(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        await each.client.ask(StartJob(JobSpec("load", ["/"]), dry_run=True))
        (each.data / "large").unlink()
        job = await each.end(await each.start("load", "/"))
        assert (job.state, job.counts.failed, job.counts.done) == ("done", 1, len(FILES) - 1)
        ((path, reason),) = job.failures
        assert path == "/large"
        assert "changed or removed" in reason


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_load_goes_on_after_the_master_is_restarted(tmp_path: Path) -> None:
    async with scene(tmp_path, "w2") as each:
        # Slow enough to be in the middle of it.
        job = await each.start("load", "/", limit_bytes_per_s=2 * MiB)
        await each.until(job, lambda info: info.counts.copies >= 3)
        await each.cluster.stop("master")
        await each.cluster.start_master()
        ended = await each.end(job)
        assert (ended.state, ended.counts.failed, ended.counts.done) == ("done", 0, len(FILES))
        assert ended.counts.done_bytes == ended.counts.total_bytes == TOTAL
        # What was there already was not fetched again, but for what was under way.
        assert await each.under_store_bytes() < 2 * TOTAL
        await each.until_held(1)
        await each.read_all()


async def test_the_tasks_of_a_worker_that_ends_are_done_by_others(tmp_path: Path) -> None:
    async with scene(tmp_path, "w2", "w3") as each:
        job = await each.start("load", "/", limit_bytes_per_s=2 * MiB)
        await each.until(job, lambda info: info.counts.copies >= 3)
        await each.cluster.stop("w2")
        ended = await each.end(job)
        assert (ended.state, ended.counts.failed, ended.counts.done) == ("done", 0, len(FILES))


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        job = await each.start("load", "/", limit_bytes_per_s=1000)
        await each.until(job, lambda info: info.state == "running")
        cancelled = await each.client.ask(CancelJob(job.job_id))
        assert cancelled.state == "cancelled"
        with pytest.raises(ConfigError, match="this one is cancelled"):
            await each.client.ask(CancelJob(job.job_id))
        await each.cluster.stop("master")
        await each.cluster.start_master()
        again = await each.client.ask(GetJob(job.job_id))
        assert (again.state, again.counts) == ("cancelled", cancelled.counts)


async def test_free_drops_it_everywhere_but_what_is_pinned_or_in_use(tmp_path: Path) -> None:
    async with scene(tmp_path, "w2") as each:
        await each.end(await each.start("load", "/", replicas=2))
        await each.until_held(2)
        await each.client.pin(["/small/00"])
        with pytest.raises(ConfigError, match="not pinned"):
            await each.start("free", "/small/00")
        would = await each.client.start_job(JobSpec("free", ["/"]), dry_run=True)
        assert (would.counts.drops, would.counts.pinned) == (2 * BLOCKS - 2, 2)
        async with each.cluster.client() as reader:
            large = await reader.metadata.resolve("/large")
            fd = reader.open_sealed(large)
            assert fd is not None
            job = await each.end(await each.start("free", "/"))
            assert (job.state, job.counts.failed) == ("done", 0)
            assert (job.counts.drops, job.counts.pinned, job.counts.in_use) == (2 * BLOCKS - 3, 2, 1)
        assert sorted(p.name for p in each.data.iterdir()) == ["blocks", "empty", "large", "small"]
        os.close(fd)
        await each.read_all()


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_drained_worker_leaves_its_last_copies_to_others(tmp_path: Path) -> None:
    async with scene(tmp_path, "w2", "w3") as each:
        await each.end(await each.start("load", "/", workers=["w2"]))
        await each.until_held(1)
        would = await each.client.start_job(JobSpec("drain", workers=["w2"]), dry_run=True)
        assert would.counts.copies == BLOCKS
        job = await each.start("drain", workers=["w2"])
        # The master that is restarted meanwhile goes on with it.
        await each.cluster.stop("master")
        await each.cluster.start_master()
        ended = await each.end(job)
        assert (ended.state, ended.failures) == ("done", [])
        states = {info.name: info.state for info in (await each.client.master_status()).workers}
        assert states == {"worker": "active", "w2": "drained", "w3": "active"}
        loaded = await each.under_store_bytes()
        await each.cluster.stop("w2")
        shutil.rmtree(each.data)
        each.data.mkdir()
        # Nothing but the copies is left of it.
        await each.read_all()
        assert loaded == TOTAL
        await each.client.ask(ForgetWorker("w2"))
        # Should it come back, it is one that is new.
        await each.cluster.start_again("w2")
        states = {info.name: info.state for info in (await each.client.master_status()).workers}
        assert states["w2"] == "active"
        # Forgotten before anybody noticed that it is away.
        await each.cluster.stop("w2")
        with trio.fail_after(60):
            while (await each.client.ask(GetMasterStatus())).workers[0].connected:
                await trio.sleep(0.02)
        await each.client.ask(ForgetWorker("w2"))
        # The master looks twice a second who died.
        await trio.sleep(0.6)
        assert [info.name for info in (await each.client.master_status()).workers] == ["w3", "worker"]


@pytest.mark.expect_warnings("a worker is asked for what does not fit")
async def test_what_fits_nowhere_stays_where_it_is_and_is_told(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        await each.cluster.add_worker("w2", tiers=(TierConfig("ssd", str(tmp_path / "w2.tier"), MiB),))
        await each.end(await each.start("load", "/", workers=["worker"]))
        await each.until_held(1)
        job = await each.end(await each.start("drain", workers=["worker"]))
        assert job.counts.failed >= 3
        assert "room" in job.failures[0][1]
        states = {info.name: info.state for info in (await each.client.master_status()).workers}
        assert states["worker"] == "draining"
        assert all(names for names in await each.holders())
        # It takes nothing new, until that is taken back.
        async with each.cluster.client() as client:
            (attr,) = [await client.metadata.resolve("/large")]
            await client.worker.call(Free([(attr.key, 0)]))
            assert not await client.promote(attr.ino)
            await each.client.ask(UndrainWorker("worker"))
            with trio.fail_after(60):
                while not await client.promote(attr.ino):
                    await trio.sleep(0.05)


async def test_what_a_draining_worker_holds_counts_no_more_for_others(tmp_path: Path) -> None:
    async with scene(tmp_path) as each, AsyncExitStack() as stack:
        held, epochs, peers = HeldBlock(ContentKey(b"k" * 16), 0, 5), dict[str, int](), dict[str, Peer]()
        for name in ("x", "y"):
            peer = peers[name] = await stack.enter_async_context(
                open_peer(each.cluster.master_address, Hello("worker", name=name))
            )
            epochs[name] = (await peer.call(RegisterWorker(name, "127.0.0.1:1", "", "boot", MiB))).message.epoch
            await peer.call(ReportBlocks(epochs[name], [held], [], full=True))
        block = (held.key, held.block_index)

        async def standing() -> ReportReply:
            return (await peers["x"].call(ReportBlocks(epochs["x"], [], []))).message

        assert (await standing()).shared == [block]
        await each.start("drain", workers=["y"])
        assert (await standing()).sole == [block]
        assert (await peers["x"].call(AskDrops([block]))).message.blocks == []
        # The other way round: what the one that goes holds as well may go.
        assert (await peers["y"].call(AskDrops([block]))).message.blocks == [block]
        await peers["y"].call(ReportBlocks(epochs["y"], [held], []))
        await each.client.ask(UndrainWorker("y"))
        assert (await standing()).shared == [block]
        assert (await peers["x"].call(AskDrops([block]))).message.blocks == [block]


async def test_without_a_worker_it_is_told_what_would_be_done_and_nothing_waits(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        await each.client.ask(StartJob(JobSpec("load", ["/"]), dry_run=True))
        await each.cluster.stop("worker")
        with trio.fail_after(60):
            while any(info.connected for info in (await each.client.master_status()).workers):
                await trio.sleep(0.02)
            would = await each.client.start_job(JobSpec("load", ["/"]), dry_run=True)
        assert would.counts.copies == 0 and would.counts.failed >= len(SMALL)


async def test_a_worker_that_ends_closes_nothing_before_its_tasks_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they do in threads goes on for a while."""
    working, go, order = trio.Event(), threading.Event(), []
    close = Blocks.close

    async def do(tasks: Tasks, task: BlockTask) -> tuple[TaskEnd, int, str]:
        working.set()
        await trio.to_thread.run_sync(go.wait, 60)
        order.append("done")
        return "done", 0, ""

    monkeypatch.setattr(Tasks, "_done", do)
    monkeypatch.setattr(Blocks, "close", lambda blocks: (order.append("closed"), close(blocks)))
    async with scene(tmp_path) as each:
        job = await each.start("load", "/large")
        await working.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(each.cluster.stop, "worker")
            with trio.move_on_after(0.5):
                while not order:
                    await trio.sleep(0.01)
            go.set()
        await each.client.ask(CancelJob(job.job_id))
    assert order[-1] == "closed" and order.count("closed") == 1 and "done" in order


async def test_a_list_of_jobs_is_short_however_many_paths_they_have(tmp_path: Path) -> None:
    async with scene(tmp_path) as each:
        paths = ["/large"] * 50
        job = await each.start("load", *paths, limit_bytes_per_s=1000)
        (listed,) = (await each.client.ask(ListJobs())).jobs
        assert 0 < len(listed.spec.paths) < 50
        assert (await each.client.ask(GetJob(job.job_id))).spec.paths == paths
        await each.client.ask(CancelJob(job.job_id))
