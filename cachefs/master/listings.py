"""Looks at the under-stores for all names of a directory."""

from __future__ import annotations

import logging
from functools import partial

import trio

from cachefs.master.freshness import Freshness
from cachefs.master.mounted import MountedStore
from cachefs.master.news import News
from cachefs.master.writer import Writer
from cachefs.meta import Found, Inode, Merged, MetaStore
from cachefs.model import NO_INO, Ino, NotFoundError, StaleError, UnavailableError, UnderStoreError

logger = logging.getLogger(__name__)

_REMOVED_AT_ONCE = 1000


class Listing:
    """A directory that is being listed: how far that is, for whoever follows it in the database."""

    def __init__(self) -> None:
        self.progress = trio.Event()
        """Set when there is more in the database, or it is done; replaced by another one then."""
        self.error: Exception | None = None
        self.done = False
        self.changed = 0
        """Names that point at something else now, are new or gone."""

    def advance(self) -> None:
        self.progress.set()
        self.progress = trio.Event()

    async def ended(self) -> None:
        """Return when it is done, with `error` or without."""
        while not self.done:
            await self.progress.wait()


class Listings:
    """Lists directories, each once for all who ask, writes what is found chunk by chunk, and tells of it.

    `nursery` owns them: they go on whether anybody follows or not. A listing that fails removes nothing.
    """

    def __init__(
        self, store: MetaStore, writer: Writer, news: News, freshness: Freshness, nursery: trio.Nursery
    ) -> None:
        self._store = store
        self._writer = writer
        self._news = news
        self._freshness = freshness
        self._nursery = nursery
        self._running: dict[Ino, Listing] = {}

    def __len__(self) -> int:
        """Directories that are being listed."""
        return len(self._running)

    def start(self, directory: Inode, mounted: MountedStore) -> Listing:
        """The listing of a directory that is running, or a new one."""
        ino = directory.attr.ino
        listing = self._running.get(ino)
        if listing is None:
            listing = self._running[ino] = Listing()
            self._nursery.start_soon(self._run, directory, mounted, listing)
        return listing

    async def none_of(self, ino: Ino) -> None:
        """Return when that directory is not being listed."""
        while (running := self._running.get(ino)) is not None:
            await running.progress.wait()

    async def _run(self, directory: Inode, mounted: MountedStore, listing: Listing) -> None:
        ino = directory.attr.ino
        try:
            with mounted.looking():
                await self._list(directory, mounted, listing)
        except NotFoundError as error:
            # The directory itself is gone; the root of a store stays, whatever becomes of the store.
            listing.error = error
            parent = self._store.get(directory.parent)
            if parent is not None and parent.mount_id == directory.mount_id:
                await self._writer.run(lambda: self._store.remove_child(directory.parent, directory.name))
                self._news.gone(parent, [directory.name])
            elif directory.listed_ns:
                mounted.serve_stale(error)
        except UnderStoreError as error:
            listing.error = error
            if directory.listed_ns:
                mounted.serve_stale(error)
        except StaleError as error:
            # Removed meanwhile.
            listing.error = error
        except Exception as error:
            # Followers get it as an error of their own; it must not end the service.
            logger.exception("listing failed dir=%d", ino)
            listing.error = error
        except BaseException:
            listing.error = UnavailableError("the master is ending")
            raise
        finally:
            listing.done = True
            del self._running[ino]
            listing.advance()

    async def _list(self, directory: Inode, mounted: MountedStore, listing: Listing) -> None:
        store, ino, origin = self._store, directory.attr.ino, mounted.mount.origin
        started_ns = self._freshness.now_ns()
        number = await self._writer.run(store.begin_listing)
        async with mounted.ufs.list_dir(store.path_below_mount(directory)) as chunks:
            async for chunk in chunks:
                found = [Found(info.path.rpartition("/")[2], info) for info in chunk]

                def add(found: list[Found] = found) -> Merged:
                    return store.add_listed(directory, origin, found, number)

                mounted.check_attached()
                merged = await self._writer.run(add)
                listing.changed += len(merged.new) + len(merged.moved)
                self._news.found(directory, merged)
                listing.advance()
        after: Ino | None = NO_INO
        while after is not None:
            mounted.check_attached()
            after, gone = await self._writer.run(partial(store.drop_unseen, ino, number, after, _REMOVED_AT_ONCE))
            listing.changed += len(gone)
            self._news.gone(directory, gone)
        await self._writer.run(lambda: store.end_listing(ino, started_ns))
