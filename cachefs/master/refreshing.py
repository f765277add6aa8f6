"""Looks at the under-stores now, whatever is believed."""

from __future__ import annotations

import trio

from cachefs.master.checks import Checks
from cachefs.master.inodes import get_directory, get_inode
from cachefs.master.listings import Listing, Listings
from cachefs.master.mount_table import MountTable
from cachefs.meta import Inode, MetaStore
from cachefs.model import NO_INO, ROOT_INO, Ino, NotFoundError
from cachefs.wire.messages import RefreshReply

_LISTED_AT_ONCE = 8
_CHUNK = 1000


class Refreshing:
    """Looks at a path, and at what is below it, for somebody who knows that the under-store has something else now."""

    def __init__(self, store: MetaStore, mounts: MountTable, checks: Checks, listings: Listings) -> None:
        self._store = store
        self._mounts = mounts
        self._checks = checks
        self._listings = listings

    async def refresh(self, path: str, *, recursive: bool) -> RefreshReply:
        """As `Namespace.refresh`."""
        inode = get_inode(self._store, ROOT_INO)
        parts = [part for part in path.split("/") if part]
        changed = 0
        for depth, name in enumerate(parts, 1):
            directory = get_directory(self._store, inode.attr.ino)
            known = self._store.child(directory.attr.ino, name)
            if known is None or (depth == len(parts) and known.mount_id == directory.mount_id):
                found = await self._look(directory, name)
                changed += found is not None and (known is None or known.attr != found.attr)
                known = found
            if known is None:
                raise NotFoundError(f"/{'/'.join(parts[:depth])}: no such file or directory")
            inode = known
        if not inode.attr.is_dir:
            return RefreshReply(0, changed)
        listed, found_changed = await self._refresh_tree(inode.attr.ino, recursive)
        return RefreshReply(listed, changed + found_changed)

    async def _look(self, directory: Inode, name: str) -> Inode | None:
        """What is known of a name once its under-store, if it has one, was asked."""
        mounted = self._mounts.get(directory.mount_id)
        if mounted is not None:
            await self._checks.look(directory, name, mounted)
        return self._store.child(directory.attr.ino, name)

    async def _refresh_tree(self, root: Ino, recursive: bool) -> tuple[int, int]:
        """(directories listed, names changed)."""
        listed = changed = 0
        todo = [root]
        while todo:
            batch, todo = todo[:_LISTED_AT_ONCE], todo[_LISTED_AT_ONCE:]
            listings = [listing for ino in batch if (listing := await self._list_again(ino)) is not None]
            for listing in listings:
                await listing.ended()
                if listing.error is not None:
                    raise listing.error
                listed += 1
                changed += listing.changed
            if recursive:
                for ino in batch:
                    todo += await self._listed_below(ino)
        return listed, changed

    async def _list_again(self, ino: Ino) -> Listing | None:
        """A listing that begins now; None for what is above the mounts, or gone meanwhile."""
        await self._listings.none_of(ino)
        directory = get_inode(self._store, ino)
        mounted = self._mounts.get(directory.mount_id)
        if mounted is None or not directory.live:
            return None
        return self._listings.start(directory, mounted)

    async def _listed_below(self, ino: Ino) -> list[Ino]:
        """Directories right below that are worth looking at again: others are listed anyway when they are asked for."""
        found = []
        after = NO_INO
        while entries := self._store.children(ino, after, _CHUNK):
            for entry in entries:
                if entry.attr.is_dir:
                    directory = get_inode(self._store, entry.attr.ino)
                    if directory.listed_ns or self._mounts.get(directory.mount_id) is None:
                        found.append(entry.attr.ino)
            after = entries[-1].attr.ino
            await trio.lowlevel.checkpoint()
        return found
