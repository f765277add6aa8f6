"""A client that goes on with the work of another, which is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from cachefs.client import Client, ClientConfig, Earlier, open_client, pack_names
from cachefs.model import ROOT_INO, Entry, NotFoundError, TransportError
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.wire.messages import Changes


@pytest.mark.expect_warnings("there is no worker at first")
async def test_it_begins_while_everybody_is_away(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(b"content")
    async with running_cluster(tmp_path, data.as_uri(), ufs_options={"settle": "0"}) as cluster:
        async with cluster.client() as first:
            attr = await first.metadata.resolve("/file")
            assert await first.promote(attr.ino)
            earlier = Earlier(first.cluster, 3, first.tiers)
        await cluster.stop("worker")
        await cluster.stop("master")
        config = ClientConfig(cluster.master_address, cluster.worker_config.socket, anywhere=True)
        with trio.fail_after(60):
            async with open_client(config, earlier) as client:
                assert client.view.epoch == 3
                # What is sealed is opened without anybody.
                fd = client.open_sealed(attr)
                assert fd is not None
                assert os.read(fd, 100) == b"content"
                os.close(fd)
                await cluster.start_master()
                await cluster.start_worker()
                assert await client.metadata.resolve("/file") == attr
                assert await client.promote(attr.ino)


async def test_names_that_the_other_was_told_are_taken_back(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    async with running_cluster(tmp_path, (tmp_path / "data").as_uri()) as cluster, cluster.client() as first:
        changes = Changes(names=[(1, ["unheard of"])])
        assert first.metadata.apply(changes) == []
        config = ClientConfig(cluster.master_address, cluster.worker_config.socket)
        async with open_client(config, Earlier(first.cluster, 0, first.tiers)) as second:
            assert [each.name for each in second.metadata.apply(changes)] == ["unheard of"]


# ---- names that the other one remembered ---------------------------------------------------------------------------

NAMES = [f"{number}" for number in range(20)]


def files(directory: Path) -> str:
    root = directory / "data"
    (root / "dir").mkdir(parents=True)
    for name in NAMES:
        (root / "dir" / name).write_bytes(name.encode() * 100)
    return root.as_uri()


def going_on(cluster: TestCluster) -> ClientConfig:
    return ClientConfig(cluster.master_address, cluster.worker_config.socket, patience_s=0.5)


async def known_of(client: Client) -> bytes:
    """After a walk as of a job: names, one that is missing, and a whole listing."""
    metadata = client.metadata
    directory = await metadata.lookup(ROOT_INO, "dir")
    assert directory is not None and await metadata.lookup(directory.ino, "absent") is None
    await metadata.attr(ROOT_INO)
    with metadata.follow(directory.ino) as following:
        async with metadata.list_dir(directory.ino, following=following) as chunks:
            found = [entry async for entries in chunks for entry in entries]
        metadata.told_whole(directory.ino, following, trio.current_time(), len(found))
    return await pack_names(metadata)


@pytest.mark.expect_warnings("everybody is away")
async def test_names_of_the_other_are_served_while_the_master_is_away_and_only_then(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, files(tmp_path), ufs_options={"settle": "0"}) as cluster:
        async with cluster.client() as first:
            names = await known_of(first)
            wanted = {name: await first.metadata.resolve(f"/dir/{name}") for name in NAMES}
            earlier = Earlier(first.cluster, 0, first.tiers, names)
        await cluster.stop("master")
        with trio.fail_after(60):
            async with open_client(going_on(cluster), earlier) as client:
                metadata = client.metadata
                directory = await metadata.lookup(ROOT_INO, "dir")
                assert directory is not None and (await metadata.attr(ROOT_INO)).is_dir
                assert {name: await metadata.lookup(directory.ino, name) for name in NAMES} == wanted
                assert await metadata.lookup(directory.ino, "absent") is None
                listed = metadata.stale_listing(directory.ino, ROOT_INO)
                assert listed is not None
                assert [entry for entries in listed for entry in entries] == sorted(
                    (Entry(name, attr) for name, attr in wanted.items()), key=lambda each: each.attr.ino
                )
                assert client.reach.served_stale > len(NAMES)
                with pytest.raises(TransportError):
                    await metadata.lookup(directory.ino, "unknown")
                # It can be handed on, though nothing of it was ever heard by this one.
                again = Earlier(earlier.cluster, 0, earlier.tiers, await pack_names(metadata))
                (tmp_path / "data/dir/3").unlink()
                await cluster.start_master()
                while client.reach.is_away:
                    await trio.sleep(0.05)
                await client.refresh("/dir")
                while await metadata.lookup(directory.ino, "3") is not None:
                    await trio.sleep(0.05)
            # With a master that is there, none of it is believed: not for one answer.
            async with open_client(going_on(cluster), again) as client:
                assert await client.metadata.lookup(directory.ino, "3") is None
                for name in NAMES:
                    with pytest.raises(trio.WouldBlock):
                        client.metadata.current_nowait(wanted[name].ino)
                assert client.metadata.stale_listing(directory.ino, ROOT_INO) is None
                assert client.reach.served_stale == 0


@pytest.mark.expect_warnings("everybody is away, and some are not understood")
async def test_names_of_another_namespace_or_none_at_all_are_not_used(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, files(tmp_path), ufs_options={"settle": "0"}) as cluster:
        async with cluster.client() as first:
            names = await known_of(first)
            here = first.cluster
        await cluster.stop("master")
        other = type(here)(here.cluster_id, "another namespace", here.geometry, here.sync_interval_s)
        with trio.fail_after(60):
            for information, told in ((other, names), (here, b"garbage"), (here, names[:-10]), (here, b"\x94\x01")):
                async with open_client(going_on(cluster), Earlier(information, 0, (), told)) as client:
                    assert len(client.metadata) == 0
                    with pytest.raises((TransportError, NotFoundError)):
                        await client.metadata.lookup(ROOT_INO, "dir")
