"""Numbers of a cluster at work: those of its parts add up to what was read."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing
from prometheus_client.parser import text_string_to_metric_families

from cachefs.client import Client
from cachefs.metrics import Monitor
from cachefs.model import MiB
from cachefs.policy import Promote
from cachefs.store import TierConfig
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster

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


async def test_the_master_counts_what_it_is_asked(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as (cluster, client):
        before = await shown(cluster.monitors["master"])
        assert before["cachefs_workers_connected"] == before["cachefs_under_stores"] == before["cachefs_watchers"] == 1
        assert before["cachefs_under_stores_failing"] == before["cachefs_served_stale_total"] == 0
        for name in FILES:
            await client.metadata.lookup((await client.metadata.resolve("/")).ino, name)
        after = await shown(cluster.monitors["master"])
        assert after["cachefs_request_seconds_count operation=Lookup"] == len(FILES)
        assert after["cachefs_request_seconds_count operation=ResolvePath"] == len(FILES)
        assert after["cachefs_inodes_total"] > len(FILES)
        assert await client.metadata.lookup((await client.metadata.resolve("/")).ino, "not there") is None
        assert (await shown(cluster.monitors["master"]))["cachefs_request_errors_total operation=Lookup"] == 0


async def test_a_worker_without_its_master_is_not_ready_and_alive(tmp_path: Path) -> None:
    async with cluster_of(tmp_path) as (cluster, _):
        worker = cluster.monitors["worker"]
        assert await ready(worker) == (200, "ready\n")
        assert await ready(cluster.monitors["master"]) == (200, "ready\n")
        await cluster.stop("master")
        with trio.fail_after(10):
            while (await ready(worker))[0] == 200:
                await trio.sleep(0.01)
        assert await ready(worker) == (503, "it is not registered with the master\n")
        assert (await shown(worker))["cachefs_registered"] == 0
        assert (await worker.answer("/healthz") or ())[::2] == (200, b"ok\n")
        await cluster.start_master()
        with trio.fail_after(10):
            while await ready(worker) != (200, "ready\n"):
                await trio.sleep(0.01)
