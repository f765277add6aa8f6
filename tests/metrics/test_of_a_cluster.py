"""Numbers of a cluster at work: those of its parts add up to what was read."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from cachefs.client import Client
from cachefs.meta import MetaStore
from cachefs.metrics import Monitor
from cachefs.model import MiB
from cachefs.policy import Promote
from cachefs.store import Store, Tier, TierConfig, TierState
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.wire.control import BlockTask, JobSpec
from cachefs.worker.tasks import Tasks

FILES = {f"{number}": random.Random(number).randbytes(PAGE // 2 + number) for number in range(4)}
LARGE = random.Random(9).randbytes(6 * PAGE + 123)


@asynccontextmanager
async def cluster_of(tmp_path: Path, **worker: object) -> AsyncIterator[tuple[TestCluster, Client]]:
    root = tmp_path / "data"
    root.mkdir()
    for name, content in {**FILES, "large": LARGE}.items():
        (root / name).write_bytes(content)
    # The files were made just now; they are read at once, or each test would wait for two seconds.
    at_once = {"settle": "0"}
    async with (
        running_cluster(tmp_path, root.as_uri(), ufs_options=at_once, worker=worker) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client


async def shown(monitor: Monitor) -> dict[str, float]:
    """By name and labels, as they are written; a request is counted a moment after its answer has come."""
    await trio.testing.wait_all_tasks_blocked()
    return {
        each.name + "".join(f" {key}={value}" for key, value in sorted(each.labels.items())): each.value
        for family in text_string_to_metric_families(monitor.text().decode())
        for each in family.samples
    }


async def ready(monitor: Monitor) -> tuple[int, str]:
    status, _, body = await monitor.answer("/readyz") or (0, "", b"")
    return status, body.decode()


async def test_bytes_by_source_are_the_bytes_that_were_read(tmp_path: Path) -> None:
    async with cluster_of(tmp_path, files_ahead=0) as (cluster, client):
        monitor = cluster.monitors["worker"]
        size = sum(map(len, FILES.values())) + len(LARGE)
        attrs = [await client.metadata.resolve(f"/{name}") for name in (*FILES, "large")]
        for attr in attrs:
            assert await client.promote(attr.ino)
        cold = await shown(monitor)
        assert cold["cachefs_read_bytes_total source=under_store"] == size
        assert cold["cachefs_read_bytes_total source=local"] == 0
        assert (cold["cachefs_hits_total"], cold["cachefs_misses_total"]) == (0, len(attrs))
        assert cold["cachefs_blocks_sealed_total"] == len(attrs) == cold["cachefs_tier_blocks kind=ssd tier=0"]
        for attr in attrs:
            reader = client.open_content(attr)
            assert len(await reader.read(0, attr.size_bytes)) == attr.size_bytes
            reader.close()
        warm = await shown(monitor)
        assert warm["cachefs_read_bytes_total source=under_store"] == size
        assert warm["cachefs_read_bytes_total source=local"] == size
        assert (warm["cachefs_hits_total"], warm["cachefs_misses_total"]) == (len(attrs), len(attrs))

        reads = {kind: warm[f"cachefs_under_store_read_seconds_count kind={kind}"] for kind in ("file", "range")}
        assert reads == {"file": len(FILES), "range": 7}
        assert sum(reads.values()) == warm["cachefs_reads_total source=under_store"]
        assert warm["cachefs_request_seconds_count operation=Promote"] == len(attrs)
        assert warm["cachefs_request_seconds_bucket le=+Inf operation=Promote"] == len(attrs)
        assert warm["cachefs_request_errors_total operation=Promote"] == 0
        assert warm["cachefs_fetch_slots queue=demand"] == cluster.worker_config.demand_slots
        assert all(warm[f"cachefs_fetches_{state} queue=demand"] == 0 for state in ("running", "waiting"))


async def test_the_tier_is_shown_as_it_is(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), MiB)
    async with cluster_of(tmp_path, files_ahead=0, tiers=(tier,), promote=Promote.NEVER) as (cluster, client):
        attr = await client.metadata.resolve("/0")
        assert not await client.promote(attr.ino)
        reader = client.open_content(attr)
        assert bytes(await reader.read(0, attr.size_bytes)) == FILES["0"]
        reader.close()
        found = await shown(cluster.monitors["worker"])
    of = " kind=ssd tier=0"
    assert found[f"cachefs_tier_capacity_bytes{of}"] == MiB == found[f"cachefs_tier_free_bytes{of}"]
    assert found[f"cachefs_tier_used_bytes{of}"] == found[f"cachefs_tier_blocks{of}"] == 0
    assert found[f"cachefs_evictions_total{of}"] == 0
    assert found["cachefs_admissions_refused_total"] >= 1


async def test_the_state_of_a_tier_is_one_of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster_of(tmp_path) as (cluster, _):
        for state in TierState:

            def told(self: Store, tier: Tier, state: TierState = state) -> TierState:
                return state

            monkeypatch.setattr(Store, "state", told)
            found = await shown(cluster.monitors["worker"])
            values = {each: found[f"cachefs_tier_state kind=ssd state={each} tier=0"] for each in TierState}
            assert values == {each: each is state for each in TierState}


async def test_what_a_worker_sends_to_others_is_counted(tmp_path: Path) -> None:
    async with cluster_of(tmp_path, files_ahead=0) as (cluster, client):
        address = cluster.worker_address
        attr = await client.metadata.resolve("/0")
        assert await client.promote(attr.ino)
        async with cluster.client(worker_socket=None, worker_address=address) as outside:
            reader = outside.open_content(attr)
            assert bytes(await reader.read(0, attr.size_bytes)) == FILES["0"]
            reader.close()
        found = await shown(cluster.monitors["worker"])
    assert (found["cachefs_served_bytes_total"], found["cachefs_served_reads_total"]) == (len(FILES["0"]), 1)
    assert found["cachefs_peer_failures_total"] == found["cachefs_drops_total"] == 0


async def test_what_workers_have_yet_to_do_for_a_job_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_begin = trio.Event()
    do = Tasks._do

    async def later(self: Tasks, task: BlockTask) -> None:
        await may_begin.wait()
        await do(self, task)

    monkeypatch.setattr(Tasks, "_do", later)
    async with cluster_of(tmp_path) as (cluster, client):

        async def until(jobs: int, tasks: int) -> None:
            with trio.fail_after(60):
                while True:
                    found = await shown(cluster.monitors["master"])
                    if (found["cachefs_jobs_running"], found["cachefs_tasks_waiting"]) == (jobs, tasks):
                        return
                    await trio.sleep(0.01)

        await until(0, 0)
        await client.start_job(JobSpec("load", ["/"]))
        await until(1, len(FILES) + 1)
        may_begin.set()
        await until(0, 0)


@pytest.mark.expect_warnings("the database fails")
async def test_what_cannot_be_counted_is_counted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, failures = MetaStore.replica_totals, 3

    def failing(self: MetaStore) -> dict[str, tuple[int, int]]:
        nonlocal failures
        if failures:
            failures -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return count(self)

    monkeypatch.setattr(MetaStore, "replica_totals", failing)
    monkeypatch.setattr("cachefs.master.metrics.COUNTED_EVERY_S", 0.01)
    async with cluster_of(tmp_path, files_ahead=0) as (cluster, client):
        assert await client.promote((await client.metadata.resolve("/0")).ino)
        with trio.fail_after(60):
            while (await shown(cluster.monitors["master"])).get("cachefs_worker_blocks worker=worker") != 1:
                await trio.sleep(0.01)
    assert failures == 0


async def test_the_master_counts_what_it_is_asked(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as (cluster, client):
        with trio.fail_after(60):
            # The client asks in the background to be told of changes.
            while (before := await shown(cluster.monitors["master"]))["cachefs_watchers"] != 1:
                await trio.sleep(0.01)
        assert before["cachefs_workers_connected"] == before["cachefs_under_stores"] == 1
        assert before["cachefs_under_stores_failing"] == before["cachefs_served_stale_total"] == 0
        for name in FILES:
            await client.metadata.lookup((await client.metadata.resolve("/")).ino, name)
        after = await shown(cluster.monitors["master"])
        assert after["cachefs_request_seconds_count operation=Lookup"] == len(FILES)
        assert after["cachefs_request_seconds_count operation=ResolvePath"] == len(FILES)
        assert after["cachefs_inodes_total"] > len(FILES)
        assert await client.metadata.lookup((await client.metadata.resolve("/")).ino, "not there") is None
        assert (await shown(cluster.monitors["master"]))["cachefs_request_errors_total operation=Lookup"] == 0


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_worker_without_its_master_is_not_ready_and_alive(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as (cluster, _):
        worker = cluster.monitors["worker"]
        assert await ready(worker) == (200, "ready\n")
        assert await ready(cluster.monitors["master"]) == (200, "ready\n")
        await cluster.stop("master")
        with trio.fail_after(60):
            while (await ready(worker))[0] == 200:
                await trio.sleep(0.01)
        assert await ready(worker) == (503, "it is not registered with the master\n")
        assert (await shown(worker))["cachefs_registered"] == 0
        assert (await worker.answer("/healthz") or ())[::2] == (200, b"ok\n")
        await cluster.start_master()
        with trio.fail_after(60):
            while await ready(worker) != (200, "ready\n"):
                await trio.sleep(0.01)
