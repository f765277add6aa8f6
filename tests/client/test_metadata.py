"""What a client remembers, for how long, and what it asks for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, DirReader
from cachefs.client import metadata as metadata_module
from cachefs.model import (
    NO_INO,
    ROOT_INO,
    Ino,
    NotADirectory,
    NotFoundError,
    StaleError,
    TransportError,
    UnavailableError,
)
from cachefs.net import open_background
from cachefs.testing.cluster import TestCluster, running_cluster


@asynccontextmanager
async def scene(
    tmp_path: Path, files: int = 3, sync_interval_s: float = 3600, **client: object
) -> AsyncIterator[tuple[TestCluster, Client, Path]]:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(files):
        (data / f"{number:05}").write_bytes(b"x" * number)
    (data / "dir").mkdir()
    master = {"sync_interval_s": sync_interval_s}
    async with running_cluster(tmp_path, data.as_uri(), master=master) as cluster, cluster.client(**client) as it:
        yield cluster, it, data


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_name_is_asked_for_once(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        metadata = client.metadata
        with pytest.raises(trio.WouldBlock):
            metadata.lookup_nowait(ROOT_INO, "00001")
        attr = await metadata.lookup(ROOT_INO, "00001")
        assert attr is not None and attr.size_bytes == 1
        assert await metadata.lookup(ROOT_INO, "missing") is None
        await cluster.stop("master")
        assert metadata.lookup_nowait(ROOT_INO, "00001") == attr
        assert metadata.lookup_nowait(ROOT_INO, "missing") is None
        assert metadata.attr_nowait(attr.ino) == metadata.current_nowait(attr.ino) == attr


async def test_nothing_is_believed_with_an_interval_of_0(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0) as (_, client, data):
        first = await client.metadata.lookup(ROOT_INO, "00001")
        (data / "00001").write_bytes(b"changed")
        second = await client.metadata.lookup(ROOT_INO, "00001")
        assert first is not None and second is not None and second.ino != first.ino
        with pytest.raises(StaleError):
            await client.metadata.current(first.ino)
        assert await client.metadata.attr(first.ino) == first


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_old_answers_serve_while_the_master_is_away(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0, patience_s=0.2) as (cluster, client, _):
        attr = await client.metadata.lookup(ROOT_INO, "00001")
        assert attr is not None
        await cluster.stop("master")
        assert await client.metadata.lookup(ROOT_INO, "00001") == attr
        assert await client.metadata.current(attr.ino) == attr
        with pytest.raises(TransportError):
            await client.metadata.lookup(ROOT_INO, "00002")


async def test_the_fourth_name_brings_the_whole_directory(tmp_path: Path) -> None:
    async with scene(tmp_path, files=1200) as (_, client, _data):
        for number in range(metadata_module._TOUCHES):
            with pytest.raises(trio.WouldBlock):
                client.metadata.lookup_nowait(ROOT_INO, f"{number + 1000:05}")
            await client.metadata.lookup(ROOT_INO, f"{number + 1000:05}")
        with trio.fail_after(60):
            while True:
                try:
                    for number in range(1200):
                        client.metadata.lookup_nowait(ROOT_INO, f"{number:05}")
                    break
                except trio.WouldBlock:
                    await trio.sleep(0.01)


async def test_memory_is_bounded(tmp_path: Path) -> None:
    async with scene(tmp_path, files=300, metadata_cache_entries=100) as (_, client, _data):
        async with client.metadata.list_dir(ROOT_INO) as chunks:
            found = [entry async for entries in chunks for entry in entries]
        assert len(found) == 301
        known = 0
        for entry in found:
            try:
                client.metadata.lookup_nowait(ROOT_INO, entry.name)
                known += 1
            except trio.WouldBlock:
                pass
        assert 50 < known <= 100


async def test_a_stale_content_is_asked_for_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, _data):
        attr = await client.metadata.lookup(ROOT_INO, "00001")
        assert attr is not None
        client.metadata.expire(attr.ino)
        with pytest.raises(trio.WouldBlock):
            client.metadata.lookup_nowait(ROOT_INO, "00001")
        with pytest.raises(StaleError):
            client.metadata.current_nowait(attr.ino)
        assert await client.metadata.lookup(ROOT_INO, "00001") == attr
        assert client.metadata.current_nowait(attr.ino) == attr


async def test_errors_about_parents(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, _data):
        attr = await client.metadata.resolve("/00001")
        with pytest.raises(NotADirectory):
            await client.metadata.lookup(attr.ino, "x")
        with pytest.raises(NotFoundError):
            await client.metadata.lookup(Ino(10**6), "x")
        with pytest.raises(NotFoundError):
            await client.metadata.resolve("/no/such")


@asynccontextmanager
async def directory(client: Client) -> AsyncIterator[DirReader]:
    async with open_background() as nursery:
        reader = DirReader(client.metadata, ROOT_INO, nursery)
        yield reader
        reader.close()


async def read_on(reader: DirReader, after: Ino, limit: int) -> list[str]:
    names = []
    while entries := await reader.read(after, limit):
        assert len(entries) <= limit
        names += [entry.name for entry in entries]
        after = entries[-1].attr.ino
    return names


async def test_a_directory_is_read_to_its_end_and_again(tmp_path: Path) -> None:
    async with scene(tmp_path, files=2500) as (_, client, _data), directory(client) as reader:
        with pytest.raises(trio.WouldBlock):
            reader.read_nowait(NO_INO, 10)
        names = await read_on(reader, NO_INO, 700)
        assert len(names) == len(set(names)) == 2501
        assert await read_on(reader, NO_INO, 700) == names


async def test_entries_not_used_are_given_again_and_positions_can_be_returned_to(tmp_path: Path) -> None:
    async with scene(tmp_path, files=50) as (_, client, _data), directory(client) as reader:
        first = await reader.read(NO_INO, 20)
        assert reader.read_nowait(NO_INO, 20) == first
        assert (await reader.read(first[4].attr.ino, 20))[0] == first[5]
        assert (await reader.read(first[1].attr.ino, 20))[0] == first[2]
        assert len(await read_on(reader, first[-1].attr.ino, 20)) == 51 - 20


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_listing_goes_on_after_the_master_restarted(tmp_path: Path) -> None:
    async with scene(tmp_path, files=5000) as (cluster, client, _data), directory(client) as reader:
        first = await reader.read(NO_INO, 100)
        await cluster.stop("master")
        await cluster.start_master()
        names = [entry.name for entry in first] + await read_on(reader, first[-1].attr.ino, 512)
        assert len(names) == len(set(names)) == 5001


async def test_without_a_worker_there_are_no_contents(tmp_path: Path) -> None:
    async with scene(tmp_path, with_worker=False) as (_, client, _data):
        attr = await client.metadata.resolve("/00001")
        assert client.open_sealed(attr) is None
        with pytest.raises(UnavailableError, match="no worker"):
            await client.promote(attr.ino)


async def test_the_worker_of_this_node_is_found(tmp_path: Path) -> None:
    async with scene(tmp_path, worker_socket=None) as (_, client, _data):
        attr = await client.metadata.resolve("/00001")
        assert await client.promote(attr.ino) is True
        content = [bytes(data) async for data in client.read_file("/00002", 1)]
        assert content == [b"x", b"x"]
