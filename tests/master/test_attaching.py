"""Under-stores that come and go while master, worker and clients run, and what is so after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.client import Client
from cachefs.master.mounted import MountedStore
from cachefs.master.namespace import Namespace
from cachefs.master.writer import Writer
from cachefs.meta import open_meta_store
from cachefs.model import ROOT_INO, ConfigError, NotFoundError, StaleError, UnavailableError
from cachefs.net import open_background
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.outage import Outage
from cachefs.ufs import open_under_store
from cachefs.wire.messages import MountInfo

AT_ONCE = {"settle": "0"}
MORE = b"more" * 50_000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "dir").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"data")
    return root


@pytest.fixture
def more(tmp_path: Path) -> Path:
    root = tmp_path / "more"
    (root / "deep").mkdir(parents=True)
    (root / "deep/file").write_bytes(MORE)
    return root


async def read(client: Client, path: str) -> bytes:
    return b"".join([bytes(part) async for part in client.read_file(path, 100_000)])


async def mounts(client: Client) -> dict[str, MountInfo]:
    return {each.path: each for each in (await client.master_status()).mounts}


async def restart(cluster: TestCluster) -> None:
    await cluster.stop("master")
    await cluster.start_master()


async def test_a_worker_reads_from_a_store_that_is_attached_while_it_runs(
    data: Path, more: Path, tmp_path: Path
) -> None:
    async with running_cluster(tmp_path, data.as_uri(), ufs_options=AT_ONCE) as cluster, cluster.client() as client:
        # Believed to be missing, until it is attached.
        assert await client.metadata.lookup(ROOT_INO, "more") is None
        info = await client.add_store("/more/", more.as_uri(), AT_ONCE)
        assert (info.path, info.url, info.by_hand) == ("/more", more.as_uri(), True)
        with trio.fail_after(60):
            while await client.metadata.lookup(ROOT_INO, "more") is None:
                await trio.sleep(0.01)
        assert await read(client, "/more/deep/file") == MORE
        assert await client.promote((await client.metadata.resolve("/more/deep/file")).ino)
        # All of them together are known again after a restart, of the worker too.
        await restart(cluster)
        await cluster.stop("worker")
        await cluster.start_worker()
        assert sorted(await mounts(client)) == ["/", "/more"]
        (more / "deep/another").write_bytes(b"another")
        assert await read(client, "/more/deep/another") == b"another"
        assert await read(client, "/dir/file") == b"data"


async def test_a_removed_store_is_gone_for_good_and_what_is_open_reads_on(
    data: Path, more: Path, tmp_path: Path
) -> None:
    async with running_cluster(tmp_path, data.as_uri(), ufs_options=AT_ONCE) as cluster, cluster.client() as client:
        await client.add_store("/more", more.as_uri(), AT_ONCE)
        attr = await client.metadata.resolve("/more/deep/file")
        reader = client.open_content(attr)
        assert bytes(await reader.read(0, 10)) == MORE[:10]
        assert (await client.remove_store("/more", dry_run=True)).files == 1 and sorted(await mounts(client)) == [
            "/",
            "/more",
        ]
        await client.remove_store("/more")
        with pytest.raises(NotFoundError):
            await client.metadata.resolve("/more/deep/file")
        with trio.fail_after(60):
            while await client.metadata.lookup(ROOT_INO, "more") is not None:
                await trio.sleep(0.01)
        assert b"".join([bytes(await reader.read(at, 1000)) for at in range(0, len(MORE), 1000)]) == MORE
        reader.close()
        with pytest.raises(StaleError):
            await client.metadata.current(attr.ino)
        await restart(cluster)
        assert sorted(await mounts(client)) == ["/"]
        assert (more / "deep/file").read_bytes() == MORE
        # Attached again, it is another mount, and what is cached is found again by its content.
        await client.add_store("/more", more.as_uri(), AT_ONCE)
        again = await client.metadata.resolve("/more/deep/file")
        assert again.ino != attr.ino and again.key == attr.key


@pytest.mark.expect_warnings("that it was removed by hand is told")
async def test_what_was_removed_by_hand_stays_away_though_the_master_is_told_of_it(
    data: Path, more: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = (("/data", data.as_uri()), ("/more", more.as_uri()))
    async with (
        running_cluster(tmp_path, "", ufs_options=AT_ONCE, master={"mounts": told}) as cluster,
        cluster.client() as client,
    ):
        await client.remove_store("/more")
        await restart(cluster)
        assert sorted(await mounts(client)) == ["/data"]
        assert "not attached, it was removed by hand path=/more" in caplog.text
        await client.add_store("/more", more.as_uri(), AT_ONCE)
        assert await read(client, "/more/deep/file") == MORE
        await restart(cluster)
        found = await mounts(client)
        assert sorted(found) == ["/data", "/more"] and not found["/more"].by_hand


async def test_paths_that_will_not_do_and_stores_that_do_not_answer_change_nothing(
    data: Path, more: Path, tmp_path: Path
) -> None:
    async with running_cluster(tmp_path, data.as_uri(), ufs_options=AT_ONCE) as cluster, cluster.client() as client:
        await client.add_store("/more", more.as_uri(), AT_ONCE)
        for path, says in (
            ("/", "nothing is attached at"),
            ("/more", "nothing is attached at"),
            ("/dir", "would be hidden"),
            ("/dir/deep", "right below it: /NAME"),
            ("/more/deep/x", "right below it: /more/NAME"),
            ("relative", "an absolute path"),
            ("/a/../b", "an absolute path"),
        ):
            with pytest.raises(ConfigError, match=says):
                await client.add_store(path, more.as_uri(), AT_ONCE)
        with pytest.raises(ConfigError, match=r"expected SCHEME.*file.*s3"):
            await client.add_store("/x", "nosuch://x", {})
        with pytest.raises(ConfigError, match="settle"):
            await client.add_store("/x", more.as_uri(), {"secret": "hush"})
        with pytest.raises(NotFoundError, match="cannot attach"):
            await client.add_store("/x", f"{more.as_uri()}/nowhere", AT_ONCE)
        for path, says in (("/nothing", "attached at: /, /more"), ("/", "remove /more first")):
            with pytest.raises(ConfigError, match=says):
                await client.remove_store(path)
        assert sorted(await mounts(client)) == ["/", "/more"]
        await client.remove_store("/more")
        with pytest.raises(ConfigError, match="the last one"):
            await client.remove_store("/")
        assert await read(client, "/dir/file") == b"data"


@pytest.mark.expect_warnings("that stores cannot be opened is told")
async def test_a_store_that_was_added_never_keeps_the_master_from_starting(
    data: Path, more: Path, tmp_path: Path
) -> None:
    with open_meta_store(str(tmp_path / "master")) as meta:
        meta.attach([])
        # As if a package had been taken away since.
        meta.add_mount("/unknown", "nosuch://x", "nosuch://x", {})
        meta.add_mount("/gone", f"{more.as_uri()}/nowhere", f"{more.as_uri()}/nowhere", {})
    async with running_cluster(tmp_path, data.as_uri(), ufs_options=AT_ONCE) as cluster, cluster.client() as client:
        assert sorted(await mounts(client)) == ["/", "/gone", "/unknown"]
        assert await read(client, "/dir/file") == b"data"
        with pytest.raises(UnavailableError, match="could not be opened"):
            await client.metadata.resolve("/unknown/x")
        await client.remove_store("/unknown")
        await client.remove_store("/gone")
        assert sorted(await mounts(client)) == ["/"]


async def test_a_listing_that_runs_while_its_store_is_removed_brings_no_name_back(tmp_path: Path, more: Path) -> None:
    for number in range(2500):
        (more / f"{number:05}").touch()
    with open_meta_store(str(tmp_path / "meta")) as meta:
        async with open_under_store(more.as_uri(), {}) as real, open_background() as nursery:
            store = Outage(real)
            store.gate = trio.Event()
            (mount,) = meta.attach([("/", store.origin)])
            writer = Writer(meta)
            nursery.start_soon(writer.serve)
            closed = trio.Event()
            mounted = MountedStore(mount, more.as_uri(), {}, store, close=closed.set)
            namespace = Namespace(meta, writer, [mounted], 3600, nursery)
            chunks = namespace.list_dir(ROOT_INO)
            first = await anext(chunks)
            await namespace.mounts.detach(mounted)
            # The listing has it in use.
            assert not closed.is_set()
            store.gate.set()
            with pytest.raises(StaleError, match="any more"):
                async for _ in chunks:
                    pass
            assert closed.is_set()
            assert [entries async for entries in namespace.list_dir(ROOT_INO)] == []
            assert namespace.getattr(first[0].attr.ino).superseded


async def test_whoever_asks_may_leave_and_what_is_known_is_what_was_written(tmp_path: Path, more: Path) -> None:
    with open_meta_store(str(tmp_path / "meta")) as meta:
        async with open_under_store(more.as_uri(), {}) as ufs, open_background() as nursery:
            meta.attach([])
            writer = Writer(meta)
            namespace = Namespace(meta, writer, [], 3600, nursery)
            closed = trio.Event()
            with namespace.watchers.watch() as watcher:
                async with trio.open_nursery() as asking:
                    asking.start_soon(namespace.mounts.attach, "/more", more.as_uri(), {}, ufs, lambda: closed.set)
                    await trio.testing.wait_all_tasks_blocked()
                    asking.cancel_scope.cancel()
                assert namespace.mounts.all() == []
                # It is written only now.
                nursery.start_soon(writer.serve)
                assert (await watcher.next()).names == [(ROOT_INO, ["more"])]
                assert (await namespace.resolve_path("/more/deep/file")).attr.size_bytes == len(MORE)
                assert not closed.is_set()
