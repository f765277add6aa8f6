"""Under-stores that come and go: a worker has open those that mounts use, and closes the others, whoever is reading."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from aiobotocore.client import AioBaseClient

from cachefs.client import Client, open_volumes
from cachefs.meta import open_meta_store
from cachefs.model import NotFoundError, StaleError
from cachefs.net import open_background
from cachefs.policy import Promote
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.fixtures import Bucket
from cachefs.testing.hanging import hanging_directory
from cachefs.wire.messages import StoreInfo, StoresInUse
from cachefs.worker.stores import Stores

LIMIT_S = 30.0
CONTENT = random.Random(1).randbytes(4 * PAGE)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(LIMIT_S):
        while not await condition():
            await trio.sleep(0.02)


@asynccontextmanager
async def scene(tmp_path: Path, **worker: Any) -> AsyncIterator[tuple[TestCluster, Client]]:
    """With a directory at the root, so that what is added is not the last one."""
    root = tmp_path / "root"
    root.mkdir()
    worker = {"removed_store_idle_s": 0.0, **worker}
    async with (
        running_cluster(tmp_path, root.as_uri(), ufs_options={"settle": "0"}, worker=worker) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client


async def opened(cluster: TestCluster) -> int:
    return (await cluster.worker_status()).open_stores


def opened_by_master(cluster: TestCluster) -> int:
    text = cluster.monitors["master"].text().decode()
    return int(float(text.partition("\ncachefs_under_stores_open ")[2].split()[0]))


def store_threads() -> int:
    """Of S3, of master and worker."""
    return sum(each.name.startswith("cachefs-s3") for each in threading.enumerate())


async def read(client: Client, path: str) -> bytes:
    return b"".join([bytes(part) async for part in client.read_file(path, PAGE)])


def holders_of(backwards: str) -> list[str]:
    """Types of the objects of this process that have a text, or something that has it and nothing but texts. It is
    given from its end to its beginning, so that whoever asks has it not.
    """
    gc.collect()

    def has(each: Any) -> bool:
        if type(each) is str:
            return len(each) == len(backwards) and each[::-1] == backwards
        return not gc.is_tracked(each) and not isinstance(each, type) and any(map(has, gc.get_referents(each)))

    return [type(each).__name__ for each in gc.get_objects() if any(map(has, gc.get_referents(each)))]


def renewed(bucket: Bucket, **options: str) -> dict[str, str]:
    """Other credentials, in texts that nobody else has."""
    found = {**bucket.server.new_ufs_options, **options}
    return {name: "".join(list(text)) for name, text in found.items()}


# ---- removed -------------------------------------------------------------------------------------------------------


async def test_a_removed_store_is_closed_and_nothing_is_left_of_it(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"file": CONTENT})
    backwards = s3_bucket.server.new_ufs_options["secret"][::-1]
    by_server = holders_of(backwards)
    with running_faulty_s3(s3_bucket.server.endpoint) as proxy:
        async with scene(tmp_path) as (cluster, client):
            await client.add_store("/more", s3_bucket.url, renewed(s3_bucket, endpoint_url=proxy.endpoint))
            assert await read(client, "/more/file") == CONTENT
            assert await opened(cluster) == 2 and opened_by_master(cluster) == 2
            assert proxy.open_connections() and store_threads() == 10 and holders_of(backwards) != by_server
            await client.remove_store("/more")

            async def closed() -> bool:
                return (await opened(cluster), opened_by_master(cluster), store_threads()) == (1, 1, 0)

            await until(closed)

            async def forgotten() -> bool:
                return not proxy.open_connections() and holders_of(backwards) == by_server

            await until(forgotten)
            # The worker is well, and so is what else it has.
            (tmp_path / "root/file").write_bytes(b"root")
            await client.refresh("/")
            assert await read(client, "/file") == b"root"


async def test_what_is_open_reads_on_until_nobody_has_read_for_a_while(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"file": CONTENT})
    # Nothing is kept, but for a page in memory: each read that follows is one of the store.
    worker = {"removed_store_idle_s": 1.0, "promote": Promote.NEVER, "read_through_bytes": PAGE}
    async with scene(tmp_path, **worker) as (cluster, client):
        await client.add_store("/more", s3_bucket.url, s3_bucket.options)
        reader = client.open_content(await client.metadata.resolve("/more/file"))
        assert bytes(await reader.read(0, PAGE)) == CONTENT[:PAGE]
        await client.remove_store("/more")
        until_s, reads = trio.current_time() + 2.5, 0
        while trio.current_time() < until_s:
            at = PAGE * (reads % 4)
            assert bytes(await reader.read(at, PAGE)) == CONTENT[at : at + PAGE]
            reads += 1
            await trio.sleep(0.05)
        assert await opened(cluster) == 2

        async def closed() -> bool:
            return await opened(cluster) == 1

        await until(closed)
        for _ in range(2):
            with pytest.raises(StaleError):
                # The last two are not both in memory.
                await reader.read(0, 2 * PAGE)
        reader.close()
        assert "fails" not in str((await cluster.worker_status()).stores)


async def test_a_read_under_way_ends_before_its_store_is_closed(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"file": CONTENT})
    with running_faulty_s3(s3_bucket.server.endpoint) as proxy:
        async with scene(tmp_path, promote=Promote.NEVER) as (cluster, client):
            await client.add_store("/more", s3_bucket.url, {**s3_bucket.options, "endpoint_url": proxy.endpoint})
            reader = client.open_content(await client.metadata.resolve("/more/file"))
            proxy.inject("stall", part="file")
            found: list[bytes] = []
            async with trio.open_nursery() as nursery:

                async def one() -> None:
                    found.append(bytes(await reader.read(0, PAGE)))

                nursery.start_soon(one)
                await trio.to_thread.run_sync(proxy.wait_stalled)
                await client.remove_store("/more")
                # Others come and go meanwhile, and it is open all the same.
                for _ in range(2):
                    await client.add_store("/other", s3_bucket.url, s3_bucket.options)
                    assert await read(client, "/other/file") == CONTENT
                    await client.remove_store("/other")

                async def alone() -> bool:
                    return await opened(cluster) == 2

                await until(alone)
                assert not found
                proxy.release()
            assert found == [CONTENT[:PAGE]]
            reader.close()

            async def closed() -> bool:
                return await opened(cluster) == 1

            await until(closed)


# ---- there again ---------------------------------------------------------------------------------------------------


async def test_one_that_comes_back_is_opened_anew_whatever_its_credentials_are(
    tmp_path: Path, s3_bucket: Bucket
) -> None:
    s3_bucket.put({"file": CONTENT})
    async with scene(tmp_path, promote=Promote.NEVER) as (cluster, client):
        for options in (s3_bucket.options, s3_bucket.server.new_ufs_options):
            await client.add_store("/more", s3_bucket.url, options)
            assert await read(client, "/more/file") == CONTENT
            await client.remove_store("/more")
        await client.add_store("/more", s3_bucket.url, s3_bucket.options)
        # Another one of the same place.
        await client.add_store("/same", s3_bucket.url, s3_bucket.options)
        assert await read(client, "/more/file") == await read(client, "/same/file") == CONTENT
        await client.remove_store("/same")

        async def two() -> bool:
            return await opened(cluster) == 2

        await until(two)
        assert await read(client, "/more/file") == CONTENT


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_what_was_removed_while_the_worker_had_no_master_is_closed_too(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"file": CONTENT})
    async with scene(tmp_path) as (cluster, client):
        await client.add_store("/more", s3_bucket.url, s3_bucket.options)
        assert await read(client, "/more/file") == CONTENT
        await cluster.stop("master")
        with open_meta_store(cluster.master_config.data_dir) as meta:
            (added,) = [each for each in meta.attach([("/", (tmp_path / "root").as_uri())]) if each.path == "/more"]
            meta.remove_mount(added.mount_id)
        await cluster.start_master()

        async def closed() -> bool:
            return await opened(cluster) == 1

        await until(closed)


async def test_replaced_credentials_are_not_kept_until_they_are_refused(tmp_path: Path, s3_bucket: Bucket) -> None:
    s3_bucket.put({"file": CONTENT, "later": CONTENT[::-1]})
    backwards = s3_bucket.server.new_ufs_options["secret"][::-1]
    by_server = holders_of(backwards)
    async with scene(tmp_path) as (cluster, client), open_volumes(cluster.master_address) as volumes:
        made = await volumes.create("a", url=s3_bucket.url, options=renewed(s3_bucket))
        assert await read(client, f"{made.path}/file") == CONTENT
        await volumes.create("a", url=s3_bucket.url, options=s3_bucket.options, replaces_options=True)

        async def replaced() -> bool:
            return await opened(cluster) == 2 and store_threads() == 10 and holders_of(backwards) == by_server

        await until(replaced)
        assert await read(client, f"{made.path}/later") == CONTENT[::-1]


# ---- what hangs ----------------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("that closing hangs is told")
@pytest.mark.parametrize("how", ["waits", "blocks"])
async def test_a_store_that_hangs_when_it_is_closed_holds_up_nobody(
    tmp_path: Path, s3_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    s3_bucket.put({"file": CONTENT})
    monkeypatch.setattr("cachefs.ufs.bridge.CLOSE_S", 1.0)
    closing, released, really_close = threading.Event(), threading.Event(), AioBaseClient.close

    async def close(client: Any) -> None:
        await really_close(client)
        closing.set()
        if how == "blocks":
            released.wait()
        else:
            await asyncio.sleep(3600)

    try:
        async with scene(tmp_path) as (cluster, client):
            await client.add_store("/more", s3_bucket.url, s3_bucket.options)
            assert await read(client, "/more/file") == CONTENT
            with monkeypatch.context() as patch:
                patch.setattr(AioBaseClient, "close", close)
                await client.remove_store("/more")
                await trio.to_thread.run_sync(closing.wait)
                # Both, master and worker, hang now, or are about to.
                with trio.fail_after(LIMIT_S):
                    await client.add_store("/again", s3_bucket.url, s3_bucket.options)
                    assert await read(client, "/again/file") == CONTENT

                async def given_up() -> bool:
                    return await opened(cluster) == 2 and opened_by_master(cluster) == 2

                await until(given_up)
                with trio.fail_after(LIMIT_S):
                    await cluster.stop("worker")
                assert caplog.text.count("connections are not closed") >= 2
    finally:
        released.set()
    with trio.fail_after(LIMIT_S):
        while store_threads():
            await trio.sleep(0.02)


@pytest.mark.expect_warnings("that a store hangs when it is opened is told")
async def test_one_that_is_removed_while_it_hangs_when_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.worker.stores._OPEN_S", 0.2)
    info = StoreInfo(1, (tmp_path / "hanging").as_uri(), {})

    async def nothing(patience_s: float) -> list[StoreInfo]:
        return []

    with hanging_directory(tmp_path / "hanging"):
        async with open_background() as nursery:
            stores = Stores(nothing, nursery, 0.0)
            await stores.add([info])
            assert stores.find(1) is None and len(nursery.child_tasks) == 1
            assert not stores.in_use(StoresInUse([], 1, 0))
            with trio.fail_after(LIMIT_S):
                while nursery.child_tasks:
                    await trio.sleep(0.01)
            # An answer of before is believed no more; another number is another store.
            await stores.add([info])
            assert not nursery.child_tasks
            (tmp_path / "well").mkdir()
            await stores.add([StoreInfo(2, (tmp_path / "well").as_uri(), {})])
            assert stores.find(2) is not None and stores.opened == 1


@pytest.mark.expect_warnings("that a store cannot be opened with its other options is told")
async def test_one_that_could_not_be_opened_with_other_options_is_closed_when_it_is_removed(tmp_path: Path) -> None:
    info = StoreInfo(1, tmp_path.as_uri(), {"settle": "0"})

    async def nothing(patience_s: float) -> list[StoreInfo]:
        return []

    async with open_background() as nursery:
        stores = Stores(nothing, nursery, 0.0)
        await stores.add([info])
        before = stores.find(1)
        await stores.add([StoreInfo(1, info.url, {"colour": "none"})])
        assert before is not None and stores.find(1) is before and stores.opened == 1
        stores.in_use(StoresInUse([], 1, 1))
        assert stores.find(1) is None
        with trio.fail_after(LIMIT_S):
            while stores.opened:
                await trio.sleep(0.01)
        with pytest.raises(StaleError, match="no mount any more"):
            await before.stat("file")


# ---- many at once --------------------------------------------------------------------------------------------------

ROUNDS = 6
READERS = 8


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("promote", [Promote.NEVER, Promote.IF_SPACE])
async def test_many_read_while_a_store_is_removed_and_comes_back_again_and_again(
    tmp_path: Path, s3_bucket: Bucket, promote: Promote
) -> None:
    # Of each round its own, so that what is kept in the cache of one is not all that the others read.
    contents = {
        f"{number}/{name}": random.Random(f"{number} {name}").randbytes(3 * PAGE)
        for number in range(ROUNDS)
        for name in range(4)
    }
    s3_bucket.put(contents)
    every = [s3_bucket.options, s3_bucket.server.new_ufs_options]
    async with scene(tmp_path, promote=promote) as (cluster, client):
        # What every process keeps once it has had one.
        await client.add_store("/more", s3_bucket.url, s3_bucket.options)
        assert await read(client, "/more/0/0") == contents["0/0"]
        await client.remove_store("/more")

        async def closed() -> bool:
            return (await opened(cluster), opened_by_master(cluster), store_threads()) == (1, 1, 0)

        await until(closed)
        before, at, ended = fds(), 0, False
        good = missed = 0
        read_in_round: set[int] = set()

        async def reader(number: int) -> None:
            nonlocal good, missed
            choice = random.Random(number)
            while not ended:
                key = f"{at}/{choice.randrange(4)}"
                try:
                    with trio.fail_after(LIMIT_S):
                        assert await read(client, f"/more/{key}") == contents[key]
                    good += 1
                    read_in_round.add(int(key.partition("/")[0]))
                except (NotFoundError, StaleError):
                    # As told in docs/semantics.md: its names are gone, and what is open may be stale.
                    missed += 1
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            for number in range(READERS):
                nursery.start_soon(reader, number)
            for number in range(ROUNDS):
                at = number
                await client.add_store("/more", s3_bucket.url, every[number % 2])

                async def is_read(number: int = number) -> bool:
                    return number in read_in_round

                await until(is_read)
                # Whoever reads is in the middle of it.
                await client.remove_store("/more")
            ended = True
        assert good >= ROUNDS and missed
        await until(closed)
        with trio.fail_after(LIMIT_S):
            while fds() > before + 8:
                gc.collect()
                await trio.sleep(0.05)
