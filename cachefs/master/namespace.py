"""The namespace: answers from the database, and looks at the under-stores when that is missing or old.

How names become known, and for how long they are believed:

- A directory is listed when somebody first asks for its entries. The listing is written to the database chunk by chunk;
  everybody who asks meanwhile follows it there, by inode number, so nothing is ever held in memory for a slow reader.
- A name asked for in a directory that was never listed, or that a listing did not have, costs one look at that name.
- What is older than `sync_interval_s` is served as it is, and looked at again in the background (0: looked at again
  first; below 0: never). A listing that fails removes nothing. That a name does not exist is believed as long.
- Whoever may have been told something else before is told what changed (`News`).

The looks themselves are `Checks` (one name), `Listings` (a directory) and `Refreshing` (now, whatever is believed).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import trio

from cachefs.master.checks import Checks
from cachefs.master.denied import Denied
from cachefs.master.freshness import Freshness
from cachefs.master.inodes import get_directory, get_inode
from cachefs.master.listings import Listing, Listings
from cachefs.master.load import Load
from cachefs.master.mount_table import MountTable
from cachefs.master.mounted import MountedStore
from cachefs.master.news import News
from cachefs.master.pins import Pins
from cachefs.master.quotas import Quotas
from cachefs.master.refreshing import Refreshing
from cachefs.master.watchers import Watchers
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore
from cachefs.model import (
    NO_INO,
    Attr,
    Entry,
    Ino,
    IsADirectory,
    NotFoundError,
    StaleError,
    UnderStoreError,
)
from cachefs.ufs.base import is_file_name
from cachefs.wire.messages import AttrReply, LoadProgress, NextLocations, ObjectLocation, RefreshReply

_CHUNK = 1000
_PROGRESS_EVERY_S = 0.5


class Namespace:
    """Names and inode numbers of all under-stores together, as clients and workers ask for them.

    Called from one trio thread. `nursery` owns what runs in the background.
    """

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        mounted: list[MountedStore],
        sync_interval_s: float,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._nursery = nursery
        self._freshness = Freshness(sync_interval_s)
        self._denied = Denied()
        self.watchers = Watchers()
        self.pins = Pins(store)
        self.quotas = Quotas(store)
        news = News(self.watchers, self._denied, self.pins, self.quotas)
        self._checks = Checks(store, writer, self._denied, news, self._freshness, nursery)
        self._listings = Listings(store, writer, news, self._freshness, nursery)
        self.mounts = MountTable(store, writer, self._checks, news, mounted)
        self._refreshing = Refreshing(store, self.mounts, self._checks, self._listings)

    @property
    def listings(self) -> int:
        """Directories that are being listed."""
        return len(self._listings)

    @property
    def is_looking(self) -> bool:
        """Whether an under-store is being asked, by whomever."""
        return len(self._listings) > 0 or len(self._checks) > 0

    def getattr(self, ino: Ino) -> AttrReply:
        """Raises NotFoundError for a number never given out."""
        inode = get_inode(self._store, ino)
        return AttrReply(inode.attr, not inode.live)

    def resolve(self, ino: Ino) -> ObjectLocation:
        """Raises NotFoundError, IsADirectory, and StaleError for content of a store that is no longer mounted."""
        inode = get_inode(self._store, ino)
        if inode.attr.is_dir:
            raise IsADirectory(f"inode {ino} is a directory")
        if self.mounts.get(inode.mount_id) is None:
            raise StaleError(f"inode {ino} belongs to an under-store that is no longer mounted")
        path = self._store.path_below_mount(inode)
        pinned, quota = self.pins.covers_inode(inode), self.quotas.id_of(inode)
        return ObjectLocation(inode.attr, not inode.live, inode.mount_id, path, inode.tag, pinned, quota)

    def resolve_next(self, ino: Ino, after: Ino, count: int) -> NextLocations:
        """Files beside `ino`, of the next `count` entries after inode `after`. Raises NotFoundError."""
        inode = get_inode(self._store, ino)
        directory = self._store.get(inode.parent)
        if directory is None or self.mounts.get(directory.mount_id) is None:
            return NextLocations([], after)
        above = self._store.path_below_mount(directory)
        rows = self._store.child_inodes(directory.attr.ino, after, count)
        all_pinned, quota = self.pins.covers_inode(directory), self.quotas.id_of(directory)
        files = [
            ObjectLocation(
                each.attr,
                False,
                each.mount_id,
                f"{above}/{each.name}" if above else each.name,
                each.tag,
                all_pinned or self.pins.covers_inode(each),
                quota,
            )
            for each in rows
            if not each.attr.is_dir
        ]
        return NextLocations(files, rows[-1].attr.ino if rows else after)

    async def resolve_path(self, path: str) -> AttrReply:
        """Raises NotFoundError, NotADirectory, UnderStoreError."""
        reply = self.getattr(Ino(1))
        walked = ""
        for name in [part for part in path.split("/") if part]:
            walked += "/" + name
            attr = await self.lookup(reply.attr.ino, name)
            if attr is None:
                raise NotFoundError(f"{walked}: no such file or directory")
            reply = AttrReply(attr, False)
        return reply

    async def lookup(self, parent: Ino, name: str) -> Attr | None:
        """What the name points at now; None: there is no such name.

        Raises NotFoundError and NotADirectory about the parent, StaleError when it is gone, UnderStoreError.
        """
        directory, mounted = await self.mounts.settled(parent)
        if not is_file_name(name):
            # "..", "a/b": below another directory, or outside of the store.
            return None
        known = self._store.child(parent, name)
        if mounted is None or (known is not None and known.mount_id != directory.mount_id):
            # Above the mounts, or a mount point: nobody else knows these.
            return known.attr if known else None
        if known is not None:
            if self._freshness.is_fresh(known.checked_ns) or self._freshness.is_fresh(directory.listed_ns):
                return known.attr
            if self._freshness.sync_interval_s > 0:
                if directory.listed_ns:
                    self._listings.start(directory, mounted)
                else:
                    self._checks.start(directory, name, mounted)
                return known.attr
        elif self._freshness.is_fresh(self._denied.asked_ns(parent, name)):
            return None
        elif (parent, name) in self._denied and mounted.health.is_away:
            # Nobody waits for a store that is away only to hear what he was told before.
            mounted.serving_stale += 1
            self._checks.start(directory, name, mounted)
            return None
        try:
            return await self._checks.join(directory, name, mounted)
        except UnderStoreError as error:
            if known is None and (parent, name) not in self._denied:
                raise
            mounted.serve_stale(error)
            return known.attr if known is not None else None

    async def list_dir(self, ino: Ino, after: Ino = NO_INO) -> AsyncGenerator[list[Entry], None]:
        """The entries after inode `after`, in chunks of at most 1000, by ascending inode number.

        A first listing is followed while it runs. Raises as `lookup`; after some chunks too, if the listing fails.
        """
        directory, mounted = await self.mounts.settled(ino)
        listing: Listing | None = None
        if mounted is not None and not self._freshness.is_fresh(directory.listed_ns):
            listing = self._listings.start(directory, mounted)
            if directory.listed_ns:
                if self._freshness.sync_interval_s == 0:
                    await listing.ended()
                # What was known is served: also when looking again failed.
                listing = None
        while True:
            # Read before the rows: a chunk written between the two is found by the next round.
            done = listing is None or listing.done
            entries = self._store.children(ino, after, _CHUNK)
            if entries:
                after = entries[-1].attr.ino
                yield entries
            elif done:
                break
            elif listing is not None:
                await listing.progress.wait()
        if listing is not None and listing.error is not None:
            raise listing.error

    async def recheck(self, ino: Ino) -> None:
        """Somebody found that the under-store no longer has the version an inode stands for: look, and return when its
        name points at what there is now. Raises NotFoundError, UnderStoreError.
        """
        inode = get_inode(self._store, ino)
        mounted = self.mounts.get(inode.mount_id)
        if inode.live and mounted is not None:
            directory = get_inode(self._store, inode.parent)
            await self._checks.join(directory, inode.name, mounted)

    async def refresh(self, path: str, *, recursive: bool = False) -> RefreshReply:
        """Look at the under-store now: at a file, or at all names of a directory (`recursive`: also of those below it
        that were listed before). Watchers are told what changed.

        Raises NotFoundError, NotADirectory, UnderStoreError; what is known stays then.
        """
        return await self._refreshing.refresh(path, recursive=recursive)

    async def load(self, path: str) -> AsyncGenerator[LoadProgress, None]:
        """List a directory and everything below it that is not fresh, telling how far that is; the last is the result.

        Raises NotFoundError, NotADirectory, UnderStoreError about the path itself.
        """
        root = (await self.resolve_path(path)).attr.ino
        get_directory(self._store, root)

        def path_of(ino: Ino) -> str:
            return self._store.path(get_inode(self._store, ino))

        load = Load(root, self._list_whole, lambda ino, after: self._store.children(ino, after, _CHUNK), path_of)
        self._nursery.start_soon(load.run)
        try:
            ended = False
            while not ended:
                with trio.move_on_after(_PROGRESS_EVERY_S):
                    await load.done.wait()
                ended = load.done.is_set()
                yield load.progress()
        finally:
            load.cancel()

    async def _list_whole(self, ino: Ino) -> None:
        """Return when a directory is listed and fresh. Raises as a listing does."""
        directory, mounted = await self.mounts.settled(ino)
        if mounted is None or self._freshness.is_fresh(directory.listed_ns):
            return
        listing = self._listings.start(directory, mounted)
        await listing.ended()
        if listing.error is not None:
            raise listing.error
