"""Cached files that a mount cannot read any more, while they are open: the reader gets its bytes all the same."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.client import Client
from cachefs.model import MiB
from cachefs.store import Partial, Store, TierConfig
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.cluster import BLOCK, PAGE, TestCluster, running_cluster
from cachefs.testing.disks import small_disk, unreadable
from cachefs.wire.messages import Fetch
from cachefs.worker.origin import Origin
from cachefs.worker.sources import Source

CONTENT = random.Random(1).randbytes(2 * BLOCK + 3 * PAGE + 7)
SMALL = CONTENT[: 3 * PAGE + 7]
LIMIT_S = 60

Damage = Callable[[Path, Path], AbstractContextManager[None]]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting disks needs root"),
    pytest.mark.expect_warnings("damage is told"),
]


@contextmanager
def truncated(directory: Path, file: Path) -> Iterator[None]:
    os.truncate(file, 10)
    yield


damages = pytest.mark.parametrize("damaged", [unreadable, truncated])


@asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, Client, Path]]:
    """The last one: the directory of the tier, on a disk of its own."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "small").write_bytes(SMALL)
    (data / "large").write_bytes(CONTENT)
    with small_disk(tmp_path, 64 * MiB) as disk, trio.fail_after(LIMIT_S):
        tiers = (TierConfig("ssd", str(disk / "tier"), 32 * MiB),)
        quiet = {"tiers": tiers, "scrub_bytes_per_s": 0}
        async with (
            running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}, worker=quiet) as cluster,
            cluster.client() as client,
        ):
            yield cluster, client, disk / "tier"


def the_file(directory: Path) -> Path:
    (file,) = [each for each in directory.glob("??/*") if not each.name.endswith(SUMS_SUFFIX)]
    return file


async def until_dropped(cluster: TestCluster, file: Path) -> None:
    while file.exists() or (await cluster.worker_status()).counters.corrupt == 0:
        await trio.sleep(0.01)


async def test_a_mount_of_another_host_gets_its_bytes_too(tmp_path: Path) -> None:
    """The disk fails in the middle of an answer; the connection is all that can be ended then."""
    async with scene(tmp_path) as (cluster, client, tier):
        attr = await client.metadata.resolve("/small")
        assert await client.promote(attr.ino)
        file = the_file(tier / "sealed")
        async with cluster.client(worker_socket=None, worker_address=cluster.worker_address) as elsewhere:
            reader = elsewhere.open_content(attr)
            with unreadable(tmp_path, file):
                assert bytes(await reader.read(PAGE, 2 * PAGE)) == SMALL[PAGE : 3 * PAGE]
                await until_dropped(cluster, file)
                assert bytes(await reader.read(0, len(SMALL))) == SMALL
            reader.close()


@damages
async def test_a_sealed_file(damaged: Damage, tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, tier):
        attr = await client.metadata.resolve("/small")
        assert await client.promote(attr.ino)
        reader = client.open_content(attr)
        assert bytes(await reader.read(0, 100)) == SMALL[:100]
        file = the_file(tier / "sealed")
        with damaged(tmp_path, file):
            assert bytes(await reader.read(PAGE, 2 * PAGE)) == SMALL[PAGE : 3 * PAGE]
            await until_dropped(cluster, file)
            assert bytes(await reader.read(0, len(SMALL))) == SMALL
        assert await client.promote(attr.ino)
        fd = client.open_sealed(attr)
        assert fd is not None and os.pread(fd, len(SMALL) + 1, 0) == SMALL
        os.close(fd)
        reader.close()


@damages
async def test_a_partial(damaged: Damage, tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, tier):
        attr = await client.metadata.resolve("/large")
        reader, other = client.open_content(attr), client.open_content(attr)
        at = BLOCK + 3 * PAGE
        for each in (reader, other):
            assert bytes(await each.read(at, 100)) == CONTENT[at : at + 100]
        file = the_file(tier / "partial")
        with damaged(tmp_path, file):
            assert bytes(await reader.read(at, 200)) == CONTENT[at : at + 200]
            await until_dropped(cluster, file)
            # The other one has the old descriptor still.
            assert bytes(await other.read(at, 300)) == CONTENT[at : at + 300]
            assert bytes(await reader.read(0, len(CONTENT))) == CONTENT
        for each in (reader, other):
            assert bytes(await each.read(0, len(CONTENT))) == CONTENT
            each.close()


async def test_what_a_reader_says_is_looked_at_and_not_believed(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, tier):
        attr = await client.metadata.resolve("/small")
        assert await client.promote(attr.ino)
        answer = (await client.worker.call(Fetch(attr.ino, 0, PAGE, 100, -1, unreadable=True))).payload
        assert bytes(answer) == SMALL[PAGE : PAGE + 100]
        # Until it has been looked at, readers are sent to the under-store.
        while (await client.worker.call(Fetch(attr.ino, 0, 0, 100, 0))).message.serial == 0:
            await trio.sleep(0.01)
        assert the_file(tier / "sealed").exists()
        assert (await cluster.worker_status()).counters.corrupt == 0


async def test_a_partial_that_is_being_given_up_is_not_filled_by_whoever_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giving_up, give_up_now, fetching, fetch_now = threading.Event(), threading.Event(), trio.Event(), trio.Event()
    give_up, read = Store.give_up, Origin.read

    def slowly(store: Store, partial: Partial) -> None:
        giving_up.set()
        assert give_up_now.wait(LIMIT_S)
        give_up(store, partial)

    async def when_told(origin: Origin, source: Source, offset: int, length: int) -> Any:
        if offset == 3 * PAGE:
            fetching.set()
            await fetch_now.wait()
        return await read(origin, source, offset, length)

    async with scene(tmp_path) as (cluster, client, tier):
        attr = await client.metadata.resolve("/small")
        answer = await client.worker.call(Fetch(attr.ino, 0, 0, 100, 0))
        for fd in answer.fds:
            os.close(fd)
        monkeypatch.setattr(Store, "give_up", slowly)
        monkeypatch.setattr(Origin, "read", when_told)
        try:
            await client.worker.call(Fetch(attr.ino, 0, 0, 100, answer.message.serial, unreadable=True))
            assert await trio.to_thread.run_sync(giving_up.wait, LIMIT_S)
            async with trio.open_nursery() as nursery:

                async def promote() -> None:
                    assert await client.promote(attr.ino)

                nursery.start_soon(promote)
                await fetching.wait()
                give_up_now.set()
                while (await cluster.worker_status()).counters.corrupt == 0:
                    await trio.sleep(0.01)
                fetch_now.set()
        finally:
            give_up_now.set()
        assert the_file(tier / "sealed").read_bytes() == SMALL
