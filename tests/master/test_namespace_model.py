"""The namespace against a model of the bucket: random changes behind its back, looks, refreshes, outages, restarts.

What is checked is what design and semantics promise: an answer is something the bucket had at some time since the name
was last confirmed; after a refresh it is what the bucket has now; and a client that remembers everything it was told,
and forgets what it is told to have changed, never knows anything else than the master does.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import given, settings

from cachefs.master import freshness
from cachefs.master.mounted import MountedStore
from cachefs.master.namespace import Namespace
from cachefs.master.watchers import Watcher
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, open_meta_store
from cachefs.model import NO_INO, ROOT_INO, Attr, CachefsError, Ino, NotFoundError, UnavailableError
from cachefs.net import open_background
from cachefs.testing.outage import Outage
from cachefs.ufs import open_under_store

DIRECTORIES = ("", "d", "d/e")
OFTEN = ("", "", "d", "d", "d/e")
NAMES = ("a", "b", "d", "e")

Version = int | str | None
"""Of a name: the size of a file (each version has another), "dir", or None."""

step = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(OFTEN), st.sampled_from(("a", "b"))),
    st.tuples(st.sampled_from(("delete", "mkdir")), st.sampled_from(OFTEN), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(("lookup", "peek")), st.sampled_from(OFTEN), st.sampled_from(("a", "b"))),
    st.tuples(st.just("lookup"), st.sampled_from(OFTEN), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(("list", "refresh")), st.sampled_from(OFTEN), st.just("")),
    st.sampled_from([(what, "", "") for what in ("refresh all", "load", "expire", "expire", "outage", "restart")]),
)


class Clock:
    """Time as the master sees it: jumps forward when a step says so."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def time_ns(self) -> int:
        return time.time_ns() + self.ahead_ns


class World:
    def __init__(self, root: Path) -> None:
        self.bucket = root / "bucket"
        (self.bucket / "d/e").mkdir(parents=True)
        self.data_dir = root / "master"
        self.sizes = itertools.count(1)
        self.history: dict[str, list[Version]] = {}
        """Versions each path had, since it was last confirmed."""
        self.client: dict[tuple[Ino, str], Ino] = {}
        self.contents: dict[Ino, tuple[str, Version]] = {}
        """What each inode number meant when it was first seen."""
        self.is_client = True
        """Whether the one who looks now is the client that remembers; the looks of others change what it must know."""
        self.store: Outage
        self.namespace: Namespace
        self.watcher: Watcher

    # ---- the bucket ------------------------------------------------------------------------------------------------

    def truth(self, path: str) -> Version:
        full = self.bucket / path
        if full.is_dir():
            return "dir"
        return full.stat().st_size if full.exists() else None

    def every_path(self) -> list[str]:
        return [f"{directory}/{name}".lstrip("/") for directory in DIRECTORIES for name in NAMES]

    def note(self) -> None:
        for path in self.every_path():
            versions = self.history.setdefault(path, [None])
            if versions[-1] != self.truth(path):
                versions.append(self.truth(path))

    def confirm(self, *paths: str) -> None:
        for path in paths:
            self.history[path] = [self.truth(path)]

    def change(self, what: str, directory: str, name: str) -> None:
        full = self.bucket / directory / name
        if not full.parent.is_dir():
            return
        if what == "write" and not full.is_dir():
            # As an uploader does it: another inode of the file system each time, so that a version is another version.
            beside = self.bucket.parent / "upload"
            beside.write_bytes(b"x" * next(self.sizes))
            os.replace(beside, full)
        elif what == "mkdir" and not full.exists():
            full.mkdir()
        elif what == "delete":
            shutil.rmtree(full) if full.is_dir() else full.unlink(missing_ok=True)
        self.note()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def met(self, path: str, attr: Attr | None) -> Version:
        version: Version = None if attr is None else "dir" if attr.is_dir else attr.size_bytes
        assert version in self.history[path], f"{path}: {version}, but it had {self.history[path]}"
        if attr is not None:
            assert self.contents.setdefault(attr.ino, (path, version)) == (path, version)
        return version

    async def directory(self, path: str) -> Ino | None:
        ino = ROOT_INO
        walked = ""
        for name in [part for part in path.split("/") if part]:
            walked = f"{walked}/{name}".lstrip("/")
            attr = await self.look(ino, walked, name)
            if attr is None or not attr.is_dir:
                return None
            ino = attr.ino
        return ino

    async def look(self, parent: Ino, path: str, name: str) -> Attr | None:
        attr = await self.namespace.lookup(parent, name)
        self.met(path, attr)
        if self.is_client:
            self.client[(parent, name)] = attr.ino if attr else NO_INO
        return attr

    async def lookup(self, directory: str, name: str) -> None:
        ino = await self.directory(directory)
        if ino is not None:
            await self.look(ino, f"{directory}/{name}".lstrip("/"), name)

    async def list(self, directory: str) -> None:
        ino = await self.directory(directory)
        if ino is not None:
            async for entries in self.namespace.list_dir(ino):
                for entry in entries:
                    self.met(f"{directory}/{entry.name}".lstrip("/"), entry.attr)
                    self.client[(ino, entry.name)] = entry.attr.ino

    async def refresh(self, directory: str) -> None:
        await self.settle()
        try:
            await self.namespace.refresh("/" + directory)
        except CachefsError:
            # Gone, or no directory: or not found where something else is in the way.
            assert self.truth(directory) != "dir" or self.store.down or any_missing(self, directory)
            return
        if self.truth(directory) == "dir":
            self.confirm(*(f"{directory}/{name}".lstrip("/") for name in NAMES))
            ino = await self.directory(directory)
            if ino is not None:
                found = {e.name async for entries in self.namespace.list_dir(ino) for e in entries}
                assert found == {each.name for each in (self.bucket / directory).iterdir()}

    async def settle(self) -> None:
        """What runs in the background is over, and the client has heard of it."""
        while self.namespace.is_looking:
            await trio.sleep(0.001)
        while self.watcher.has_news:
            changes = await self.watcher.next()
            if changes.everything:
                self.client.clear()
            for ino, names in changes.names:
                for name in names:
                    self.client.pop((ino, name), None)

    def check_client(self, meta: MetaStore) -> None:
        """It knows nothing else than the master does."""
        for (parent, name), ino in self.client.items():
            inode = meta.get(parent)
            if inode is not None and inode.live:
                known = meta.child(parent, name)
                assert ino == (known.attr.ino if known else NO_INO), (parent, name)


