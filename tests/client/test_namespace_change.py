"""The master's database is lost and made anew: inode numbers mean other things, and none must be taken for another."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, DirReader
from cachefs.model import (
    NO_INO,
    ROOT_INO,
    ConfigError,
    Ino,
    NamespaceChangedError,
    NotFoundError,
    StaleError,
    TransportError,
)
from cachefs.net import Hello, UnixAddress, open_background, open_peer
from cachefs.policy import Promote
from cachefs.testing.cluster import PAGE, TestCluster, running_cluster
from cachefs.wire import Request
from cachefs.wire.messages import Fetch, GetAttr, GetCluster, ListDir, Lookup, ResolvePath
from cachefs.wire.messages import Promote as PromoteRequest

pytestmark = pytest.mark.expect_warnings("another namespace is worth a warning")

NAMES = [f"{number:02}" for number in range(8)]


def content(name: str) -> bytes:
    return name.encode() * (PAGE + int(name))


@asynccontextmanager
async def scene(tmp_path: Path, **worker: object) -> AsyncIterator[tuple[TestCluster, Client, Path]]:
    data = tmp_path / "data"
    data.mkdir()
    for name in NAMES:
        (data / name).write_bytes(content(name))
    master = {"sync_interval_s": 3600}
    async with (
        running_cluster(tmp_path, data.as_uri(), master=master, worker=worker) as cluster,
        cluster.client() as client,
    ):
        yield cluster, client, data


async def look_up_all(client: Client, names: list[str]) -> dict[str, Ino]:
    """In this order, which is that of the numbers they get."""
    found = {name: await client.metadata.lookup(ROOT_INO, name) for name in names}
    return {name: attr.ino for name, attr in found.items() if attr is not None}


async def lose_the_database(cluster: TestCluster) -> None:
    await cluster.stop("master")
    shutil.rmtree(cluster.master_config.data_dir)
    await cluster.start_master()


async def read_all(client: Client, name: str) -> bytes:
    return b"".join([bytes(data) async for data in client.read_file("/" + name, PAGE)])


async def test_the_same_number_is_another_file_and_nobody_is_told_the_wrong_one(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        old = await look_up_all(client, NAMES)
        first = client.view
        await lose_the_database(cluster)
        with pytest.raises(NamespaceChangedError):
            await first.metadata.lookup(ROOT_INO, "not asked before")
        assert client.view is not first and client.view.epoch == 1
        new = await look_up_all(client, NAMES[::-1])
        assert set(old.values()) == set(new.values()) and old != new
        # Whoever still means the old namespace is told of nothing else than that.
        for ino in old.values():
            with pytest.raises(StaleError):
                await first.promote(ino)
        for name in NAMES:
            assert (await client.metadata.attr(new[name])).size_bytes == len(content(name))
            assert await read_all(client, name) == content(name)


async def test_the_client_notices_by_itself(tmp_path: Path) -> None:
    """Nobody asks for anything: the connection that tells it of changes is made again."""
    async with scene(tmp_path) as (cluster, client, _):
        told: list[int] = []
        client.on_everything = lambda: told.append(client.view.epoch)
        await lose_the_database(cluster)
        with trio.fail_after(60):
            while client.view.epoch == 0:
                await trio.sleep(0.01)
        assert told[-1] == 1
        with pytest.raises(trio.WouldBlock):
            client.metadata.lookup_nowait(ROOT_INO, NAMES[0])


async def test_what_is_cached_is_found_again_by_its_content(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        for name in NAMES:
            await client.promote((await client.metadata.resolve("/" + name)).ino)
        before = (await cluster.worker_status()).counters.under_store_bytes
        await lose_the_database(cluster)
        for name in NAMES[::-1]:
            with trio.fail_after(60):
                while True:
                    try:
                        attr = await client.metadata.resolve("/" + name)
                        break
                    except NamespaceChangedError:
                        pass
            assert await client.promote(attr.ino) is True
            fd = client.open_sealed(attr)
            assert fd is not None
            try:
                assert os.pread(fd, attr.size_bytes + 1, 0) == content(name)
            finally:
                os.close(fd)
        assert (await cluster.worker_status()).counters.under_store_bytes == before


async def test_an_open_reader_reads_what_was_confirmed_and_nothing_else(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, data):
        (data / "large").write_bytes(b"large" * 3 * PAGE)
        attr = await client.metadata.resolve("/large")
        reader = client.open_content(attr)
        assert bytes(await reader.read(0, 5)) == b"large"
        await lose_the_database(cluster)
        await look_up_all_anew(client, NAMES)
        await worker_knows(cluster, client)
        assert (await client.metadata.attr(attr.ino)).size_bytes != attr.size_bytes
        assert bytes(await reader.read(0, 5)) == b"large"
        with pytest.raises(StaleError):
            await reader.read(attr.size_bytes - 10, 10)
        reader.close()


async def look_up_all_anew(client: Client, names: list[str]) -> dict[str, Ino]:
    with pytest.raises(NamespaceChangedError):
        await client.metadata.lookup(ROOT_INO, "unknown")
    return await look_up_all(client, names)


async def worker_knows(cluster: TestCluster, client: Client) -> None:
    with trio.fail_after(60):
        while (await cluster.worker_status()).namespace_id != client.cluster.namespace_id:
            await trio.sleep(0.01)


@pytest.mark.parametrize("promote", [Promote.IF_SPACE, Promote.NEVER])
async def test_reads_in_flight_while_it_changes_end_right_or_stale(tmp_path: Path, promote: Promote) -> None:
    """Many readers by numbers, the database lost twice under them, numbers given anew in another order each time."""
    async with scene(tmp_path, promote=promote) as (cluster, client, _):
        rights = 0
        done = False

        async def read_on(offset: int) -> None:
            nonlocal rights
            while not done:
                name = NAMES[(rights + offset) % len(NAMES)]
                try:
                    assert await read_all(client, name) == content(name)
                    rights += 1
                except (StaleError, TransportError):
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            for offset in range(4):
                nursery.start_soon(read_on, offset)
            for epoch in (1, 2):
                before = rights
                with trio.fail_after(60):
                    while rights < before + 20:
                        await trio.sleep(0.01)
                    await lose_the_database(cluster)
                    await look_up_all_in(client, epoch, NAMES[::-1] if epoch == 1 else NAMES[3:] + NAMES[:3])
            before = rights
            with trio.fail_after(60):
                while rights < before + 20:
                    await trio.sleep(0.01)
            done = True


async def look_up_all_in(client: Client, epoch: int, names: list[str]) -> None:
    while client.view.epoch < epoch:
        await trio.sleep(0.01)
    await look_up_all(client, names)


async def test_a_directory_being_read_is_stale(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _), open_background() as nursery:
        reader = DirReader(client.metadata, ROOT_INO, nursery)
        assert len(await reader.read(NO_INO, 100)) == len(NAMES)
        await lose_the_database(cluster)
        reader.close()
        with pytest.raises(NamespaceChangedError):
            await reader.read(NO_INO, 100)
        anew = DirReader(client.metadata, ROOT_INO, nursery)
        assert len(await anew.read(NO_INO, 100)) == len(NAMES)
        anew.close()
        reader.close()


async def test_master_and_worker_refuse_the_numbers_of_others(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        ino = (await client.metadata.resolve("/" + NAMES[0])).ino
        other = Hello("client", namespace_id="other")
        async with open_peer(cluster.master_address, other) as master:
            requests: list[Request[object]] = [GetAttr(ino), Lookup(ROOT_INO, "x"), ResolvePath("/")]
            for request in requests:
                with pytest.raises(NamespaceChangedError):
                    await master.call(request)
            with pytest.raises(NamespaceChangedError):
                async with master.stream(ListDir(ROOT_INO)) as chunks:
                    [chunk async for chunk in chunks]
            assert (await master.call(GetCluster())).message == client.cluster
        async with open_peer(UnixAddress(cluster.worker_config.socket), other) as worker:
            for asked in (PromoteRequest(ino), Fetch(ino, 0, 0, 10, 0)):
                with pytest.raises(NamespaceChangedError):
                    await worker.call(asked)
        with pytest.raises(NotFoundError):
            await client.metadata.attr(Ino(10**6))


async def test_a_worker_does_not_go_on_with_another_geometry(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as ended, trio.fail_after(60):
        async with scene(tmp_path) as (cluster, _, _data):
            cluster.master_config = replace(cluster.master_config, page_size=2 * PAGE)
            await lose_the_database(cluster)
            await trio.sleep_forever()
    assert ended.group_contains(ConfigError, match="page size")
