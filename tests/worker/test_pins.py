"""Pins in a master and a worker that run, restart and lose each other, seen from inside."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.master import pins as pins_module
from cachefs.model import Attr, CapacityError, MiB
from cachefs.net import open_peer
from cachefs.policy import Promote
from cachefs.store import TierConfig
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.wire import Hello
from cachefs.wire.cluster import ReadBlock, RegisterWorker

KEPT = {f"keep/{number}": random.Random(number).randbytes(6 * PAGE) for number in range(5)}
OTHERS = {f"other/{number:02}": random.Random(-1 - number).randbytes(6 * PAGE) for number in range(12)}
CAPACITY = 5 * MiB // 2
"""Six of these files, and what belongs to them."""


@asynccontextmanager
async def scene(tmp_path: Path, **worker: object) -> AsyncIterator[tuple[TestCluster, Client, Path]]:
    data = tmp_path / "data"
    for name, content in (KEPT | OTHERS).items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    settings = {
        "promote": Promote.ALWAYS,
        "tiers": (TierConfig("ssd", str(tmp_path / "tier"), CAPACITY),),
        "files_ahead": 0,
        **worker,
    }
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=settings) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client, data


async def list_all(client: Client) -> None:
    async with client.load_metadata("/") as progress:
        async for _ in progress:
            pass


async def attrs_of(client: Client, names: Iterable[str]) -> list[Attr]:
    return [await client.metadata.resolve(f"/{name}") for name in names]


def sealed(client: Client, attrs: Iterable[Attr]) -> int:
    """How many of them are cached; nobody is asked for that."""
    count = 0
    for attr in attrs:
        fd = client.open_sealed(attr)
        if fd is not None:
            os.close(fd)
            count += 1
    return count


async def pinned_bytes(cluster: TestCluster) -> int:
    return (await cluster.worker_status()).tiers[0].pinned_bytes


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_pins_outlive_restarts_of_each_and_hold_while_the_master_is_away(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        await list_all(client)
        kept, others = await attrs_of(client, KEPT), await attrs_of(client, OTHERS)
        reply = await client.pin(["/keep"])
        assert (reply.files, reply.bytes, reply.unconfirmed) == (5, 30 * PAGE, [])
        for attr in (*kept, *others):
            assert await client.promote(attr.ino)
        assert sealed(client, kept) == 5 and 0 < sealed(client, others) < 12
        # What an earlier worker left is pinned before anything is evicted for the first file that is asked for.
        await cluster.stop("worker")
        await cluster.start_worker()
        for attr in others:
            assert await client.promote(attr.ino)
        assert sealed(client, kept) == 5
        await cluster.stop("master")
        for attr in others[::-1]:
            assert await client.promote(attr.ino)
        assert sealed(client, kept) == 5 and await pinned_bytes(cluster) > 30 * PAGE
        await cluster.start_master()
        with trio.fail_after(60):
            while not any(each.connected for each in (await client.master_status()).workers):
                await trio.sleep(0.01)
        (info,) = (await client.pins(sizes=False)).pins
        assert (info.path, info.exists) == ("/keep", True)
        assert (await client.unpin(["/keep"])).unconfirmed == []
        assert await pinned_bytes(cluster) == 0
        for attr in (*others, *others):
            assert await client.promote(attr.ino)
        assert sealed(client, kept) < 5


async def test_what_has_no_room_beside_pins_is_read_through_and_takes_nothing_away(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, data):
        content = random.Random("large").randbytes(10 * PAGE)
        (data / "large").write_bytes(content)
        kept = await attrs_of(client, KEPT)
        await list_all(client)
        await client.pin(["/keep"])
        small = await attrs_of(client, list(OTHERS)[:1])
        for attr in (*kept, *small):
            assert await client.promote(attr.ino)
        (large,) = await attrs_of(client, ["large"])
        assert not await client.promote(large.ino)
        assert b"".join([bytes(part) async for part in client.read_file("/large", PAGE)]) == content
        assert sealed(client, [*kept, *small]) == 6
        assert (await cluster.worker_status()).counters.not_admitted > 0


@pytest.mark.parametrize("pages", [1, 6])
async def test_what_is_pinned_goes_before_what_is_not_for_other_workers_too(tmp_path: Path, pages: int) -> None:
    async with scene(tmp_path, promote=Promote.IF_SPACE) as (cluster, client, data):
        content = random.Random("wanted").randbytes(pages * PAGE - 7)
        for name in ("keep/wanted", "other/wanted"):
            (data / name).write_bytes(content)
        fill = [*OTHERS, *(f"other/page{number}" for number in range(6))]
        for name in fill[len(OTHERS) :]:
            (data / name).write_bytes(bytes(PAGE))
        await list_all(client)
        for attr in await attrs_of(client, fill):
            await client.promote(attr.ino)
        before = sealed(client, await attrs_of(client, fill))
        assert len(OTHERS) > before > 6
        await client.pin(["/keep/wanted"])
        async with open_peer(cluster.worker_address, Hello("worker", "", client.cluster.namespace_id)) as peer:

            def asked(attr: Attr) -> ReadBlock:
                return ReadBlock(attr.key, 0, 0, min(PAGE, len(content)), "home", attr.ino)

            (kept, other) = await attrs_of(client, ["keep/wanted", "other/wanted"])
            with pytest.raises(CapacityError):
                await peer.call(asked(other))
            assert (await peer.call(asked(kept))).payload == content[:PAGE]
        with trio.fail_after(60):
            while not sealed(client, [kept]):
                await trio.sleep(0.01)
        assert sealed(client, await attrs_of(client, fill)) < before


async def test_every_block_of_a_pinned_content_stays(tmp_path: Path) -> None:
    tiers = (TierConfig("ssd", str(tmp_path / "tier"), 5 * MiB),)
    async with scene(tmp_path, tiers=tiers) as (cluster, client, data):
        huge = random.Random("huge").randbytes(2 * BLOCK + 5 * PAGE)
        (data / "huge").write_bytes(huge)
        assert b"".join([bytes(part) async for part in client.read_file("/huge", PAGE)]) == huge
        with trio.fail_after(60):
            while (await cluster.worker_status()).tiers[0].blocks < 3:
                await trio.sleep(0.01)
        await client.pin(["/huge"])
        assert await pinned_bytes(cluster) > len(huge)
        for attr in 2 * await attrs_of(client, OTHERS):
            assert await client.promote(attr.ino)
        with trio.fail_after(60):
            # The worker reports what it holds every second.
            while (await client.pins(sizes=True)).pins[0].cached_bytes < len(huge):
                await trio.sleep(0.01)
        assert await pinned_bytes(cluster) > len(huge)


async def test_a_pin_holds_again_when_what_was_gone_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins_module, "_RETOLD_AFTER_S", 0.05)
    async with scene(tmp_path) as (cluster, client, data):
        await list_all(client)
        await client.pin(["/keep"])
        for attr in await attrs_of(client, KEPT):
            assert await client.promote(attr.ino)
        before = await pinned_bytes(cluster)
        assert before > 30 * PAGE
        (data / "keep").rename(tmp_path / "away")
        await client.refresh("/")
        with trio.fail_after(60):
            while await pinned_bytes(cluster):
                await trio.sleep(0.01)
        (info,) = (await client.pins(sizes=True)).pins
        assert (info.exists, info.files) == (False, 0)
        (tmp_path / "away").rename(data / "keep")
        await client.refresh("/")
        # The names are new, the contents are not: nobody has to ask for them.
        await list_all(client)
        with trio.fail_after(60):
            while await pinned_bytes(cluster) < before:
                await trio.sleep(0.01)


async def test_a_worker_that_does_not_confirm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough for the other one, which confirms.
    monkeypatch.setattr(pins_module, "_CONFIRM_TIMEOUT_S", 3.0)
    async with scene(tmp_path) as (cluster, client, _):
        await list_all(client)
        async with open_peer(cluster.master_address, Hello("worker")) as silent:
            await silent.call(RegisterWorker("silent", "", "", "", 10 * MiB))
            reply = await client.pin(["/keep", "/other"])
            assert reply.unconfirmed == ["silent"] and reply.capacity_bytes == CAPACITY + 10 * MiB
        # Its tiers do not count any more; what is pinned stays so, and no more is.
        with trio.fail_after(60):
            while (await client.pins(sizes=False)).limit_bytes > CAPACITY:
                await trio.sleep(0.01)
        with pytest.raises(CapacityError, match="Nothing was changed"):
            await client.pin(["/"])
        assert (await client.unpin(["/keep"])).unconfirmed == []
        assert [each.path for each in (await client.pins(sizes=False)).pins] == ["/other"]
