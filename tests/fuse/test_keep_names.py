"""Names for a successor: kept while the master is away, and not longer."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import trio

from cachefs.client import Earlier, open_client
from cachefs.fuse.keep_names import keep_names
from cachefs.fuse.kept import Kept
from cachefs.net import open_background
from cachefs.testing.cluster import running_cluster


@pytest.mark.expect_warnings("the master is away")
async def test_they_are_kept_as_long_as_the_master_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.fuse.keep_names._SETTLED_S", 0.0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(b"content")
    fd = os.memfd_create("test")
    with closing(open(fd, "rb", buffering=0)), closing(Kept(fd)) as kept, trio.fail_after(60):  # noqa: ASYNC230
        size = os.fstat(fd).st_size
        # An earlier server was killed while it wrote.
        os.ftruncate(fd, size + 1000)
        async with (
            running_cluster(tmp_path, (tmp_path / "data").as_uri(), ufs_options={"settle": "0"}) as cluster,
            cluster.client() as client,
            open_background() as nursery,
        ):
            attr = await client.metadata.resolve("/file")
            nursery.start_soon(keep_names, client, kept)
            await trio.sleep(0.1)
            assert not kept.has_names
            for _ in range(2):
                await cluster.stop("master")
                while not kept.names():
                    await trio.sleep(0.05)
                earlier = Earlier(client.cluster, 0, (), kept.names())
                async with open_client(client._config, earlier) as successor:
                    assert await successor.metadata.attr(attr.ino) == attr
                await cluster.start_master()
                while kept.has_names:
                    await trio.sleep(0.05)
                assert os.fstat(fd).st_size == size
