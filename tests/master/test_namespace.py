"""The master over a real directory: lazy listing, single looks, staleness, outages, restarts."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.master import MasterConfig
from cachefs.master.mounted import MountedStore
from cachefs.master.namespace import Namespace
from cachefs.master.writer import Writer
from cachefs.meta import open_meta_store
from cachefs.model import (
    NO_INO,
    ROOT_INO,
    ConfigError,
    DeniedError,
    Ino,
    IsADirectory,
    NotADirectory,
    NotFoundError,
    StaleError,
    UnavailableError,
)
from cachefs.net import TcpAddress, open_background
from cachefs.testing.cluster import running_cluster
from cachefs.testing.outage import Outage
from cachefs.ufs import open_under_store


class Scene:
    def __init__(self, root: Path, store: Outage, namespace: Namespace) -> None:
        self.root = root
        self.store = store
        self.namespace = namespace

    async def names(self, ino: Ino = ROOT_INO, after: Ino = NO_INO) -> list[str]:
        return [entry.name async for entries in self.namespace.list_dir(ino, after) for entry in entries]


@asynccontextmanager
async def scene(tmp_path: Path, sync_interval_s: float = 3600) -> AsyncIterator[Scene]:
    root = tmp_path / "data"
    root.mkdir(exist_ok=True)
    with open_meta_store(str(tmp_path / "meta")) as meta:
        async with open_under_store(root.as_uri(), {}) as real, open_background() as nursery:
            store = Outage(real)
            (mount,) = meta.attach([("/", store.origin)])
            writer = Writer(meta)
            nursery.start_soon(writer.serve)
            mounted = [MountedStore(mount, root.as_uri(), {}, store)]
            yield Scene(root, store, Namespace(meta, writer, mounted, sync_interval_s, nursery))


async def test_a_directory_is_listed_once_when_it_is_asked_for(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        (it.root / "a").write_bytes(b"x")
        assert it.store.listings == 0
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(it.names)
        assert await it.names() == ["a"] and it.store.listings == 1 and it.store.stats == 0


async def test_a_name_costs_one_look_and_no_listing(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        (it.root / "dir").mkdir()
        (it.root / "dir/file").write_bytes(b"x")
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(it.namespace.resolve_path, "/dir/file")
        assert it.store.listings == 0 and it.store.stats == 2
        assert await it.namespace.lookup(ROOT_INO, "nothing") is None and it.store.stats == 3


async def test_a_listing_is_followed_while_it_runs(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        for number in range(2500):
            (it.root / f"{number:05}").touch()
        it.store.gate = trio.Event()
        chunks = it.namespace.list_dir(ROOT_INO)
        first = await anext(chunks)
        # The under-store has not come to its end, and we have the beginning already.
        assert 0 < len(first) <= 1000
        it.store.gate.set()
        rest = [entry.name async for entries in chunks for entry in entries]
        assert len({entry.name for entry in first} | set(rest)) == 2500 == len(first) + len(rest)
        assert len(await it.names(after=first[-1].attr.ino)) == 1500 or len(first) != 1000


async def test_a_directory_is_read_in_the_order_in_which_names_were_found(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0) as it:
        for name in "bd":
            (it.root / name).touch()
        first = await it.names()
        for name in "ace":
            (it.root / name).touch()
            assert await it.namespace.lookup(ROOT_INO, name) is not None
        assert await it.names() == [*first, "a", "c", "e"]


async def test_a_follower_that_leaves_does_not_stop_the_listing(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        for number in range(1500):
            (it.root / f"{number:05}").touch()
        chunks = it.namespace.list_dir(ROOT_INO)
        await anext(chunks)
        await chunks.aclose()
        assert len(await it.names()) == 1500 and it.store.listings == 1


async def test_a_listing_that_fails_removes_nothing_and_says_so(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        for number in range(1500):
            (it.root / f"{number:05}").touch()
        it.store.fail_after_chunks = 1
        with pytest.raises(UnavailableError):
            await it.names()
        it.store.fail_after_chunks = None
        assert len(await it.names()) == 1500 and it.store.listings == 2


@pytest.mark.expect_warnings("an outage is told once")
async def test_an_outage_serves_what_is_known(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0) as it:
        (it.root / "a").write_bytes(b"x")
        assert await it.names() == ["a"]
        it.store.down = True
        assert await it.names() == ["a"]
        assert await it.namespace.lookup(ROOT_INO, "a") is not None
        with pytest.raises(UnavailableError):
            await it.namespace.lookup(ROOT_INO, "unknown")
        (mounted,) = it.namespace.mounts.all()
        assert mounted.serving_stale >= 2
        it.store.down = False
        (it.root / "b").write_bytes(b"x")
        assert sorted(await it.names()) == ["a", "b"]


async def test_a_store_that_failed_once_is_asked_again_for_what_it_said_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked it since: whether it is still away is not known."""
    async with scene(tmp_path, sync_interval_s=0) as it:
        assert await it.namespace.lookup(ROOT_INO, "late") is None
        (mounted,) = it.namespace.mounts.all()
        for away_s, error in ((0.0, UnavailableError), (100.0, DeniedError)):
            monkeypatch.setattr("cachefs.ufs.health._AWAY_S", away_s)
            mounted.health.failed(error("some while ago"))
            assert mounted.health.is_failing
            (it.root / "late").write_bytes(b"x")
            assert await it.namespace.lookup(ROOT_INO, "late") is not None
            (it.root / "late").unlink()
            assert await it.namespace.lookup(ROOT_INO, "late") is None
        # Away now: nobody waits, and it is looked at meanwhile.
        mounted.health.failed(UnavailableError("now"))
        (it.root / "late").write_bytes(b"x")
        assert await it.namespace.lookup(ROOT_INO, "late") is None
        with trio.fail_after(60):
            while await it.namespace.lookup(ROOT_INO, "late") is None:
                await trio.sleep(0.01)


