"""Whether the master is ready, which it is as long as its database can be written."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from cachefs.master import metrics
from cachefs.meta import MetaStore
from cachefs.model import MiB
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.disks import small_disk, why_no_disks

pytestmark = pytest.mark.anyio


async def ready(cluster: TestCluster) -> tuple[int, str]:
    status, _, body = await cluster.monitors["master"].answer("/readyz") or (0, "", b"")
    return status, body.decode()


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        size = MiB
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.skipif(bool(why_no_disks()), reason=str(why_no_disks()))
@pytest.mark.expect_warnings("a database that cannot be written is told")
async def test_a_full_disk_is_found_out_and_that_it_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "WRITTEN_EVERY_S", 0.0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(b"content")
    with small_disk(tmp_path, 8 * MiB) as disk:
        master = {"data_dir": str(disk / "master")}
        async with running_cluster(tmp_path, (tmp_path / "data").as_uri(), master=master) as cluster:
            assert await ready(cluster) == (200, "ready\n")
            async with cluster.client() as client:
                attr = await client.metadata.resolve("/file")
                with full(disk):
                    assert await ready(cluster) == (503, "the database fails: database or disk is full\n")
                    async with cluster.client() as other:
                        assert await other.metadata.resolve("/file") == attr
                assert await ready(cluster) == (200, "ready\n")


async def test_however_often_somebody_asks_it_is_written_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    prove_writable = MetaStore.prove_writable

    def counted(store: MetaStore) -> None:
        nonlocal written
        written += 1
        prove_writable(store)

    monkeypatch.setattr(MetaStore, "prove_writable", counted)
    monkeypatch.setattr(metrics, "WRITTEN_EVERY_S", 3600.0)
    async with running_cluster(tmp_path, tmp_path.as_uri()) as cluster:
        answers: list[tuple[int, str]] = []

        async def ask() -> None:
            answers.append(await ready(cluster))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert answers == [(200, "ready\n")] * 20 and written == 1
