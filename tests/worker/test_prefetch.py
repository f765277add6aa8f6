"""Small files fetched ahead of whoever opens those of a directory in order: which, when, and at whose cost."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefs.client import Client
from cachefs.model import Attr, BlockId, CapacityError, MiB
from cachefs.policy import Promote
from cachefs.store import Partial, Store, TierConfig
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.faulty_s3 import FaultyS3, running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.ufs.files import Claim, Keep
from cachefs.worker.origin import Origin
from cachefs.worker.prefetch import Prefetch
from cachefs.worker.sources import Source

FILES = 60
LIMIT_S = 60


def content(number: int) -> bytes:
    return random.Random(number).randbytes(1000 + number)


@asynccontextmanager
async def scene(
    tmp_path: Path, bucket: Bucket, **worker: object
) -> AsyncIterator[tuple[TestCluster, Client, list[Attr], FaultyS3]]:
    """A directory of small files and what is below it, and the files in its order."""
    bucket.put({f"dir/{number:04}": content(number) for number in range(FILES)})
    bucket.put({"dir/0009-sub/inside": b"x", "dir/0010-large": bytes(3 * MiB)})
    with running_faulty_s3(bucket.server.endpoint) as store, trio.fail_after(LIMIT_S):
        options = bucket.options | {"endpoint_url": store.endpoint}
        async with (
            running_cluster(tmp_path, bucket.url, ufs_options=options, worker=worker) as cluster,
            cluster.client() as client,
        ):
            directory = await client.metadata.resolve("/dir")
            async with client.metadata.list_dir(directory.ino) as chunks:
                entries = [entry async for chunk in chunks for entry in chunk]
            attrs = [each.attr for each in entries if each.name.isdecimal()]
            assert len(attrs) == FILES
            yield cluster, client, attrs, store


_fetching: set[object] = set()
"""What is fetched ahead now."""


@pytest.fixture(autouse=True)
def fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = Prefetch._go_on

    async def noted(*args: Any) -> None:
        it = object()
        _fetching.add(it)
        try:
            await go_on(*args)
        finally:
            _fetching.discard(it)

    monkeypatch.setattr(Prefetch, "_go_on", noted)


async def quiet(cluster: TestCluster) -> tuple[int, int]:
    """(reads, files ahead) when nothing more comes, however long the store takes for what is under way."""
    counters = (await cluster.worker_status()).counters
    while True:
        before = counters
        await trio.testing.wait_all_tasks_blocked(0.2)
        counters = (await cluster.worker_status()).counters
        if counters == before and not _fetching:
            return counters.under_store_reads, counters.files_ahead


async def read(client: Client, path: str) -> bytes:
    return b"".join([bytes(part) async for part in client.read_file(path, MiB)])


def is_sealed(client: Client, attr: Attr) -> bool:
    fd = client.open_sealed(attr)
    if fd is not None:
        os.close(fd)
    return fd is not None


async def test_what_comes_next_is_there_before_it_is_asked_for(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        for attr in attrs[:4]:
            assert await client.promote(attr.ino)
        reads, ahead = await quiet(cluster)
        assert reads == 4 + ahead and ahead == 4
        assert [is_sealed(client, attr) for attr in attrs[:10]] == [True] * 8 + [False] * 2


async def test_a_directory_read_in_order_leaves_the_bucket_once(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, _, store):
        for number in range(FILES):
            assert await read(client, f"/dir/{number:04}") == content(number)
        reads, ahead = await quiet(cluster)
        # The large file is none that is fetched ahead, and the one below lies in another directory.
        assert reads == FILES and ahead > FILES // 2
        assert not [path for _, path in store.requests if "large" in path or "inside" in path]


async def test_each_of_those_who_share_a_mount_is_followed_by_itself(tmp_path: Path, s3_bucket: Bucket) -> None:
    """One reads the first half in order, another one the second."""
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        for first, second in zip(attrs[: FILES // 2], attrs[FILES // 2 :], strict=True):
            assert await client.view.promote(first.ino, reader=1)
            assert await client.view.promote(second.ino, reader=2)
        reads, ahead = await quiet(cluster)
        assert reads == FILES and ahead > FILES // 2


async def test_shuffled_opens_fetch_nothing_ahead(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        shuffled = attrs[::7] + attrs[3::7]
        random.Random(1).shuffle(shuffled)
        for attr in shuffled:
            assert await client.promote(attr.ino)
        assert await quiet(cluster) == (len(shuffled), 0)


async def test_what_is_fetched_ahead_is_in_nobodys_way(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket, ahead_slots=2) as (cluster, client, attrs, store):
        for attr in attrs[:3]:
            assert await client.promote(attr.ino)
        # The next one is asked for, and those that are fetched ahead of it never come back.
        for number in range(4, 8):
            store.inject("stall", part=f"/{number:04}", times=10)
        assert await client.promote(attrs[3].ino)
        await trio.to_thread.run_sync(store.wait_stalled, 2)
        # Not started yet, or another file altogether: both at once.
        for attr in (attrs[40], attrs[9]):
            assert await client.promote(attr.ino)
        async with trio.open_nursery() as nursery:
            # Under way: the reader waits for it.
            nursery.start_soon(client.promote, attrs[4].ino)
            await trio.testing.wait_all_tasks_blocked(0.05)
            store.release()
        reads, ahead = await quiet(cluster)
        assert is_sealed(client, attrs[4])
        assert reads == 6 + ahead


async def test_what_a_reader_is_about_to_fetch_is_not_fetched_ahead_of_him(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        for attr in attrs[:3]:
            assert await client.view.promote(attr.ino, reader=1)
        began, go = threading.Event(), threading.Event()
        opened = Store.open_partial

        def open_slowly(store: Store, block: BlockId, length: int, mode: Promote = Promote.ALWAYS) -> Partial | None:
            if block.key == attrs[5].key:
                began.set()
                go.wait()
            return opened(store, block, length, mode)

        monkeypatch.setattr(Store, "open_partial", open_slowly)
        async with trio.open_nursery() as nursery:
            # Somebody else reads it in cached mode: it is on its way when those before it are fetched ahead.
            nursery.start_soon(read, client, "/dir/0005")
            await trio.to_thread.run_sync(began.wait)
            assert await client.view.promote(attrs[3].ino, reader=1)
            for attr in (attrs[4], attrs[6], attrs[7]):
                while not is_sealed(client, attr):
                    await trio.sleep(0.01)
            go.set()
        reads, ahead = await quiet(cluster)
        assert (reads, ahead) == (8, 3)


async def test_a_file_that_a_reader_took_out_of_a_batch_and_did_not_get_is_the_next_batchs_own(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first batch ends while the second one fetches it."""
    first, second = trio.Event(), trio.Event()
    begun, ended, asked_again = trio.Event(), trio.Event(), trio.Event()
    read_files = Origin.read_files

    async def read(
        origin: Origin, sources: Sequence[Source], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        if sources[-1].attr.ino != attrs[7].ino:
            return await read_files(origin, sources, keep, at_once, claim)
        if len(sources) == 4:
            begun.set()
            await first.wait()
            outcomes = await read_files(origin, sources, keep, at_once, claim)
            ended.set()
            return outcomes
        if not asked_again.is_set():
            asked_again.set()
            return [CapacityError("no room for its reader")]
        assert claim(0)
        await second.wait()
        return await read_files(origin, sources, keep, at_once, lambda number: True)

    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        monkeypatch.setattr(Origin, "read_files", read)
        for attr in attrs[:4]:
            assert await client.view.promote(attr.ino, reader=1)
        await begun.wait()
        assert not await client.view.promote(attrs[7].ino, reader=3)
        for attr in attrs[:4]:
            assert await client.view.promote(attr.ino, reader=2)
        await trio.testing.wait_all_tasks_blocked(0.1)
        first.set()
        await ended.wait()
        await trio.testing.wait_all_tasks_blocked(0.1)
        second.set()
        assert await quiet(cluster) == (8, 4)
        assert all(is_sealed(client, attr) for attr in attrs[4:8])


@pytest.mark.parametrize("mode", list(Promote))
async def test_nothing_is_evicted_for_it(tmp_path: Path, s3_bucket: Bucket, mode: Promote) -> None:
    tiers = (TierConfig("ssd", str(tmp_path / "tier"), 4 * PAGE),)
    async with scene(tmp_path, s3_bucket, tiers=tiers, promote=mode) as (cluster, client, attrs, _):
        for attr in reversed(attrs):
            await client.promote(attr.ino)
        tier = (await cluster.worker_status()).tiers[0]
        assert tier.blocks == (0 if mode is Promote.NEVER else 32) and (tier.evictions > 0) is (mode is Promote.ALWAYS)
        missing = [attr for attr in attrs if not is_sealed(client, attr)]
        for attr in missing[:10]:
            assert await client.promote(attr.ino) is (mode is Promote.ALWAYS)
        assert (await quiet(cluster))[1] == 0


async def test_a_changed_file_ahead_is_nobodys_error(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        s3_bucket.put({"dir/0005": b"new"})
        for attr in attrs[:5]:
            assert await client.promote(attr.ino)
        await quiet(cluster)
        assert await read(client, "/dir/0006") == content(6)


async def test_it_can_be_switched_off(tmp_path: Path, s3_bucket: Bucket) -> None:
    async with scene(tmp_path, s3_bucket, files_ahead=0) as (cluster, client, attrs, _):
        for attr in attrs[:30]:
            assert await client.promote(attr.ino)
        assert await quiet(cluster) == (30, 0)


@pytest.mark.expect_warnings("it is told")
async def test_an_error_of_the_machine_is_not_the_end_of_the_worker(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with scene(tmp_path, s3_bucket) as (cluster, client, attrs, _):
        failing = {attr.key for attr in attrs[4:8]}
        opened = Store.open_partial

        def open_some(store: Store, block: BlockId, length: int, mode: Promote = Promote.ALWAYS) -> Partial | None:
            if block.key in failing:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return opened(store, block, length, mode)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "open_partial", open_some)
            for attr in attrs[:4]:
                assert await client.promote(attr.ino)
            await quiet(cluster)
        assert "not fetched ahead" in caplog.text and not is_sealed(client, attrs[4])
        assert await client.promote(attrs[4].ino)
