"""A client that goes on with the work of another, which is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from cachefs.client import ClientConfig, Earlier, open_client
from cachefs.testing.cluster import running_cluster
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