async def test_interval_0_sees_every_change(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0) as it:
        (it.root / "a").write_bytes(b"x")
        first = await it.namespace.lookup(ROOT_INO, "a")
        (it.root / "a").write_bytes(b"longer")
        second = await it.namespace.lookup(ROOT_INO, "a")
        assert first is not None and second is not None and second.ino > first.ino
        assert it.namespace.getattr(first.ino).superseded and not it.namespace.getattr(second.ino).superseded
        (it.root / "a").unlink()
        assert await it.namespace.lookup(ROOT_INO, "a") is None


async def test_interval_minus_1_never_looks_again(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=-1) as it:
        (it.root / "a").write_bytes(b"x")
        assert await it.names() == ["a"]
        (it.root / "a").unlink()
        assert await it.names() == ["a"] and await it.namespace.lookup(ROOT_INO, "a") is not None
        assert it.store.listings == 1 and it.store.stats == 0


async def test_what_is_old_is_served_and_looked_at_in_the_background(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=1e-6) as it:
        (it.root / "a").write_bytes(b"x")
        assert await it.names() == ["a"]
        (it.root / "b").write_bytes(b"x")
        assert await it.names() == ["a"]
        with trio.fail_after(60):
            while sorted(await it.names()) != ["a", "b"]:
                await trio.sleep(0.01)


