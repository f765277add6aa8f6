"""What the master tells of changes, to whom, and what it looks at when it is asked to."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import Client
from cachefs.master import watchers as watchers_module
from cachefs.master.watchers import Watcher, Watchers
from cachefs.model import ROOT_INO, Attr, Ino, NotADirectory, NotFoundError, StaleError
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.wire.messages import Changes, Watch

LIMIT_S = 60


@asynccontextmanager
async def scene(
    tmp_path: Path, names: tuple[str, ...] = ("a", "dir/b"), **master: object
) -> AsyncIterator[tuple[TestCluster, Client, Path]]:
    data = tmp_path / "data"
    data.mkdir()
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(b"x")
    settings = {"sync_interval_s": -1.0, **master}
    async with running_cluster(tmp_path, data.as_uri(), master=settings) as cluster, cluster.client() as client:
        with trio.fail_after(LIMIT_S):
            yield cluster, client, data


class Ear:
    """Another watcher, that writes down what it is told."""

    def __init__(self) -> None:
        self.told: set[tuple[int, str]] = set()
        self.everything = False
        self._news = trio.Event()

    async def listen(self, client: Client, task_status: trio.TaskStatus[None]) -> None:
        async with client.metadata.watch() as stream:
            async for changes in stream:
                self.told |= {(ino, name) for ino, names in changes.names for name in names}
                self.everything |= changes.everything
                self._news.set()
                self._news = trio.Event()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED

    async def heard(self, *expected: tuple[int, str]) -> None:
        """Return when all these were told; then forget."""
        while not set(expected) <= self.told:
            await self._news.wait()
        assert self.told == set(expected)
        self.told = set()


@asynccontextmanager
async def ear_of(client: Client) -> AsyncIterator[Ear]:
    ear = Ear()
    async with trio.open_nursery() as nursery:
        await nursery.start(ear.listen, client)
        yield ear
        nursery.cancel_scope.cancel()


async def names_of(client: Client, ino: Ino = ROOT_INO) -> dict[str, Attr]:
    async with client.metadata.list_dir(ino) as chunks:
        return {entry.name: entry.attr async for chunk in chunks for entry in chunk}


async def test_what_a_watcher_is_told() -> None:
    watchers = Watchers()
    with watchers.watch() as one, watchers.watch() as other:
        watchers.tell(Ino(1), ["a", "b"])
        assert await one.next() == Changes([(Ino(1), ["a", "b"])])
        watchers.tell(Ino(1), ["b", "c"])
        watchers.tell(Ino(2), ["d"])
        watchers.tell(Ino(3), [])
        assert await one.next() == Changes([(Ino(1), ["b", "c"]), (Ino(2), ["d"])])
        assert await other.next() == Changes([(Ino(1), ["a", "b", "c"]), (Ino(2), ["d"])])
        watchers.tell_everything()
        watchers.tell(Ino(1), ["e"])
        assert await one.next() == Changes([], everything=True)
        with trio.move_on_after(0.01) as waiting:
            await one.next()
        assert waiting.cancelled_caught


async def test_who_does_not_listen_is_told_that_too_much_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers_module, "MOST_NAMES", 10)
    watcher = Watcher()
    for number in range(10):
        watcher.tell(Ino(number % 2), ["same", str(number // 2)])
    assert await watcher.next() == Changes([], everything=True)
    watcher.tell(Ino(1), ["after"])
    assert await watcher.next() == Changes([(Ino(1), ["after"])])


async def test_a_refresh_finds_what_is_new_changed_and_gone_and_everybody_hears(tmp_path: Path) -> None:
    async with (
        scene(tmp_path, ("a", "b", "same", "dir/file")) as (cluster, asker, data),
        cluster.client() as other,
        ear_of(asker) as ear,
    ):
        before = await names_of(other)
        assert await other.metadata.lookup(ROOT_INO, "new") is None
        (data / "a").write_bytes(b"changed")
        (data / "b").unlink()
        (data / "new").write_bytes(b"new")
        (data / "dir/file").unlink()
        assert (await names_of(other)).keys() == before.keys()
        reply = await asker.refresh("/")
        assert (reply.directories, reply.changed) == (1, 3)
        await ear.heard((ROOT_INO, "a"), (ROOT_INO, "b"), (ROOT_INO, "new"))
        while (new := await other.metadata.lookup(ROOT_INO, "new")) is None:
            await trio.sleep(0.01)
        assert new.size_bytes == 3
        found = await names_of(other)
        assert sorted(found) == ["a", "dir", "new", "same"]
        assert found["a"].size_bytes == 7 and found["a"].ino != before["a"].ino
        assert found["same"] == before["same"] and found["dir"] == before["dir"]
        with pytest.raises(StaleError):
            await other.metadata.current(before["a"].ino)
        assert (await asker.refresh("/")).changed == 0


async def test_a_first_look_is_no_news(tmp_path: Path) -> None:
    """Else everybody would forget what has just been learned, and ask for it again."""
    async with scene(tmp_path) as (_, client, data), ear_of(client) as ear:
        assert await client.metadata.lookup(ROOT_INO, "a") is not None
        assert await client.metadata.lookup(ROOT_INO, "later") is None
        assert await names_of(client)
        (data / "later").write_bytes(b"x")
        await client.refresh("/later")
        await ear.heard((ROOT_INO, "later"))


async def test_a_missing_name_is_believed_to_be_missing_until_it_is_refreshed(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, data):
        assert await client.metadata.lookup(ROOT_INO, "later") is None
        (data / "later").write_bytes(b"x")
        async with cluster.client() as other:
            assert await other.metadata.lookup(ROOT_INO, "later") is None
            assert (await client.refresh("/later")).changed == 1
            assert await other.metadata.lookup(ROOT_INO, "later") is not None


async def test_a_listing_finds_what_was_said_to_be_missing(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, data), ear_of(client) as ear:
        assert await client.metadata.lookup(ROOT_INO, "later") is None
        (data / "later").write_bytes(b"x")
        assert "later" in await names_of(client)
        await ear.heard((ROOT_INO, "later"))
        while await client.metadata.lookup(ROOT_INO, "later") is None:
            await trio.sleep(0.01)


async def test_a_refresh_of_a_file_looks_at_nothing_else(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, data):
        before = await names_of(client)
        (data / "a").write_bytes(b"changed")
        (data / "new").write_bytes(b"x")
        reply = await client.refresh("/a")
        assert (reply.directories, reply.changed) == (0, 1)
        found = await names_of(client)
        assert found["a"].ino != before["a"].ino and "new" not in found


async def test_recursive_goes_down_where_somebody_was(tmp_path: Path) -> None:
    async with scene(tmp_path, ("seen/deep/a", "unseen/b")) as (_, client, data):
        top = await names_of(client)
        seen = await names_of(client, top["seen"].ino)
        assert sorted(await names_of(client, seen["deep"].ino)) == ["a"]
        (data / "seen/deep/new").write_bytes(b"x")
        assert (await client.refresh("/")).changed == 0
        reply = await client.refresh("/", recursive=True)
        assert (reply.directories, reply.changed) == (3, 1)
        assert sorted(await names_of(client, seen["deep"].ino)) == ["a", "new"]


async def test_refreshing_what_is_gone_or_never_was(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, data), ear_of(client) as ear:
        top = await names_of(client)
        await names_of(client, top["dir"].ino)
        for path in ("/missing", "/dir/missing", "/missing/deep"):
            with pytest.raises(NotFoundError, match="missing"):
                await client.refresh(path)
        with pytest.raises(NotADirectory):
            await client.refresh("/a/b")
        (data / "dir/b").unlink()
        (data / "dir").rmdir()
        with pytest.raises(NotFoundError, match="/dir"):
            await client.refresh("/dir")
        await ear.heard((ROOT_INO, "dir"))
        assert sorted(await names_of(client)) == ["a"]


async def test_a_watch_ends_with_its_connection(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, client, _):
        async with ear_of(client):
            pass
        async with cluster.client():
            pass
        # Served on: nobody is told twice, nothing is left that fails.
        async with (await client.metadata._master.peer()).stream(Watch()) as stream:
            assert await anext(stream) == Changes([])


async def test_everything_below_is_loaded_and_told(tmp_path: Path) -> None:
    names = tuple(f"{one}/{two}/file" for one in "abc" for two in range(40))
    async with scene(tmp_path, names) as (_, client, _data):
        async with client.load_metadata("/") as stream:
            *_, last = [progress async for progress in stream]
        assert (last.directories_found, last.directories_done) == (124, 124)
        assert (last.files, last.bytes, last.failed) == (120, 120, [])
        (status,) = (await client.master_status()).mounts
        # The root of the mount is not counted among what was found in it.
        assert status.files == 120 and status.directories in (123, 124)
        async with client.load_metadata("/b") as stream:
            *_, last = [progress async for progress in stream]
        assert (last.directories_done, last.files) == (41, 40)


async def test_a_directory_that_cannot_be_loaded_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    async with scene(tmp_path, ("a/file", "b/file", "c/file")) as (cluster, client, data):
        assert sorted(await names_of(client)) == ["a", "b", "c"]
        # Gone since the names were read: its listing fails.
        shutil.rmtree(data / "b")
        code, output, _ = await command(cluster, "load", "/", "--metadata", "--json")
        facts = json.loads(output)
        assert code == 1 and facts["files"] == 2 and [each["path"] for each in facts["failed"]] == ["/b"]


async def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    async with scene(tmp_path) as (_, client, _data):
        with pytest.raises(NotADirectory):
            async with client.load_metadata("/a") as stream:
                await anext(stream)
        with pytest.raises(NotFoundError):
            async with client.load_metadata("/nowhere") as stream:
                await anext(stream)


async def command(cluster: TestCluster, *arguments: str) -> tuple[int, str, str]:
    address = cluster.master_address
    asked = [sys.executable, "-m", "cachefs", *arguments, "--master", str(address)]
    done = await trio.run_process(asked, capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_the_commands(tmp_path: Path) -> None:
    async with scene(tmp_path) as (cluster, _client, data):
        code, output, _ = await command(cluster, "load", "/", "--metadata", "--json")
        facts = json.loads(output)
        assert code == 0 and (facts["paths"], facts["files"], facts["bytes"], facts["failed"]) == (["/"], 2, 2, [])
        (data / "dir/b").unlink()
        code, output, _ = await command(cluster, "refresh", "/dir")
        assert (code, output) == (0, "/dir: 1 directories listed, 1 names changed\n")
        code, output, _ = await command(cluster, "refresh", "/", "--recursive", "--json")
        assert json.loads(output) == {"path": "/", "directories": 2, "changed": 0}
        code, _, errors = await command(cluster, "refresh", "/nowhere")
        assert code == 1 and "/nowhere: no such file" in errors
        code, output, _ = await command(cluster, "load", "/", "--metadata")
        assert (code, output) == (0, "/: 1 files, 1 B\n")
