"""What the master tells of changes is forgotten before its time, whatever was under way meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from cachefs.client import ChangedName, Client, DirReader
from cachefs.model import NO_INO, ROOT_INO, Ino, StaleError
from cachefs.net import open_background, open_peer
from cachefs.testing.cluster import TestCluster, running_cluster
from cachefs.testing.relay import Relay, running_relay
from cachefs.wire import Hello
from cachefs.wire.cluster import RegisterWorker
from cachefs.wire.messages import GetAttr, GetCluster, ListDir, Lookup, ReportChanged


class Scene:
    def __init__(self, cluster: TestCluster, relay: Relay, client: Client, data: Path) -> None:
        self.relay = relay
        self.client = client
        self.data = data
        self.told: list[ChangedName] = []
        self.everything = 0
        self._cluster = cluster
        client.on_changed = lambda view, names: self.told.extend(names)
        client.on_everything = self.count

    def count(self) -> None:
        self.everything += 1

    async def look_again(self, ino: Ino) -> None:
        """Have the master find that the object changed."""
        async with open_peer(self._cluster.master_address, Hello("worker")) as master:
            await master.call(RegisterWorker("tester", "", "", ""))
            await master.call(ReportChanged(ino))

    async def size(self, name: str) -> int | None:
        attr = await self.client.metadata.lookup(ROOT_INO, name)
        return None if attr is None else attr.size_bytes

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.002)

    def is_known(self, name: str) -> bool:
        try:
            self.client.metadata.lookup_nowait(ROOT_INO, name)
        except trio.WouldBlock:
            return False
        return True


@asynccontextmanager
async def scene(tmp_path: Path, **client: object) -> AsyncIterator[Scene]:
    data = tmp_path / "data"
    (data / "dir").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (data / name).write_bytes(name.encode())
    async with running_cluster(tmp_path, data.as_uri(), master={"sync_interval_s": 3600}) as cluster:
        async with open_peer(cluster.master_address, Hello("client")) as master:
            namespace_id = (await master.call(GetCluster())).message.namespace_id
        async with (
            running_relay(cluster.master_address, namespace_id) as relay,
            cluster.client(master=relay.address, **client) as it,
        ):
            yield Scene(cluster, relay, it, data)


async def test_what_changed_is_asked_for_again_and_the_rest_is_not(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        old = await it.client.metadata.lookup(ROOT_INO, "a")
        assert old is not None
        assert await it.size("b") == 1 and await it.size("new") is None and await it.size("never") is None
        (it.data / "a").write_bytes(b"longer")
        (it.data / "new").write_bytes(b"new")
        await it.look_again(old.ino)
        it.relay.tell(ROOT_INO, "a", "new", "not known to anybody here")
        await it.until(lambda: not it.is_known("a"))
        assert it.is_known("b") and it.is_known("never")
        assert await it.size("a") == 6 and await it.size("new") == 3
        # The old content is known to be superseded.
        with pytest.raises(StaleError):
            await it.client.metadata.current(old.ino)
        assert it.told == [(ROOT_INO, "a", False), (ROOT_INO, "new", False)]


async def test_a_directory_is_told_as_one(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        assert await it.size("dir") == 0
        it.relay.tell(ROOT_INO, "dir")
        await it.until(lambda: it.told == [(ROOT_INO, "dir", True)])


async def test_an_answer_that_was_overtaken_is_not_believed(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        old = await it.client.metadata.lookup(ROOT_INO, "a")
        assert old is not None
        it.client.metadata.expire(old.ino)
        it.relay.held = Lookup
        found: list[int | None] = []

        async def look() -> None:
            found.append(await it.size("a"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await it.relay.holding.wait()
            # The master has answered. Now it changes, and we hear of that first.
            (it.data / "a").write_bytes(b"longer")
            await it.look_again(old.ino)
            it.relay.tell(ROOT_INO, "a")
            await it.until(lambda: it.told != [])
            it.relay.held = None
            it.relay.go.set()
        assert found == [6]
        assert it.client.metadata.lookup_nowait(ROOT_INO, "a") is not None
        assert await it.size("a") == 6


async def test_attributes_that_were_overtaken_are_not_remembered(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        old = await it.client.metadata.lookup(ROOT_INO, "a")
        assert old is not None
        it.relay.tell(ROOT_INO, "a")
        await it.until(lambda: len(it.told) == 1)
        it.relay.held = GetAttr
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.client.metadata.current, old.ino)
            await it.relay.holding.wait()
            (it.data / "a").unlink()
            await it.look_again(old.ino)
            assert await it.size("b") == 1
            it.relay.tell(ROOT_INO, "b")
            await it.until(lambda: len(it.told) == 2)
            it.relay.held = None
            it.relay.go.set()
        with pytest.raises(StaleError):
            await it.client.metadata.current(old.ino)


@pytest.mark.parametrize("everything", [False, True])
async def test_a_listing_that_was_overtaken_says_names_only(tmp_path: Path, everything: bool) -> None:
    async with scene(tmp_path) as it, open_background() as nursery:
        it.relay.held = ListDir
        reader = DirReader(it.client.metadata, ROOT_INO, nursery)
        entries: list[str] = []

        async def read() -> None:
            entries.extend(entry.name for entry in await reader.read(NO_INO, 10))

        async with trio.open_nursery() as reading:
            reading.start_soon(read)
            await it.relay.holding.wait()
            before = it.everything
            if everything:
                it.relay.tell_everything()
                await it.until(lambda: it.everything == before + 1)
            else:
                assert await it.size("b") == 1
                it.relay.tell(ROOT_INO, "a", "b")
                await it.until(lambda: it.told != [])
            it.relay.go.set()
        assert sorted(entries) == ["a", "b", "c", "dir"]
        assert [name for name in ("a", "b", "c") if reader.is_outdated(name)] == (
            ["a", "b", "c"] if everything else ["a", "b"]
        )
        assert [name for name in ("a", "b", "c") if it.is_known(name)] == ([] if everything else ["c"])
        reader.close()


async def test_everything_is_asked_for_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        attr = await it.client.metadata.lookup(ROOT_INO, "a")
        assert attr is not None and await it.size("new") is None
        before = it.everything
        it.relay.tell_everything()
        await it.until(lambda: it.everything > before)
        assert not it.is_known("a") and not it.is_known("new")
        with pytest.raises(trio.WouldBlock):
            it.client.metadata.attr_nowait(attr.ino)
        assert await it.client.metadata.lookup(ROOT_INO, "a") == attr


async def test_what_was_missed_is_made_good_at_the_next_connection(tmp_path: Path) -> None:
    async with scene(tmp_path) as it:
        assert await it.size("a") == 1
        before = it.everything
        it.relay.hang_up()
        await it.until(lambda: it.everything > before)
        assert it.relay.watchers == 1 and not it.is_known("a")
        assert await it.size("a") == 1 and it.is_known("a")


async def test_names_that_had_to_make_room_are_told_all_the_same(tmp_path: Path) -> None:
    async with scene(tmp_path, metadata_cache_entries=2) as it:
        await it.size("a")
        for number in range(4):
            (it.data / f"new{number}").write_bytes(b"x")
            await it.size(f"new{number}")
        assert not it.is_known("a")
        it.relay.tell(ROOT_INO, "a")
        await it.until(lambda: it.told == [(ROOT_INO, "a", True)])


async def test_without_the_master_what_is_not_believed_serves(tmp_path: Path) -> None:
    async with scene(tmp_path, patience_s=0.2) as it:
        assert await it.size("a") == 1
        before = it.everything
        it.relay.tell_everything()
        await it.until(lambda: it.everything > before)
        it.relay.stop()
        assert await it.size("a") == 1


async def test_a_name_that_points_elsewhere_supersedes_what_it_pointed_at(tmp_path: Path) -> None:
    """Found by a look at the name, before anybody told us."""
    async with scene(tmp_path) as it:
        old = await it.client.metadata.lookup(ROOT_INO, "a")
        assert old is not None
        (it.data / "a").write_bytes(b"longer")
        await it.look_again(old.ino)
        async with it.client.metadata.list_dir(ROOT_INO) as chunks:
            [chunk async for chunk in chunks]
        assert await it.size("a") == 6
        with pytest.raises(StaleError):
            await it.client.metadata.current(old.ino)