@pytest.mark.parametrize("back_s", [10, 3600, 10 * 365 * 86_400])
async def test_a_clock_that_was_set_back_makes_everything_old(
    tmp_path: Path, back_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was looked at in what is now the future is not believed until then."""
    async with scene(tmp_path, sync_interval_s=3600) as it:
        (it.root / "dir").mkdir()
        (it.root / "dir/a").write_bytes(b"x")
        (it.root / "single").write_bytes(b"x")
        directory = (await it.namespace.resolve_path("/dir")).attr.ino
        assert await it.names(directory) == ["a"]
        before = await it.namespace.lookup(ROOT_INO, "single")
        assert await it.names(directory) == ["a"] and it.store.listings == 1 and it.store.stats == 2
        real_ns = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() - back_s * 1_000_000_000)
        (it.root / "dir/b").write_bytes(b"x")
        (it.root / "single").write_bytes(b"changed")
        with trio.fail_after(60):
            while sorted(await it.names(directory)) != ["a", "b"]:
                await trio.sleep(0.01)
            while await it.namespace.lookup(ROOT_INO, "single") == before:
                await trio.sleep(0.01)
        # By now everything has a time of the new clock, and is believed again.
        listings, stats = it.store.listings, it.store.stats
        assert sorted(await it.names(directory)) == ["a", "b"]
        assert (await it.namespace.lookup(directory, "a")) and await it.namespace.lookup(ROOT_INO, "single")
        assert (it.store.listings, it.store.stats) == (listings, stats)


@pytest.mark.parametrize("name", ["", ".", "..", "dir/file", "/", "../data/dir", "dir/../dir", "a\0b", "x" * 256])
async def test_what_cannot_be_a_name_is_never_asked_for(tmp_path: Path, name: str) -> None:
    """No way out of the store, and no second name for an inode."""
    async with scene(tmp_path, sync_interval_s=0) as it:
        (it.root / "dir").mkdir()
        (it.root / "dir/file").touch()
        assert await it.namespace.lookup(ROOT_INO, name) is None
        assert it.store.stats == 0
        with pytest.raises(NotFoundError):
            await it.namespace.resolve_path("/dir/../dir")


async def test_a_directory_that_is_gone_goes(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=1e-6) as it:
        (it.root / "dir").mkdir()
        (it.root / "dir/file").touch()
        directory = (await it.namespace.resolve_path("/dir")).attr.ino
        assert await it.names(directory) == ["file"]
        (it.root / "dir/file").unlink()
        (it.root / "dir").rmdir()
        with trio.fail_after(60), pytest.raises(StaleError):
            while True:
                await it.names(directory)
                await trio.sleep(0.01)


async def test_recheck_finds_what_there_is_now(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        (it.root / "a").write_bytes(b"x")
        old = await it.namespace.lookup(ROOT_INO, "a")
        assert old is not None
        (it.root / "a").write_bytes(b"changed")
        await it.namespace.recheck(old.ino)
        new = await it.namespace.lookup(ROOT_INO, "a")
        assert new is not None and new.ino != old.ino and new.size_bytes == 7


async def test_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    async with scene(tmp_path, sync_interval_s=0) as it:
        (it.root / "file").write_bytes(b"x")
        (it.root / "dir").mkdir()
        file = await it.namespace.lookup(ROOT_INO, "file")
        directory = await it.namespace.lookup(ROOT_INO, "dir")
        assert file is not None and directory is not None
        with pytest.raises(NotADirectory):
            await it.namespace.lookup(file.ino, "x")
        with pytest.raises(IsADirectory):
            it.namespace.resolve(directory.ino)
        with pytest.raises(NotFoundError):
            it.namespace.getattr(Ino(999))
        with pytest.raises(NotFoundError, match="/dir/x"):
            await it.namespace.resolve_path("/dir/x/y")
        (it.root / "dir").rmdir()
        assert await it.namespace.lookup(ROOT_INO, "dir") is None
        with pytest.raises(StaleError):
            await it.namespace.lookup(directory.ino, "x")


@pytest.mark.expect_warnings("a restart of the master may take longer than is told")
async def test_a_restarted_master_gives_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").write_bytes(b"x")

    async def look(client: Client) -> Ino:
        return (await client.metadata.resolve("/a")).ino

    async with running_cluster(tmp_path, (tmp_path / "data").as_uri()) as cluster, cluster.client() as client:
        first = await look(client)
        await cluster.stop("master")
        await cluster.start_master()
        assert await look(client) == first


async def test_the_geometry_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    url = (tmp_path / "data").as_uri()
    async with running_cluster(tmp_path, url):
        pass
    with pytest.raises(ConfigError, match="--page-size"):
        async with running_cluster(tmp_path, url, master={"page_size": 128 * 1024}):
            pass


async def test_a_wrong_url_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        async with running_cluster(tmp_path, (tmp_path / "nowhere").as_uri()):
            pass


@pytest.mark.parametrize(
    "change", [{"sync_interval_s": -5}, {"page_size": 1000}, {"page_size": 100_000}, {"page_size": 1 << 30}]
)
def test_wrong_settings(change: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        MasterConfig(str(tmp_path), TcpAddress("127.0.0.1", 0), (), **change)  # type: ignore[arg-type]
