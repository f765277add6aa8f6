"""Quotas in a master and workers that run, restart and lose each other, seen from inside."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from cachefs.client import Client
from cachefs.master import quotas as quotas_module
from cachefs.model import Attr, BlockId, CapacityError, ConfigError, MiB, NotADirectory, NotFoundError
from cachefs.net import Answer, Peer
from cachefs.policy import Promote
from cachefs.store import Quotas as StoreQuotas
from cachefs.store import Rule, TierConfig, idle, tier_quotas
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.wire.control import GetJob, JobInfo, JobSpec, StartJob
from cachefs.wire.messages import Promote as PromoteRequest
from cachefs.wire.quotas import (
    ListQuotas,
    QuotaGrant,
    QuotaGrants,
    QuotaInfo,
    RemoveQuota,
    ReportQuotas,
    SetQuota,
)
from cachefs.worker import quotas as worker_quotas
from cachefs.worker import supply as supply_module
from cachefs.worker.peers import Peers

FILE = 6 * PAGE
TAKES = FILE + 4096
"""On a disk, with its checksums."""
BOUND = {f"bound/{number:02}": random.Random(number).randbytes(FILE) for number in range(12)}
OTHERS = {f"other/{number:02}": random.Random(-1 - number).randbytes(FILE) for number in range(6)}


@asynccontextmanager
async def scene(
    tmp_path: Path, promote: Promote = Promote.IF_SPACE, workers: int = 1, **worker: object
) -> AsyncIterator[tuple[TestCluster, list[Client], Path]]:
    """A client of each worker: the first is `worker`, others w1 and so on."""
    data = tmp_path / "data"
    for name, content in (BOUND | OTHERS).items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    settings = {
        "promote": promote,
        "tiers": (TierConfig("ssd", str(tmp_path / "tier"), 64 * MiB),),
        "files_ahead": 0,
        **worker,
    }
    async with running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=settings) as cluster:
        sockets = [cluster.worker_config.socket]
        for number in range(1, workers):
            sockets.append((await cluster.add_worker(f"w{number}")).socket)
        async with trio.open_nursery() as nursery:
            clients: list[Client] = []
            done = trio.Event()

            async def hold(socket: str, task_status: trio.TaskStatus[Client]) -> None:
                async with cluster.client(worker_socket=socket) as client:
                    task_status.started(client)
                    await done.wait()

            for socket in sockets:
                clients.append(await nursery.start(hold, socket))
            async with clients[0].load_metadata("/") as progress:
                async for _ in progress:
                    pass
            yield cluster, clients, data
            done.set()


async def attrs_of(client: Client, names: Iterable[str]) -> list[Attr]:
    return [await client.metadata.resolve(f"/{name}") for name in names]


async def read(client: Client, names: Iterable[str]) -> list[bool]:
    """Each as a mount would: local first, else through the worker. Which were kept; all are read right."""
    kept = []
    for name in names:
        attr = await client.metadata.resolve(f"/{name}")
        kept.append(await client.promote(attr.ino))
        assert b"".join([bytes(part) async for part in client.read_file(f"/{name}", PAGE)]) == (BOUND | OTHERS)[name]
    return kept


def sealed(client: Client, attrs: Iterable[Attr]) -> list[bool]:
    found = []
    for attr in attrs:
        fd = client.open_sealed(attr)
        if fd is not None:
            os.close(fd)
        found.append(fd is not None)
    return found


async def quota_of(client: Client, path: str = "/bound") -> QuotaInfo:
    return next(each for each in (await client.ask(ListQuotas())).quotas if each.path == path)


async def used_is(client: Client, expected: int, path: str = "/bound") -> None:
    """Workers tell of it every second."""
    with trio.fail_after(60):
        while (await quota_of(client, path)).used_bytes != expected:
            await trio.sleep(0.01)


async def test_no_more_is_kept_than_the_quota_allows_and_everything_is_read(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, (client,), _):
        info = await client.ask(SetQuota("/bound", 5 * TAKES))
        assert (info.path, info.limit_bytes, info.used_bytes, info.unconfirmed) == ("/bound", 5 * TAKES, 0, [])
        assert await read(client, BOUND) == [True] * 5 + [False] * 7
        assert await read(client, OTHERS) == [True] * 6
        await used_is(client, 5 * TAKES)
        (refused,) = await attrs_of(client, list(BOUND)[-1:])
        reply = await client.view.ask_to_promote(refused.ino)
        assert (reply.sealed, reply.reason) == (False, "the quota of /bound, 1.9 MiB, is used up")
        status = await cluster.worker_status()
        assert status.tiers[0].blocks == 11 and status.counters.not_admitted >= 7
        with trio.fail_after(60):
            while (await quota_of(client)).refused < 7:
                await trio.sleep(0.01)
        # More is allowed, and no contents have to be told again for that.
        await client.ask(SetQuota("/bound", 7 * TAKES))
        with trio.fail_after(60):
            while sum(await read(client, BOUND)) < 7:
                pass
        assert sum(await read(client, BOUND)) == 7


async def test_with_always_a_path_works_as_a_cache_of_its_quota(tmp_path: Path) -> None:
    async with scene(tmp_path, Promote.ALWAYS) as (cluster, (client,), _):
        assert await read(client, OTHERS) == [True] * 6
        await client.ask(SetQuota("/bound", 4 * TAKES))
        for name in BOUND:
            # Each is kept, in the place of one of the same path.
            assert await read(client, [name]) == [True]
        attrs = await attrs_of(client, BOUND)
        assert sum(sealed(client, attrs)) == 4 and sealed(client, attrs)[-1]
        assert all(sealed(client, await attrs_of(client, OTHERS)))
        await used_is(client, 4 * TAKES)
        assert (await cluster.worker_status()).tiers[0].evictions == 8


async def test_blocks_of_large_files_and_files_ahead_are_bounded_too(tmp_path: Path) -> None:
    async with scene(tmp_path, files_ahead=4) as (cluster, (client,), data):
        large = random.Random("large").randbytes(3 * BLOCK + PAGE)
        (data / "bound/large").write_bytes(large)
        await client.refresh("/bound")
        limit = 2 * (BLOCK + 4096) + TAKES
        await client.ask(SetQuota("/bound", limit))
        for _ in range(2):
            assert b"".join([bytes(part) async for part in client.read_file("/bound/large", PAGE)]) == large
            await read(client, BOUND)
            assert (await cluster.worker_status()).tiers[0].used_bytes <= limit
        with trio.fail_after(60):
            # Blocks are filled and sealed behind their readers, and what has no room is begun by nobody.
            while not (status := (await cluster.worker_status()).tiers[0]).blocks or status.reserved_bytes:
                await trio.sleep(0.01)
        assert 2 * BLOCK < status.used_bytes <= limit
        await used_is(client, status.used_bytes)


async def test_nothing_is_fetched_ahead_where_a_quota_is_used_up(tmp_path: Path) -> None:
    async with scene(tmp_path, files_ahead=16) as (cluster, (client,), data):
        for number in range(20):
            (data / f"bound/small{number}").write_bytes(bytes([number]) * PAGE)
        await client.refresh("/bound")
        await client.ask(SetQuota("/bound", 0))
        # In the order in which they are found, which is that of whoever reads a directory.
        attrs = await attrs_of(client, (f"bound/small{number}" for number in range(20)))
        attrs.sort(key=lambda attr: attr.ino)
        assert [await client.promote(attr.ino) for attr in attrs] == [False] * len(attrs)
        assert (await cluster.worker_status()).counters.under_store_bytes == 0
        await client.ask(SetQuota("/bound", 20 * TAKES))
        with trio.fail_after(60):
            while not all([await client.promote(attr.ino) for attr in attrs]):
                pass


async def test_what_is_idle_below_a_quota_makes_room_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_quotas, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(idle, "_EVERY_S", 0.0)
    async with scene(tmp_path) as (_, (client,), _):
        names = list(BOUND)
        await client.ask(SetQuota("/bound", 4 * TAKES))
        assert await read(client, [*names[:4], *OTHERS]) == [True] * 10
        assert await read(client, names[4:6]) == [False] * 2
        # It is as if nobody had read anything for long.
        now = time.monotonic
        monkeypatch.setattr(idle.time, "monotonic", lambda: now() + 10_000)
        assert await read(client, names[4:6]) == [True] * 2
        await used_is(client, 4 * TAKES)
        assert sum(sealed(client, await attrs_of(client, names[:4]))) == 2
        assert all(sealed(client, await attrs_of(client, OTHERS)))


async def test_what_is_idle_on_one_worker_makes_room_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_quotas, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(idle, "_EVERY_S", 0.0)
    async with scene(tmp_path, workers=2) as (_, clients, _):
        names = list(BOUND)
        await clients[0].ask(SetQuota("/bound", 4 * TAKES))
        assert await read(clients[0], names[:4]) == [True] * 4
        attrs = await attrs_of(clients[1], names[4:6])
        assert not any([await clients[1].promote(attr.ino) for attr in attrs])
        now = time.monotonic
        monkeypatch.setattr(idle.time, "monotonic", lambda: now() + 10_000)
        with trio.fail_after(60):
            while not all([await clients[1].promote(attr.ino) for attr in attrs]):
                await trio.sleep(0.05)
        assert sealed(clients[1], attrs) == [True] * 2
        assert sum(sealed(clients[0], await attrs_of(clients[0], names))) <= 2


async def test_three_workers_share_a_quota_and_never_go_over_it_together(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=3) as (cluster, clients, _):
        await clients[0].ask(SetQuota("/bound", 5 * TAKES))
        names = list(BOUND)[:8]
        async with trio.open_nursery() as nursery:
            for number, client in enumerate(clients):
                nursery.start_soon(read, client, names[3 * number :] + names[: 3 * number])
        held = [(await cluster.worker_status(name)).tiers[0].used_bytes for name in ("worker", "w1", "w2")]
        assert TAKES <= sum(held) <= 5 * TAKES, held
        # What one had been granted and did not use, others get: all of it is used in the end, and no more.
        with trio.fail_after(60):
            while (await quota_of(clients[0])).used_bytes < 5 * TAKES:
                for client in clients:
                    await read(client, names)
        held = [(await cluster.worker_status(name)).tiers[0].used_bytes for name in ("worker", "w1", "w2")]
        assert sum(held) == (await quota_of(clients[0])).used_bytes == 5 * TAKES


async def test_one_of_many_workers_that_alone_reads_gets_all_of_a_quota(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=3) as (_, clients, _):
        await clients[0].ask(SetQuota("/bound", 10 * TAKES))
        with trio.fail_after(60):
            while sum(await read(clients[1], BOUND)) < 10:
                pass
        await used_is(clients[0], 10 * TAKES)


async def test_first_copies_displace_duplicates_of_the_same_quota(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=2) as (_, clients, _):
        names = list(BOUND)
        assert await read(clients[0], names[:4]) == [True] * 4
        with trio.fail_after(60):
            while not await clients[0].holders((await attrs_of(clients[0], names[3:4]))[0], 0):
                await trio.sleep(0.01)
        assert await read(clients[1], names[:4]) == [True] * 4
        await clients[0].ask(SetQuota("/bound", 8 * TAKES))
        await used_is(clients[0], 8 * TAKES)
        # No room is left but that of second copies.
        with trio.fail_after(60):
            while True:
                for client in clients:
                    await read(client, names[:8])
                everything = await attrs_of(clients[0], names[:8])
                held = [sealed(client, everything) for client in clients]
                if all(map(any, zip(*held, strict=True))):
                    break
        await used_is(clients[0], 8 * TAKES)
        assert sum(map(sum, held)) == 8


async def test_nested_quotas_all_bind(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, (client,), data):
        for number in range(6):
            (data / "bound" / "inner").mkdir(exist_ok=True)
            (data / "bound" / "inner" / str(number)).write_bytes(BOUND[f"bound/{number:02}"])
        await client.refresh("/bound", recursive=True)
        inner = [f"bound/inner/{number}" for number in range(6)]
        await client.ask(SetQuota("/bound", 5 * TAKES))
        await client.ask(SetQuota("/bound/inner", 3 * TAKES))

        async def promoted(names: Iterable[str]) -> int:
            return sum([await client.promote(attr.ino) for attr in await attrs_of(client, names)])

        assert await promoted(inner) == 3
        assert await promoted(BOUND) == 2
        await used_is(client, 5 * TAKES)
        await used_is(client, 3 * TAKES, "/bound/inner")
        await client.ask(SetQuota("/bound/inner", 9 * TAKES))
        assert await promoted(inner) == 3, "the outer one is used up"
        # With the outer one gone, the inner one holds.
        await client.ask(RemoveQuota("/bound"))
        await client.ask(SetQuota("/bound/inner", 5 * TAKES))
        with trio.fail_after(60):
            while await promoted(inner) < 5:
                pass
        assert await promoted(BOUND) == len(BOUND) and await promoted(inner) == 5
        await client.ask(RemoveQuota("/bound/inner"))
        assert await promoted(inner) == 6 and (await client.ask(ListQuotas())).quotas == []


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_quota_outlives_restarts_and_is_not_exceeded_meanwhile(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=2) as (cluster, clients, _):
        client = clients[0]
        await client.ask(SetQuota("/bound", 6 * TAKES))
        assert sum(await read(client, list(BOUND)[:4])) == 4
        attrs = await attrs_of(client, list(BOUND)[:4])
        await cluster.stop("master")
        assert [await client.promote(attr.ino) for attr in attrs] == [True] * 4
        await cluster.start_master()
        with trio.fail_after(60):
            while not all(each.connected for each in (await client.master_status()).workers):
                await trio.sleep(0.01)
        with trio.fail_after(60):
            while (await quota_of(client)).used_bytes < 6 * TAKES:
                for each in clients:
                    await read(each, BOUND)
        assert (await quota_of(client)).used_bytes == 6 * TAKES
        assert (await quota_of(client)).limit_bytes == 6 * TAKES
        # What an earlier worker left counts as soon as it is back.
        await cluster.stop("w1")
        await cluster.start_again("w1")
        await used_is(client, 6 * TAKES)
        for each in clients:
            await read(each, BOUND)
        await used_is(client, 6 * TAKES)
        held = [(await cluster.worker_status(name)).tiers[0].used_bytes for name in ("worker", "w1")]
        assert sum(held) == 6 * TAKES


async def test_below_what_is_cached_nothing_new_is_kept_and_others_displace_it(tmp_path: Path) -> None:
    tiers = (TierConfig("ssd", str(tmp_path / "tier"), 12 * TAKES),)
    async with scene(tmp_path, tiers=tiers) as (_, (client,), _):
        names = list(BOUND)
        assert await read(client, names[:10]) == [True] * 10
        info = await client.ask(SetQuota("/bound", 4 * TAKES))
        assert info.used_bytes == 10 * TAKES
        assert await read(client, names) == [True] * 10 + [False] * 2
        # The tier has room for two; the next four take the place of what is beyond the quota. No more than that.
        assert await read(client, OTHERS) == [True] * 6
        await used_is(client, 6 * TAKES)
        assert sum(sealed(client, await attrs_of(client, BOUND))) == 6
        assert all(sealed(client, await attrs_of(client, OTHERS)))


async def test_with_always_a_path_that_is_over_its_quota_gets_below_it_by_being_read(tmp_path: Path) -> None:
    async with scene(tmp_path, Promote.ALWAYS) as (_, (client,), _):
        names = list(BOUND)
        assert await read(client, names[:10]) == [True] * 10
        await client.ask(SetQuota("/bound", 3 * TAKES))
        assert await read(client, names[10:]) == [True] * 2
        await used_is(client, 3 * TAKES)


async def test_what_appears_changes_and_goes_in_the_under_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas_module, "_RETOLD_AFTER_S", 0.05)
    async with scene(tmp_path) as (_, (client,), data):
        names = list(BOUND)
        await client.ask(SetQuota("/bound", 3 * TAKES))
        assert sum(await read(client, names[:3])) == 3
        # What is new counts from its first byte on, before workers are told anything again.
        (data / "bound/new").write_bytes(BOUND[names[0]])
        await client.refresh("/bound")
        (new,) = await attrs_of(client, ["bound/new"])
        assert not await client.promote(new.ino)
        # What was replaced counts no more, and its successor does.
        (data / names[0]).write_bytes(b"x" * FILE)
        await client.refresh("/bound")
        await used_is(client, 2 * TAKES)
        (changed,) = await attrs_of(client, names[:1])
        assert await client.promote(changed.ino) and not await client.promote(new.ino)
        await used_is(client, 3 * TAKES)
        # Renamed elsewhere, they are other contents for the cache, and bound by nothing.
        (data / names[1]).rename(data / "other/renamed")
        await client.refresh("/", recursive=True)
        await used_is(client, 2 * TAKES)
        (renamed,) = await attrs_of(client, ["other/renamed"])
        assert await client.promote(renamed.ino)
        await used_is(client, 2 * TAKES)
        # The directory as a whole goes and comes back: the quota holds again.
        (data / "bound").rename(tmp_path / "away")
        await client.refresh("/")
        await used_is(client, 0)
        assert not (await quota_of(client)).exists
        (tmp_path / "away").rename(data / "bound")
        await client.refresh("/")
        async with client.load_metadata("/") as progress:
            async for _ in progress:
                pass
        assert (await quota_of(client)).exists
        await used_is(client, 2 * TAKES)


async def test_pins_and_quotas_have_to_fit_each_other(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, (client,), _):
        await client.ask(SetQuota("/bound", 4 * TAKES))
        with pytest.raises(CapacityError, match=r"/bound, which has a quota of 1\.5 MiB\. Nothing was changed"):
            await client.pin(["/bound"])
        with pytest.raises(CapacityError, match="pinned below /bound"):
            await client.pin(["/"])
        three = [f"/{name}" for name in list(BOUND)[:3]]
        await client.pin(three)
        with pytest.raises(CapacityError, match=r"/bound: 1\.1 MiB on disk are pinned there"):
            await client.ask(SetQuota("/bound", 2 * TAKES))
        with pytest.raises(CapacityError, match="pinned there"):
            await client.ask(SetQuota("/", TAKES))
        assert (await quota_of(client)).limit_bytes == 4 * TAKES
        # What is pinned goes before what is not, within the quota too.
        assert sum(await read(client, list(BOUND)[3:7])) == 4
        assert await read(client, list(BOUND)[:3]) == [True] * 3
        await used_is(client, 4 * TAKES)
        assert sealed(client, await attrs_of(client, list(BOUND)[:3])) == [True] * 3


async def test_a_load_of_more_than_a_quota_says_so_and_loads_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=2) as (_, clients, _):
        client = clients[0]
        await client.ask(SetQuota("/bound", 6 * TAKES))

        async def ended(spec: JobSpec) -> JobInfo:
            info = await client.ask(StartJob(spec))
            with trio.fail_after(60):
                while not info.ended_ns:
                    await trio.sleep(0.02)
                    info = await client.ask(GetJob(info.job_id))
            return info

        info = await ended(JobSpec("load", ["/"]))
        assert info.state == "failed" and info.counts.copies == 0
        ((_, reason),) = info.failures
        assert reason.startswith("/bound has a quota of 2.3 MiB; 12 files of 4.5 MiB that were to be loaded there take")
        some = [f"/{name}" for name in list(BOUND)[:3]]
        assert (await ended(JobSpec("load", some, replicas=3 - 1))).state == "done"
        await used_is(client, 6 * TAKES)
        with pytest.raises(CapacityError, match="in 2 copies"):
            await client.ask(StartJob(JobSpec("load", ["/bound"], replicas=2), dry_run=True))
        # Used up by what nobody may evict for it: each file that is not kept says why.
        info = await ended(JobSpec("load", [f"/{name}" for name in list(BOUND)[6:8]], promote="if-space", replicas=2))
        assert info.failures
        for _, reason in info.failures:
            assert "the quota of /bound, 2.3 MiB, is used up" in reason


async def test_a_worker_is_drained_though_a_quota_is_used_up(tmp_path: Path) -> None:
    async with scene(tmp_path, workers=2) as (_, clients, _):
        client = clients[0]
        await client.ask(SetQuota("/bound", 4 * TAKES))
        with trio.fail_after(60):
            while sum(await read(clients[1], BOUND)) < 4:
                pass
        await used_is(client, 4 * TAKES)
        info = await client.ask(StartJob(JobSpec("drain", workers=["w1"])))
        with trio.fail_after(60):
            while not info.ended_ns:
                await trio.sleep(0.02)
                info = await client.ask(GetJob(info.job_id))
        assert (info.state, info.counts.failed, info.counts.copies) == ("done", 0, 4)
        await used_is(client, 4 * TAKES)
        assert sum(sealed(client, await attrs_of(client, BOUND))) == 4


async def test_bad_requests_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas_module, "MOST_QUOTAS", 1)
    async with scene(tmp_path) as (_, (client,), _):
        for path, error in (("/nowhere", NotFoundError), ("/bound/00", NotADirectory), ("bound", ConfigError)):
            with pytest.raises(error, match=path):
                await client.ask(SetQuota(path, 5))
        with pytest.raises(NotFoundError, match="no quota of its own; no directory above it has one"):
            await client.ask(RemoveQuota("/bound"))
        await client.ask(SetQuota("/", 5))
        with pytest.raises(ConfigError, match="at most 1 quotas"):
            await client.ask(SetQuota("/bound", 5))
        with pytest.raises(NotFoundError, match="no quota of its own; it lies below /, which has one"):
            await client.ask(RemoveQuota("/bound"))
        # The same again is no change, and another limit is one.
        assert (await client.ask(SetQuota("/", 5))).limit_bytes == 5
        info = await client.ask(SetQuota("/", 6))
        assert (info.limit_bytes, (await client.ask(RemoveQuota("/", dry_run=True))).limit_bytes) == (6, 6)
        assert await client.ask(ListQuotas()) is not None and (await quota_of(client, "/")).limit_bytes == 6
        assert (await client.ask(RemoveQuota("/"))).unconfirmed == []
        assert (await client.ask(ListQuotas())).quotas == []


async def small_files(client: Client, data: Path, number: int) -> tuple[list[str], list[Attr]]:
    """Of one page each."""
    for each in range(number):
        (data / f"bound/small{each:02}").write_bytes(bytes([each]) * PAGE)
    await client.refresh("/bound")
    names = [f"bound/small{each:02}" for each in range(number)]
    return names, await attrs_of(client, names)


async def test_no_reader_and_no_home_waits_for_a_used_up_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    async def wait(follower: worker_quotas.QuotaFollower, needs: object) -> None:
        waited.append(needs)

    monkeypatch.setattr(worker_quotas.QuotaFollower, "wait", wait)
    async with scene(tmp_path, workers=3) as (cluster, clients, data):
        # A rest of half a file is always left, to one worker or another.
        await clients[0].ask(SetQuota("/bound", 12 * (PAGE + 4096) + PAGE // 2))
        names, attrs = await small_files(clients[0], data, 24)
        with trio.fail_after(60):
            for _ in range(2):
                for client in clients:
                    for name, attr in zip(names, attrs, strict=True):
                        await client.promote(attr.ino)
                        parts = [bytes(part) async for part in client.read_file(f"/{name}", PAGE)]
                        assert b"".join(parts) == bytes([names.index(name)]) * PAGE
        held = [(await cluster.worker_status(name)).tiers[0].used_bytes for name in ("worker", "w1", "w2")]
        assert 0 < sum(held) <= 12 * (PAGE + 4096) and not waited


async def test_a_reader_does_not_wait_with_a_load_that_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = trio.Event(), trio.Event()

    async def wait(follower: worker_quotas.QuotaFollower, needs: object) -> None:
        waiting.set()
        await go_on.wait()

    async with scene(tmp_path) as (_, (client,), data):
        await client.ask(SetQuota("/bound", 4 * TAKES))
        assert await read(client, list(BOUND)[:4]) == [True] * 4
        (small,), _ = await small_files(client, data, 1)
        monkeypatch.setattr(worker_quotas.QuotaFollower, "wait", wait)
        with trio.fail_after(60):
            for name in (small, "bound/04"):
                waiting = trio.Event()
                await client.ask(StartJob(JobSpec("load", [f"/{name}"], promote="if-space")))
                await waiting.wait()
                reply = await client.view.ask_to_promote((await client.metadata.resolve(f"/{name}")).ino)
                assert (reply.sealed, reply.reason) == (False, "the quota of /bound, 1.5 MiB, is used up")
                assert [bytes(part) async for part in client.read_file(f"/{name}", PAGE)]
                # That is not why it is not kept here.
                ino = (await client.metadata.resolve(f"/{name}")).ino
                reply = (await client.view._ask_worker(PromoteRequest(ino, "never"))).message
                assert (reply.sealed, reply.reason) == (False, "")
            go_on.set()


async def test_a_home_that_refused_is_not_asked_again_at_once_and_counts_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply_module, "_REFUSED_S", 10_000.0)
    asked, refusing = list[tuple[str, BlockId]](), set[int]()
    read_from, refused = Peers.read, StoreQuotas.refused

    async def note_read(self: Peers, name: str, block: BlockId, *rest: Any) -> Any:
        if rest[2] == "home":
            asked.append((name, block))
        return await read_from(self, name, block, *rest)

    def note_refused(self: StoreQuotas, quotas: Iterable[int]) -> None:
        refusing.add(id(self))
        refused(self, quotas)

    async with scene(tmp_path, workers=3) as (_, (client, *_), data):
        await client.ask(SetQuota("/bound", 0))
        names, _ = await small_files(client, data, 4)
        monkeypatch.setattr(Peers, "read", note_read)
        monkeypatch.setattr(StoreQuotas, "refused", note_refused)
        for _ in range(3):
            for name in names:
                assert [bytes(part) async for part in client.read_file(f"/{name}", PAGE)]
        assert len(names) <= len(asked) == len(set(asked)) <= 2 * len(names)
        assert len(refusing) == 1, "the one that the readers are on"


class Master:
    """It has nothing to give, and says that there may be something soon."""

    def __init__(self) -> None:
        self.asked = 0
        self.hangs = False
        self.limit_bytes = 0

    async def call(self, request: ReportQuotas) -> Answer[QuotaGrants]:
        wanted = sum(use.wanted_bytes for use in request.uses)
        self.asked += bool(wanted)
        await trio.sleep(math.inf if self.hangs else 0.01)
        return Answer(QuotaGrants([QuotaGrant(1, self.limit_bytes, wanted > self.limit_bytes)]))


def follower_of(master: Master) -> worker_quotas.QuotaFollower:
    follower = worker_quotas.QuotaFollower()
    follower.quotas.put_in_force({1: Rule("/a", 100, 0)})
    follower._peer, follower._counts = cast(Peer, master), True
    return follower


async def _many_wait() -> None:
    master = Master()
    follower = follower_of(master)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(follower.wait, {1: 10})
        await trio.sleep(1)
        before = master.asked
        await follower.grow({1: 10})
        # What a reader asks is asked after one of theirs at most.
        assert master.asked <= before + 2 and trio.current_time() - began < 1.1
    waited_s = trio.current_time() - began
    assert worker_quotas._PATIENT_S <= waited_s < worker_quotas._PATIENT_S + 1
    assert master.asked <= 1 + waited_s / worker_quotas._PAUSE_S + 1
    # It was in vain: for some time nobody does so again, unless it helps.
    began = trio.current_time()
    await follower.wait({1: 10})
    assert trio.current_time() - began < 0.1
    master.limit_bytes = 10
    await trio.sleep(1)
    await follower.wait({1: 10})
    assert follower.quotas.lacking(1, 10) == 0


def test_of_many_who_wait_one_asks_and_readers_do_not_queue_behind_them() -> None:
    trio.run(_many_wait, clock=trio.testing.MockClock(autojump_threshold=0))


async def _silence() -> None:
    master = Master()
    follower, master.hangs = follower_of(master), True
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(follower.grow, {1: 10})
            nursery.start_soon(follower.wait, {1: 10})
    for _ in range(20):
        await trio.sleep(1)
        await follower.grow({1: 10})
    assert master.asked == 1 and trio.current_time() - began < 20 + 2 * worker_quotas._ANSWER_TIMEOUT_S
    assert not follower.can_grow
    # What is told it every second finds that it answers.
    master.hangs, master.limit_bytes = False, 10
    await follower._exchange()
    assert follower.can_grow and follower.quotas.lacking(1, 10) == 0


def test_a_master_that_hangs_holds_readers_up_once() -> None:
    trio.run(_silence, clock=trio.testing.MockClock(autojump_threshold=0))