def any_missing(world: World, directory: str) -> bool:
    parts = directory.split("/")
    return any(world.truth("/".join(parts[:depth])) != "dir" for depth in range(1, len(parts) + 1))


async def run(interval_s: float, steps: list[tuple[str, str, str]], root: Path, clock: Clock) -> None:
    world = World(root)
    world.note()
    script = iter(steps)
    ended = False
    while not ended:
        with open_meta_store(str(world.data_dir)) as meta:
            async with open_under_store(world.bucket.as_uri(), {}) as ufs, open_background() as nursery:
                world.store = Outage(ufs)
                (mount,) = meta.attach([("/", ufs.origin)])
                writer = Writer(meta)
                nursery.start_soon(writer.serve)
                mounted = MountedStore(mount, world.bucket.as_uri(), {}, world.store)
                world.namespace = Namespace(meta, writer, [mounted], interval_s, nursery)
                with world.namespace.watchers.watch() as world.watcher:
                    # A client asks for everything anew after a restart.
                    world.client.clear()
                    ended = await play(world, meta, script, clock)


async def play(world: World, meta: MetaStore, script: object, clock: Clock) -> bool:
    """True at the end of the script, False for a restart."""
    for what, directory, name in script:  # type: ignore[attr-defined]
        with suppress(NotFoundError, UnavailableError, CachefsError):
            match what:
                case "write" | "delete" | "mkdir":
                    world.change(what, directory, name)
                case "lookup":
                    await world.lookup(directory, name)
                case "peek":
                    world.is_client = False
                    try:
                        await world.lookup(directory, name)
                    finally:
                        world.is_client = True
                case "list":
                    await world.list(directory)
                case "refresh":
                    await world.refresh(directory)
                case "refresh all":
                    await world.settle()
                    await world.namespace.refresh("/", recursive=True)
                case "load":
                    loading: AsyncGenerator[object, None] = world.namespace.load("/")
                    async for _ in loading:
                        pass
                case "expire":
                    clock.ahead_ns += 4000 * 10**9
                case "outage":
                    world.store.down = not world.store.down
                case "restart":
                    return False
        await world.settle()
        world.check_client(meta)
    return True


@pytest.mark.expect_warnings("outages are injected")
@settings(max_examples=100, deadline=None)
@given(interval_s=st.sampled_from((0.0, -1.0, 3600.0)), steps=st.lists(step, min_size=30, max_size=40))
def test_the_namespace_against_a_model(interval_s: float, steps: list[tuple[str, str, str]]) -> None:
    clock = Clock()
    before = freshness.time
    freshness.time = clock  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as root:
            trio.run(run, interval_s, steps, Path(root), clock)
    finally:
        freshness.time = before
