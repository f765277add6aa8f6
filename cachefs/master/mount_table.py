"""Which under-stores are attached to the namespace, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from cachefs.master.attached import Attached
from cachefs.master.checks import Checks
from cachefs.master.inodes import get_directory
from cachefs.master.mounted import MountedStore
from cachefs.master.news import News
from cachefs.master.writer import Writer
from cachefs.meta import Inode, MetaStore, Mount, check_mounts, is_below, normalise_mount_path
from cachefs.model import ROOT_INO, ConfigError, Ino
from cachefs.ufs import UnderStore


class Along(NamedTuple):
    """What else is written when an under-store is attached or detached: both, or neither."""

    write: Callable[[], None]
    """In the same transaction, as of `Writer.run`."""
    then: Callable[[], None]
    """When that is committed, as of `Writer.run`."""


class MountTable:
    """The attached under-stores by their number; changes in the database and here together, and tells of it.

    Called from one trio thread.
    """

    def __init__(
        self, store: MetaStore, writer: Writer, checks: Checks, news: News, mounted: Sequence[MountedStore]
    ) -> None:
        self._store = store
        self._writer = writer
        self._checks = checks
        self._news = news
        self._mounted = {each.mount.mount_id: each for each in mounted}
        self._changing = trio.Lock()
        self.told = Attached(self._mounted, store.newest_mount())

    # ---- what is attached ------------------------------------------------------------------------------------------

    def all(self) -> list[MountedStore]:
        return list(self._mounted.values())

    def get(self, mount_id: int) -> MountedStore | None:
        """None for a number that stands for nothing, or for one that is not attached any more."""
        return self._mounted.get(mount_id)

    def at(self, path: str) -> MountedStore:
        """What is attached at a path. Raises ConfigError."""
        path = normalise_mount_path(path, "PATH")
        for each in self._mounted.values():
            if each.mount.path == path:
                return each
        paths = ", ".join(sorted(each.mount.path for each in self._mounted.values()))
        raise ConfigError("PATH", path, f"one that an under-store is attached at: {paths}")

    async def settled(self, ino: Ino) -> tuple[Inode, MountedStore | None]:
        """A directory, and the store it is in; None above the mounts. One that is just being attached or removed is
        waited for: nobody is told that it is empty. Raises as `get_directory`.
        """
        directory = get_directory(self._store, ino)
        if directory.mount_id and directory.mount_id not in self._mounted:
            async with self._changing:
                directory = get_directory(self._store, ino)
        return directory, self._mounted.get(directory.mount_id)

    # ---- changing it -----------------------------------------------------------------------------------------------

    async def check_free(self, path: str) -> str:
        """The path, normalised, if another under-store may be attached there. Raises ConfigError, UnderStoreError."""
        path = normalise_mount_path(path, "PATH")
        for each in self._mounted.values():
            if each.mount.path == path:
                raise ConfigError("PATH", path, f"a path that nothing is attached at; it has {each.mount.origin}")
        check_mounts([path, *(each.mount.path for each in self._mounted.values())], "PATH")
        outer = max(
            (each for each in self._mounted.values() if is_below(path, each.mount.path)),
            key=lambda each: len(each.mount.path),
            default=None,
        )
        if outer is not None:
            await self._check_hides_nothing(path, outer)
        return path

    async def _check_hides_nothing(self, path: str, outer: MountedStore) -> None:
        """Raises ConfigError when the under-store around a path has something where the path leaves it."""
        root = get_directory(self._store, outer.mount.root_ino)
        name = path.removeprefix(outer.mount.path.rstrip("/")).split("/")[1]
        leaves_at = f"{outer.mount.path.rstrip('/')}/{name}"
        known = self._store.child(root.attr.ino, name)
        if known is None or known.mount_id == root.mount_id:
            await self._checks.look(root, name, outer)
            known = self._store.child(root.attr.ino, name)
        if known is not None and (known.mount_id == root.mount_id or leaves_at == path):
            accepted = f"one that hides nothing: {outer.mount.origin} has the name {leaves_at}, which would be hidden"
            if leaves_at != path:
                accepted += f"; attached at {leaves_at} by --mount when the master starts, it stays"
            raise ConfigError("PATH", path, accepted)

    async def attach(
        self,
        path: str,
        url: str,
        options: dict[str, str],
        ufs: UnderStore,
        keep: Callable[[], Callable[[], None]],
        along: Along | None = None,
    ) -> MountedStore:
        """Attach an under-store at a path that `check_free` has checked, for good. Watchers hear of it. `keep` is
        called when it is about to be written, and returns what closes the store: the caller's until then.
        """

        def attached(mount: Mount) -> None:
            self._mounted[mount.mount_id] = MountedStore(mount, url, options, ufs, True, close)
            self.told.added(mount.mount_id)
            self._news.attached(new)
            if along is not None:
                along.then()

        def write() -> Mount:
            if along is not None:
                along.write()
            return self._store.add_mount(path, ufs.origin, url, options)

        async with self._changing:
            new = self._first_missing(path)
            close = keep()
            mount = await self._writer.run(write, then=attached, otherwise=close)
        return self._mounted[mount.mount_id]

    async def reopen(
        self,
        mounted: MountedStore,
        url: str,
        options: dict[str, str],
        ufs: UnderStore,
        close: Callable[[], None],
        along: Along,
    ) -> None:
        """Ask an under-store that was attached by hand with other options from now on, for good. Its names stay."""

        def write() -> None:
            along.write()
            self._store.add_mount(mounted.mount.path, mounted.mount.origin, url, options)

        def reopened(_: None) -> None:
            mounted.reopened(url, options, ufs, close)
            self.told.renewed()
            along.then()

        async with self._changing:
            mounted.check_attached()
            await self._writer.run(write, then=reopened)

    async def detach(self, mounted: MountedStore, along: Along | None = None) -> None:
        """Take an under-store out of the namespace, for good. Watchers are told to believe nothing they know, since all
        names below it are gone. What is open there is known by number as before, and superseded.
        """

        def detached(_: None) -> None:
            mounted.let_go()
            self.told.removed(mounted.mount.mount_id)
            self._news.detached()
            if along is not None:
                along.then()

        def write() -> None:
            if along is not None:
                along.write()
            self._store.remove_mount(mounted.mount.mount_id)

        def kept() -> None:
            # It is there after a restart: asked again, whoever removes it has to find it.
            mounted.stay()
            self._mounted[mounted.mount.mount_id] = mounted

        async with self._changing:
            del self._mounted[mounted.mount.mount_id]
            mounted.remove()
            await self._writer.run(write, then=detached, otherwise=kept)

    def _first_missing(self, path: str) -> tuple[Ino, str] | None:
        """(directory, name) of the first part of a path that does not exist, as far as is known."""
        ino = ROOT_INO
        for name in [part for part in path.split("/") if part]:
            known = self._store.child(ino, name)
            if known is None:
                return ino, name
            ino = known.attr.ino
        return None
