"""Looks at the under-stores for one name."""

from __future__ import annotations

import trio

from cachefs.master.denied import Denied
from cachefs.master.freshness import Freshness
from cachefs.master.mounted import MountedStore
from cachefs.master.news import News
from cachefs.master.writer import Writer
from cachefs.meta import Found, Inode, MetaStore
from cachefs.model import Attr, Ino, NotFoundError
from cachefs.net.flights import Flights
from cachefs.ufs.base import is_file_name


class Checks:
    """Asks an under-store for a name, once for all who want to know, writes what it says, and tells of it."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        denied: Denied,
        news: News,
        freshness: Freshness,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._writer = writer
        self._denied = denied
        self._news = news
        self._freshness = freshness
        self._running: Flights[tuple[Ino, str], Attr | None] = Flights(nursery)

    def __len__(self) -> int:
        """Names that are being asked for."""
        return len(self._running)

    def start(self, directory: Inode, name: str, mounted: MountedStore) -> None:
        """In the background, unless it is being done already."""
        self._running.start((directory.attr.ino, name), lambda: self._check(directory, name, mounted))

    async def join(self, directory: Inode, name: str, mounted: MountedStore) -> Attr | None:
        """What the name points at; None: there is no such name. Raises UnderStoreError; StaleError when the store was
        detached meanwhile; and as `Flights.join`.
        """
        return await self._running.join((directory.attr.ino, name), lambda: self._check(directory, name, mounted))

    async def look(self, directory: Inode, name: str, mounted: MountedStore) -> None:
        """As `join`, with a look that begins now."""
        if not is_file_name(name):
            return
        if (directory.attr.ino, name) in self._running:
            # That one may have looked before what the asker wants seen.
            await self.join(directory, name, mounted)
        await self.join(directory, name, mounted)

    async def _check(self, directory: Inode, name: str, mounted: MountedStore) -> Attr | None:
        parent_path = self._store.path_below_mount(directory)
        path = f"{parent_path}/{name}" if parent_path else name
        ino = directory.attr.ino
        asked_ns = self._freshness.now_ns()
        try:
            with mounted.looking():
                info = await mounted.ufs.stat(path)
        except NotFoundError:
            mounted.check_attached()
            if self._store.child(ino, name) is not None:
                await self._writer.run(lambda: self._store.remove_child(ino, name))
                self._news.gone(directory, [name])
            self._denied.add(ino, name, asked_ns)
            mounted.well()
            return None
        mounted.check_attached()
        merged = await self._writer.run(
            lambda: self._store.put_child(directory, mounted.mount.origin, Found(name, info))
        )
        self._news.found(directory, merged)
        return merged.entries[0].attr
