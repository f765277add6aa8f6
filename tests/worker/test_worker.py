"""A worker over real sockets and a real directory: who fetches what, what is kept, and what goes wrong."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs.client import Client, ContentReader
from cachefs.model import Attr, BlockCorruptError, MiB, StaleError
from cachefs.policy import Promote
from cachefs.store import Partial, Store, TierConfig
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.wire import Connection, Hello, Kind
from cachefs.wire.messages import Fetch
from cachefs.worker.origin import Origin
from cachefs.worker.sources import Source

SMALL = random.Random(1).randbytes(PAGE // 2)
LARGE = random.Random(2).randbytes(10 * PAGE + 123)
HUGE = random.Random(3).randbytes(2 * BLOCK + 5 * PAGE + 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "small").write_bytes(SMALL)
    (root / "large").write_bytes(LARGE)
    (root / "huge").write_bytes(HUGE)
    (root / "empty").write_bytes(b"")
    return root


@asynccontextmanager
async def cluster_of(data: Path, tmp_path: Path, **worker: object) -> AsyncIterator[tuple[TestCluster, Client]]:
    # The files were made just now; they are read at once, or each test would wait for two seconds.
    at_once = {"settle": "0"}
    async with (
        running_cluster(tmp_path, data.as_uri(), ufs_options=at_once, worker=worker) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client


async def read_all(client: Client, attr: Attr, chunk: int = 50_000) -> bytes:
    reader = client.open_content(attr)
    try:
        return b"".join([bytes(await reader.read(offset, chunk)) for offset in range(0, attr.size_bytes, chunk)])
    finally:
        reader.close()


def sealed_bytes(client: Client, attr: Attr) -> bytes | None:
    fd = client.open_sealed(attr)
    if fd is None:
        return None
    try:
        return os.pread(fd, attr.size_bytes + 1, 0)
    finally:
        os.close(fd)


async def until_sealed(cluster: TestCluster, blocks: int) -> None:
    with trio.fail_after(60):
        while (await cluster.worker_status()).tiers[0].blocks < blocks:
            await trio.sleep(0.01)


async def test_promoting_seals_the_whole_content(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (_, client):
        for name, content in (("small", SMALL), ("large", LARGE)):
            attr = await client.metadata.resolve(f"/{name}")
            assert sealed_bytes(client, attr) is None
            assert await client.promote(attr.ino) is True
            assert sealed_bytes(client, attr) == content


async def test_many_who_want_the_same_cause_one_fetch(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.promote, attr.ino)
                nursery.start_soon(read_all, client, attr)
        counters = (await cluster.worker_status()).counters
        assert counters.under_store_bytes == len(LARGE) and counters.pages_fetched == 11
        assert counters.blocks_sealed == 1


async def test_a_small_file_is_not_fetched_as_a_whole_while_its_partial_is_made_for_a_reader(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, go_on, has_read = threading.Event(), threading.Event(), trio.Event()
    open_partial, read_files = Store.open_partial, Origin.read_files

    def slowly(store: Store, *args: Any) -> Partial | None:
        is_first = not made.is_set()
        partial = open_partial(store, *args)
        made.set()
        assert not is_first or go_on.wait(20)
        return partial

    async def after_the_reader(*args: Any) -> list[Exception | None]:
        await has_read.wait()
        return await read_files(*args)

    monkeypatch.setattr(Store, "open_partial", slowly)
    monkeypatch.setattr(Origin, "read_files", after_the_reader)
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/small")

        async def read() -> None:
            assert await read_all(client, attr) == SMALL
            has_read.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            assert await trio.to_thread.run_sync(made.wait, 20)
            nursery.start_soon(client.promote, attr.ino)
            await trio.testing.wait_all_tasks_blocked(0.1)
            go_on.set()
        assert (await cluster.worker_status()).counters.under_store_bytes == len(SMALL)


@pytest.mark.parametrize("chunk", [777, PAGE, 3 * PAGE + 1, 8 * MiB])
async def test_reading_before_it_is_sealed_and_filling_behind_the_reader(
    data: Path, tmp_path: Path, chunk: int
) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        reader = client.open_content(attr)
        assert bytes(await reader.read(5 * PAGE + 9, chunk)) == LARGE[5 * PAGE + 9 :][:chunk]
        reader.close()
        assert await read_all(client, attr, chunk) == LARGE
        await until_sealed(cluster, 1)
        assert sealed_bytes(client, attr) == LARGE


async def test_a_look_at_the_head_does_not_fetch_the_rest(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        reader = client.open_content(await client.metadata.resolve("/large"))
        assert bytes(await reader.read(0, 100)) == LARGE[:100]
        reader.close()
        await trio.testing.wait_all_tasks_blocked(0.1)
        # The page it is in, and the one read ahead.
        assert (await cluster.worker_status()).counters.pages_fetched <= 2


async def test_an_idle_partial_stays_open_for_the_pages_that_are_on_their_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, kept = trio.Event(), trio.Event(), trio.Event()
    reads: list[int] = []
    read, write_page = Origin.read, Partial.write_page

    async def slowly(origin: Origin, source: Source, offset: int, length: int) -> Any:
        reads.append(offset)
        if offset == PAGE:
            begun.set()
            await go_on.wait()
        return await read(origin, source, offset, length)

    def and_tell(partial: Partial, page: int, *args: Any) -> bool:
        try:
            return write_page(partial, page, *args)
        finally:
            if page == 1:
                trio.from_thread.run_sync(kept.set)

    monkeypatch.setattr(Origin, "read", slowly)
    monkeypatch.setattr(Partial, "write_page", and_tell)
    async with cluster_of(data, tmp_path, idle_partial_s=0.1) as (_, client):
        attr = await client.metadata.resolve("/large")
        reader = client.open_content(attr)
        with trio.fail_after(60):
            assert bytes(await reader.read(0, 100)) == LARGE[:100]
            # Nobody waits for the second page, which is read ahead, and nobody asks for anything meanwhile.
            await begun.wait()
            await trio.sleep(0.5)
            go_on.set()
            await kept.wait()
            assert bytes(await reader.read(PAGE, 100)) == LARGE[PAGE:][:100]
        assert reads.count(PAGE) == 1
        reader.close()


async def test_contents_of_several_blocks(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/huge")
        assert await client.promote(attr.ino) is False
        assert await read_all(client, attr) == HUGE
        await until_sealed(cluster, 3)
        before = (await cluster.worker_status()).counters.under_store_bytes
        assert await read_all(client, attr) == HUGE
        assert (await cluster.worker_status()).counters.under_store_bytes == before == len(HUGE)


async def test_empty_contents(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (_, client):
        attr = await client.metadata.resolve("/empty")
        reader = client.open_content(attr)
        assert await reader.read(0, 100) == b"" == reader.read_nowait(0, 100)
        reader.close()


async def test_a_held_descriptor_is_not_sent_again_and_reads_on(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (_, client):
        attr = await client.metadata.resolve("/large")
        first = await client.worker.call(Fetch(attr.ino, 0, 0, 100, 0))
        serial = first.message.serial
        assert serial > 0 and len(first.fds) == 1 and first.message.present[0][0] == 0
        again = await client.worker.call(Fetch(attr.ino, 0, 9 * PAGE, 100, serial))
        assert again.message.serial == serial and again.fds == ()
        await client.promote(attr.ino)
        assert os.pread(first.fds[0], len(LARGE), 0) == LARGE
        os.close(first.fds[0])
        with pytest.raises(BlockCorruptError):
            await client.worker.call(Fetch(attr.ino, 0, len(LARGE) - 5, 100, 0))


@pytest.mark.parametrize("name", ["small", "large", "huge"])
async def test_what_is_not_admitted_is_read_through(data: Path, tmp_path: Path, name: str) -> None:
    async with cluster_of(data, tmp_path, promote=Promote.NEVER) as (cluster, client):
        attr = await client.metadata.resolve(f"/{name}")
        content = (data / name).read_bytes()
        assert await client.promote(attr.ino) is False
        assert await read_all(client, attr, 30_000) == content
        status = await cluster.worker_status()
        assert status.tiers[0].blocks == status.tiers[0].partials == 0 and status.counters.not_admitted > 0
        # Sequential reads share pages: far fewer requests than reads.
        assert status.counters.under_store_reads < 2 * len(content) // PAGE + 5
        reader = client.open_content(attr)
        offset = len(content) // 2
        assert bytes(await reader.read(offset, 100)) == content[offset : offset + 100]
        reader.close()


async def test_if_space_keeps_what_is_there_and_always_evicts(data: Path, tmp_path: Path) -> None:
    for number in range(12):
        (data / f"{number}").write_bytes(random.Random(number).randbytes(3 * PAGE))
    tier = TierConfig("ssd", str(tmp_path / "tier"), 20 * PAGE)
    async with cluster_of(data, tmp_path, tiers=(tier,)) as (cluster, client):
        kept = [await client.promote((await client.metadata.resolve(f"/{number}")).ino) for number in range(12)]
        assert kept == [True] * 6 + [False] * 6
        assert (await cluster.worker_status()).tiers[0].evictions == 0
    async with cluster_of(data, tmp_path, tiers=(tier,), promote=Promote.ALWAYS) as (cluster, client):
        for number in range(12):
            attr = await client.metadata.resolve(f"/{number}")
            assert await client.promote(attr.ino) is True
            assert sealed_bytes(client, attr) == (data / f"{number}").read_bytes()
        tier_status = (await cluster.worker_status()).tiers[0]
        assert tier_status.evictions >= 6 and tier_status.used_bytes <= tier.capacity_bytes


async def test_a_changed_file_is_stale_and_its_name_moves_on(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        old = await client.metadata.resolve("/large")
        reader = client.open_content(old)
        assert bytes(await reader.read(0, 100)) == LARGE[:100]
        changed = random.Random(9).randbytes(4 * PAGE)
        (data / "large").write_bytes(changed)
        with pytest.raises(StaleError):
            await reader.read(9 * PAGE, 100)
        # What was cached of the old version still reads, and never mixes with the new one.
        assert bytes(await reader.read(0, 100)) == LARGE[:100]
        reader.close()
        with pytest.raises(StaleError):
            await client.promote(old.ino)
        # Whoever hears that it is stale finds the new one at once.
        new = await client.metadata.resolve("/large")
        assert new.ino != old.ino
        assert await read_all(client, new) == changed
        assert (await cluster.worker_status()).counters.changed >= 1


@pytest.mark.expect_warnings("damage is told")
async def test_a_page_damaged_before_the_seal_is_fetched_again(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        reader = client.open_content(attr)
        await reader.read(0, 1)
        reader.close()
        (path,) = [path for path in (tmp_path / "tier/partial").rglob("*-0") if path.is_file()]
        with path.open("r+b") as file:
            file.write(b"bit rot on the way to the medium")
        assert await client.promote(attr.ino) is True
        assert sealed_bytes(client, attr) == LARGE
        assert (await cluster.worker_status()).counters.corrupt == 1


async def test_a_restarted_worker_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        small, large = [await client.metadata.resolve(f"/{name}") for name in ("small", "large")]
        await client.promote(small.ino)
        reader = client.open_content(large)
        await reader.read(4 * PAGE, 1)
        await cluster.stop("worker")
        assert sealed_bytes(client, small) == SMALL
        # The page that was confirmed reads on, without a worker.
        assert bytes(await reader.read(4 * PAGE, 100)) == LARGE[4 * PAGE :][:100]
        await cluster.start_worker()
        assert await client.promote(large.ino) is True
        assert sealed_bytes(client, large) == LARGE
        fetched = (await cluster.worker_status()).counters.under_store_bytes
        assert fetched <= len(LARGE) - PAGE
        reader.close()


@pytest.mark.expect_warnings("damage is told")
async def test_a_restarted_worker_compares_what_it_had_of_an_incomplete_file(data: Path, tmp_path: Path) -> None:
    """Before anybody reads it: nobody knows what became of the file while it was away."""
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        reader = client.open_content(attr)
        await reader.read(4 * PAGE, 1)
        reader.close()
        await cluster.stop("worker")
        (path,) = [path for path in (tmp_path / "tier/partial").rglob("*-0") if path.is_file()]
        with path.open("r+b") as file:
            file.seek(4 * PAGE + 10)
            file.write(b"bit rot")
        await cluster.start_worker()
        reader = client.open_content(attr)
        assert bytes(await reader.read(4 * PAGE, 100)) == LARGE[4 * PAGE :][:100]
        assert await client.promote(attr.ino) is True
        assert sealed_bytes(client, attr) == LARGE
        assert (await cluster.worker_status()).counters.corrupt == 1
        reader.close()


async def test_a_request_waits_for_a_worker_that_restarts(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        await cluster.stop("worker")
        async with trio.open_nursery() as nursery:
            done: list[bytes] = []

            async def read() -> None:
                done.append(await read_all(client, attr))

            nursery.start_soon(read)
            await cluster.start_worker()
        assert done == [LARGE]


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_cached_reads_need_no_master(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        attr = await client.metadata.resolve("/large")
        await client.promote(attr.ino)
        await cluster.stop("master")
        assert sealed_bytes(client, attr) == LARGE
        assert await read_all(client, attr) == LARGE
        await cluster.start_master()
        assert (await client.metadata.resolve("/large")).ino == attr.ino


async def test_the_master_learns_what_workers_hold(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (_, client):
        attr = await client.metadata.resolve("/large")
        await client.promote(attr.ino)
        with trio.fail_after(60):
            while await client.holders(attr, 0) != ["worker"]:
                await trio.sleep(0.02)


async def test_what_is_evicted_before_it_is_told_of_is_not_reported_as_held(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Store.close

    def and_evict(store: Store, partial: Partial) -> None:
        close(store, partial)
        if partial.length == len(SMALL):
            assert store.evict(partial.block)

    async with cluster_of(data, tmp_path) as (_, client):
        small, large = [await client.metadata.resolve(f"/{name}") for name in ("small", "large")]
        with monkeypatch.context() as patch:
            patch.setattr(Store, "close", and_evict)
            with pytest.raises(BlockCorruptError):  # it is never there
                await client.promote(small.ino)
        assert sealed_bytes(client, small) is None
        # Told of later, or together.
        await client.promote(large.ino)
        with trio.fail_after(60):
            while await client.holders(large, 0) != ["worker"]:
                await trio.sleep(0.02)
        assert await client.holders(small, 0) == []


async def test_cancelled_readers_leave_the_fetch_to_others(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (_, client):
        attr = await client.metadata.resolve("/large")
        readers = [client.open_content(attr) for _ in range(5)]
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in readers]

            async def read(reader: ContentReader, scope: trio.CancelScope) -> None:
                with scope:
                    assert bytes(await reader.read(0, len(LARGE))) == LARGE

            for reader, scope in zip(readers, scopes, strict=True):
                nursery.start_soon(read, reader, scope)
            for scope in scopes[:-1]:
                scope.cancel()
        for reader in readers:
            reader.close()


async def test_a_worker_is_known_by_the_port_it_got(data: Path, tmp_path: Path) -> None:
    async with cluster_of(data, tmp_path) as (cluster, client):
        (worker,) = (await client.master_status()).workers
        assert worker.address == str(cluster.worker_address) and not worker.address.endswith(":0")


@pytest.mark.parametrize("chunk", [1000, PAGE, 5 * PAGE + 3])
async def test_contents_that_end_at_pages_and_blocks(data: Path, tmp_path: Path, chunk: int) -> None:
    sizes = [1, *(unit * times + more for unit in (PAGE, BLOCK) for times in (1, 2) for more in (-1, 0, 1))]
    for size in sizes:
        (data / str(size)).write_bytes(HUGE[:size])
    async with cluster_of(data, tmp_path) as (_, client):
        for size in sizes:
            attr = await client.metadata.resolve(f"/{size}")
            for _ in range(2):
                # As it comes, and as it is kept then.
                assert await read_all(client, attr, chunk) == HUGE[:size]
                assert await client.promote(attr.ino) is (size <= BLOCK)


async def test_answers_that_nobody_reads_are_not_made(data: Path, tmp_path: Path) -> None:
    """Two hundred requests for a megabyte each, all at once; those of another mount are answered meanwhile."""
    async with cluster_of(data, tmp_path, promote=Promote.NEVER) as (cluster, client):
        attr = await client.metadata.resolve("/huge")
        with socket.socket(socket.AF_UNIX) as greedy:
            greedy.connect(cluster.worker_config.socket)
            asking = Connection(asking=True)
            greedy.sendall(asking.hello(Hello("client")))
            requests = [Fetch(attr.ino, number % 2, 0, BLOCK, 0) for number in range(200)]
            heads = [asking.head(Kind.REQUEST, number, request) for number, request in enumerate(requests, 1)]
            greedy.sendall(b"".join(heads))
            reads = -1
            with trio.fail_after(60):
                # Until it has begun, and then until no more comes.
                while (
                    counters := (await cluster.worker_status()).counters
                ).under_store_bytes <= 10 * MiB or counters.under_store_reads != reads:
                    reads = counters.under_store_reads
                    assert await read_all(client, await client.metadata.resolve("/small")) == SMALL
                    await trio.testing.wait_all_tasks_blocked(0.1)
            assert counters.under_store_bytes < 40 * MiB
            greedy.setblocking(False)
            left = len(requests)
            with trio.fail_after(60):
                while left:
                    await trio.lowlevel.wait_readable(greedy)
                    with asking.get_buffer() as buffer:
                        count = greedy.recv_into(buffer)
                    left -= sum(frame.kind is Kind.REPLY for frame in asking.buffer_updated(count))
