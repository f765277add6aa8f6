"""The namespace: answers from the database, and looks at the under-stores when that is missing or old.

How names become known, and for how long they are believed:

- A directory is listed when somebody first asks for its entries. The listing is written to the database chunk by chunk;
  everybody who asks meanwhile follows it there, by inode number, so nothing is ever held in memory for a slow reader.
- A name asked for in a directory that was never listed, or that a listing did not have, costs one look at that name.
- What is older than `sync_interval_s` is served as it is, and looked at again in the background (0: looked at again
  first; below 0: never). A listing that fails removes nothing. That a name does not exist is believed as long.
- Whoever may have been told something else before is told what changed (`watchers`).
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import NamedTuple

import trio

from cachefs.master.attached import Attached
from cachefs.master.load import Load
from cachefs.master.mounted import MountedStore
from cachefs.master.pins import Pins
from cachefs.master.quotas import Quotas
from cachefs.master.watchers import Watchers
from cachefs.master.writer import Writer
from cachefs.meta import Found, Inode, Merged, MetaStore, Mount, check_mounts, is_below, normalise_mount_path
from cachefs.model import (
    NO_INO,
    ROOT_INO,
    Attr,
    ConfigError,
    Entry,
    Ino,
    IsADirectory,
    NotADirectory,
    NotFoundError,
    StaleError,
    UnavailableError,
    UnderStoreError,
)
from cachefs.net.flights import Flights
from cachefs.ufs import UnderStore
from cachefs.ufs.base import is_file_name
from cachefs.wire.messages import AttrReply, LoadProgress, NextLocations, ObjectLocation, RefreshReply

logger = logging.getLogger(__name__)

_CHUNK = 1000
_MOST_DENIED = 100_000
"""Names remembered as missing, a few hundred bytes each."""
_REFRESHED_AT_ONCE = 8
_PROGRESS_EVERY_S = 0.5
NS_PER_S = 1_000_000_000


class Along(NamedTuple):
    """What else is written when an under-store is attached or detached: both, or neither."""

    write: Callable[[], None]
    """In the same transaction, as of `Writer.run`."""
    then: Callable[[], None]
    """When that is committed, as of `Writer.run`."""


class _Listing:
    """A listing in progress."""

    def __init__(self) -> None:
        self.progress = trio.Event()
        self.error: Exception | None = None
        self.done = False
        self.changed = 0
        """Names that point at something else now, are new or gone."""

    def advance(self) -> None:
        self.progress.set()
        self.progress = trio.Event()


class Namespace:
    """Called from one trio thread. `nursery` owns what runs in the background."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        mounted: list[MountedStore],
        sync_interval_s: float,
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._writer = writer
        self._mounted = {each.mount.mount_id: each for each in mounted}
        self._sync_interval_s = sync_interval_s
        self._nursery = nursery
        self._listings: dict[Ino, _Listing] = {}
        self._checks: Flights[tuple[Ino, str], Attr | None] = Flights(nursery)
        self._denied: OrderedDict[tuple[Ino, str], int] = OrderedDict()
        """Names that were asked for and are missing, and the Unix time of that."""
        self._has_forgotten_denied = False
        self._attaching = trio.Lock()
        self.watchers = Watchers()
        self.attached = Attached(self._mounted, store.newest_mount())
        self.pins = Pins(store)
        self.quotas = Quotas(store)

    @property
    def listings(self) -> int:
        """Directories that are being listed."""
        return len(self._listings)

    def getattr(self, ino: Ino) -> AttrReply:
        """Raises NotFoundError for a number never given out."""
        inode = self._inode(ino)
        return AttrReply(inode.attr, not inode.live)

    def resolve(self, ino: Ino) -> ObjectLocation:
        """Raises NotFoundError, IsADirectory, and StaleError for content of a store that is no longer mounted."""
        inode = self._inode(ino)
        if inode.attr.is_dir:
            raise IsADirectory(f"inode {ino} is a directory")
        if inode.mount_id not in self._mounted:
            raise StaleError(f"inode {ino} belongs to an under-store that is no longer mounted")
        path = self._store.path_below_mount(inode)
        pinned, quota = self.pins.covers_inode(inode), self.quotas.id_of(inode)
        return ObjectLocation(inode.attr, not inode.live, inode.mount_id, path, inode.tag, pinned, quota)

    def resolve_next(self, ino: Ino, after: Ino, count: int) -> NextLocations:
        """Files beside `ino`, of the next `count` entries after inode `after`. Raises NotFoundError."""
        inode = self._inode(ino)
        directory = self._store.get(inode.parent)
        if directory is None or directory.mount_id not in self._mounted:
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
        directory, mounted = await self._settled(parent)
        if not is_file_name(name):
            # "..", "a/b": below another directory, or outside of the store.
            return None
        known = self._store.child(parent, name)
        if mounted is None or (known is not None and known.mount_id != directory.mount_id):
            # Above the mounts, or a mount point: nobody else knows these.
            return known.attr if known else None
        if known is not None:
            if self._is_fresh(known.checked_ns) or self._is_fresh(directory.listed_ns):
                return known.attr
            if self._sync_interval_s > 0:
                if directory.listed_ns:
                    self._start_listing(directory, mounted)
                else:
                    self._checks.start((parent, name), lambda: self._check(directory, name, mounted))
                return known.attr
        elif self._is_fresh(self._denied.get((parent, name), 0)):
            return None
        elif (parent, name) in self._denied and mounted.health.is_away:
            # Nobody waits for a store that is away only to hear what he was told before.
            mounted.serving_stale += 1
            self._checks.start((parent, name), lambda: self._check(directory, name, mounted))
            return None
        try:
            return await self._checks.join((parent, name), lambda: self._check(directory, name, mounted))
        except UnderStoreError as error:
            if known is None and (parent, name) not in self._denied:
                raise
            self._note_failure(mounted, error)
            return known.attr if known is not None else None

    async def list_dir(self, ino: Ino, after: Ino = NO_INO) -> AsyncGenerator[list[Entry], None]:
        """The entries after inode `after`, in chunks of at most 1000, by ascending inode number.

        A first listing is followed while it runs. Raises as `lookup`; after some chunks too, if the listing fails.
        """
        directory, mounted = await self._settled(ino)
        listing: _Listing | None = None
        if mounted is not None and not self._is_fresh(directory.listed_ns):
            listing = self._start_listing(directory, mounted)
            if directory.listed_ns:
                if self._sync_interval_s == 0:
                    while not listing.done:
                        await listing.progress.wait()
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
        inode = self._inode(ino)
        mounted = self._mounted.get(inode.mount_id)
        if inode.live and mounted is not None:
            directory = self._inode(inode.parent)
            await self._checks.join((inode.parent, inode.name), lambda: self._check(directory, inode.name, mounted))

    async def refresh(self, path: str, *, recursive: bool = False) -> RefreshReply:
        """Look at the under-store now: at a file, or at all names of a directory (`recursive`: also of those below it
        that were listed before). Watchers are told what changed.

        Raises NotFoundError, NotADirectory, UnderStoreError; what is known stays then.
        """
        inode = self._inode(ROOT_INO)
        parts = [part for part in path.split("/") if part]
        changed = 0
        for depth, name in enumerate(parts, 1):
            directory = self._directory(inode.attr.ino)
            known = self._store.child(directory.attr.ino, name)
            if known is None or (depth == len(parts) and known.mount_id == directory.mount_id):
                await self._look(directory, name)
                found = self._store.child(directory.attr.ino, name)
                changed += found is not None and (known is None or known.attr != found.attr)
                known = found
            if known is None:
                raise NotFoundError(f"/{'/'.join(parts[:depth])}: no such file or directory")
            inode = known
        if not inode.attr.is_dir:
            return RefreshReply(0, changed)
        listed, found_changed = await self._refresh_tree(inode.attr.ino, recursive)
        return RefreshReply(listed, changed + found_changed)

    async def _look(self, directory: Inode, name: str) -> None:
        """Ask the under-store for a name, whatever is known of it. Raises UnderStoreError."""
        mounted = self._mounted.get(directory.mount_id)
        if mounted is not None and is_file_name(name):
            key = (directory.attr.ino, name)
            if key in self._checks:
                # That one may have looked before what the asker wants seen.
                await self._checks.join(key, lambda: self._check(directory, name, mounted))
            await self._checks.join(key, lambda: self._check(directory, name, mounted))

    async def _refresh_tree(self, root: Ino, recursive: bool) -> tuple[int, int]:
        """(directories listed, names changed)."""
        listed = changed = 0
        todo = [root]
        while todo:
            batch, todo = todo[:_REFRESHED_AT_ONCE], todo[_REFRESHED_AT_ONCE:]
            listings = [listing for ino in batch if (listing := await self._list_again(ino)) is not None]
            for listing in listings:
                while not listing.done:
                    await listing.progress.wait()
                if listing.error is not None:
                    raise listing.error
                listed += 1
                changed += listing.changed
            if recursive:
                for ino in batch:
                    todo += await self._listed_below(ino)
        return listed, changed

    async def _list_again(self, ino: Ino) -> _Listing | None:
        """A listing that begins now; None for what is above the mounts, or gone meanwhile."""
        while (running := self._listings.get(ino)) is not None:
            await running.progress.wait()
        directory = self._inode(ino)
        mounted = self._mounted.get(directory.mount_id)
        if mounted is None or not directory.live:
            return None
        return self._start_listing(directory, mounted)

    async def _listed_below(self, ino: Ino) -> list[Ino]:
        """Directories right below that are worth looking at again: others are listed anyway when they are asked for."""
        found = []
        after = NO_INO
        while entries := self._store.children(ino, after, _CHUNK):
            for entry in entries:
                if entry.attr.is_dir:
                    directory = self._inode(entry.attr.ino)
                    if directory.listed_ns or directory.mount_id not in self._mounted:
                        found.append(entry.attr.ino)
            after = entries[-1].attr.ino
            await trio.lowlevel.checkpoint()
        return found

    async def load(self, path: str) -> AsyncGenerator[LoadProgress, None]:
        """List a directory and everything below it that is not fresh, telling how far that is; the last is the result.

        Raises NotFoundError, NotADirectory, UnderStoreError about the path itself.
        """
        root = (await self.resolve_path(path)).attr.ino
        self._directory(root)

        def path_of(ino: Ino) -> str:
            return self._store.path(self._inode(ino))

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
        directory, mounted = await self._settled(ino)
        if mounted is None or self._is_fresh(directory.listed_ns):
            return
        listing = self._start_listing(directory, mounted)
        while not listing.done:
            await listing.progress.wait()
        if listing.error is not None:
            raise listing.error

    @property
    def is_looking(self) -> bool:
        """Whether an under-store is being asked, by whomever."""
        return bool(self._listings) or len(self._checks) > 0

    # ---- under-stores come and go ----------------------------------------------------------------------------------

    def mounted(self) -> list[MountedStore]:
        return list(self._mounted.values())

    def mounted_at(self, path: str) -> MountedStore:
        """What is attached at a path. Raises ConfigError."""
        path = normalise_mount_path(path, "PATH")
        for each in self._mounted.values():
            if each.mount.path == path:
                return each
        paths = ", ".join(sorted(each.mount.path for each in self._mounted.values()))
        raise ConfigError("PATH", path, f"one that an under-store is attached at: {paths}")

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
        root = self._directory(outer.mount.root_ino)
        name = path.removeprefix(outer.mount.path.rstrip("/")).split("/")[1]
        leaves_at = f"{outer.mount.path.rstrip('/')}/{name}"
        known = self._store.child(root.attr.ino, name)
        if known is None or known.mount_id == root.mount_id:
            await self._look(root, name)
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
            self.attached.added(mount.mount_id)
            if new is None:
                # What was a directory above mounts has other names now.
                self.watchers.tell_everything()
            else:
                self._denied.pop(new, None)
                self.watchers.tell(new[0], [new[1]])
            self._note_change(None)
            if along is not None:
                along.then()

        def write() -> Mount:
            if along is not None:
                along.write()
            return self._store.add_mount(path, ufs.origin, url, options)

        async with self._attaching:
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
            self.attached.renewed()
            along.then()

        async with self._attaching:
            mounted.check_attached()
            await self._writer.run(write, then=reopened)

    def _first_missing(self, path: str) -> tuple[Ino, str] | None:
        """(directory, name) of the first part of a path that does not exist, as far as is known."""
        ino = ROOT_INO
        for name in [part for part in path.split("/") if part]:
            known = self._store.child(ino, name)
            if known is None:
                return ino, name
            ino = known.attr.ino
        return None

    async def detach(self, mounted: MountedStore, along: Along | None = None) -> None:
        """Take an under-store out of the namespace, for good. Watchers are told to believe nothing they know, since all
        names below it are gone. What is open there is known by number as before, and superseded.
        """

        def detached(_: None) -> None:
            mounted.let_go()
            self.attached.removed(mounted.mount.mount_id)
            self.watchers.tell_everything()
            self._note_change(None)
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

        async with self._attaching:
            del self._mounted[mounted.mount.mount_id]
            mounted.remove()
            await self._writer.run(write, then=detached, otherwise=kept)

    async def _settled(self, ino: Ino) -> tuple[Inode, MountedStore | None]:
        """A directory, and the store it is in; None above the mounts. One that is just being attached or removed is
        waited for: nobody is told that it is empty. Raises as `_directory`.
        """
        directory = self._directory(ino)
        if directory.mount_id and directory.mount_id not in self._mounted:
            async with self._attaching:
                directory = self._directory(ino)
        return directory, self._mounted.get(directory.mount_id)

    # ---- looking at the under-store --------------------------------------------------------------------------------

    async def _check(self, directory: Inode, name: str, mounted: MountedStore) -> Attr | None:
        """One name: ask the under-store, and write what it says."""
        parent_path = self._store.path_below_mount(directory)
        path = f"{parent_path}/{name}" if parent_path else name
        ino = directory.attr.ino
        asked_ns = time.time_ns()
        try:
            with mounted.looking():
                info = await mounted.ufs.stat(path)
        except NotFoundError:
            mounted.check_attached()
            if self._store.child(ino, name) is not None:
                await self._writer.run(lambda: self._store.remove_child(ino, name))
                self.watchers.tell(ino, [name])
                self._note_change(directory)
            self._deny(ino, name, asked_ns)
            mounted.well()
            return None
        mounted.check_attached()
        merged = await self._writer.run(
            lambda: self._store.put_child(directory, mounted.mount.origin, Found(name, info))
        )
        self._tell(directory, merged)
        return merged.entries[0].attr

    def _deny(self, directory: Ino, name: str, asked_ns: int) -> None:
        self._denied[(directory, name)] = asked_ns
        self._denied.move_to_end((directory, name))
        if len(self._denied) > _MOST_DENIED:
            self._denied.popitem(last=False)
            # Whoever was told that there is no such name cannot be told of it by name any more.
            self._has_forgotten_denied = True

    def _tell(self, directory: Inode, merged: Merged) -> None:
        """Tell of what was found; of new names only where somebody may have been told that they do not exist."""
        ino = directory.attr.ino
        denied = [name for name in merged.new if self._denied.pop((ino, name), None) is not None]
        is_known = directory.listed_ns or self._has_forgotten_denied
        self.watchers.tell(ino, merged.moved + (merged.new if is_known else denied))
        if merged.moved or merged.new:
            self._note_change(directory)

    def _start_listing(self, directory: Inode, mounted: MountedStore) -> _Listing:
        """The listing of a directory that is running, or a new one; it goes on whether anybody follows or not."""
        ino = directory.attr.ino
        listing = self._listings.get(ino)
        if listing is None:
            listing = self._listings[ino] = _Listing()
            self._nursery.start_soon(self._run_listing, directory, mounted, listing)
        return listing

    async def _run_listing(self, directory: Inode, mounted: MountedStore, listing: _Listing) -> None:
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
                self.watchers.tell(directory.parent, [directory.name])
                self._note_change(parent)
            elif directory.listed_ns:
                self._note_failure(mounted, error)
        except UnderStoreError as error:
            listing.error = error
            if directory.listed_ns:
                self._note_failure(mounted, error)
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
            del self._listings[ino]
            listing.advance()

    async def _list(self, directory: Inode, mounted: MountedStore, listing: _Listing) -> None:
        store, ino, origin = self._store, directory.attr.ino, mounted.mount.origin
        started_ns = time.time_ns()
        number = await self._writer.run(store.begin_listing)
        async with mounted.ufs.list_dir(store.path_below_mount(directory)) as chunks:
            async for chunk in chunks:
                found = [Found(info.path.rpartition("/")[2], info) for info in chunk]

                def add(found: list[Found] = found) -> Merged:
                    return store.add_listed(directory, origin, found, number)

                mounted.check_attached()
                merged = await self._writer.run(add)
                listing.changed += len(merged.new) + len(merged.moved)
                self._tell(directory, merged)
                listing.advance()
        after: Ino | None = NO_INO
        while after is not None:
            mounted.check_attached()
            after, gone = await self._writer.run(partial(store.drop_unseen, ino, number, after, _CHUNK))
            listing.changed += len(gone)
            self.watchers.tell(ino, gone)
            if gone:
                self._note_change(directory)
        await self._writer.run(lambda: store.end_listing(ino, started_ns))

    def _note_change(self, directory: Inode | None) -> None:
        """As `Pins.note_change`."""
        self.pins.note_change(directory)
        self.quotas.note_change(directory)

    # ---- helpers ---------------------------------------------------------------------------------------------------

    def _inode(self, ino: Ino) -> Inode:
        inode = self._store.get(ino)
        if inode is None:
            raise NotFoundError(f"inode {ino} does not exist")
        return inode

    def _directory(self, ino: Ino) -> Inode:
        inode = self._inode(ino)
        if not inode.attr.is_dir:
            raise NotADirectory(f"inode {ino} is not a directory")
        if not inode.live:
            raise StaleError(f"directory {ino} is gone from the under-store")
        return inode

    def _is_fresh(self, checked_ns: int) -> bool:
        if checked_ns == 0:
            return False
        if self._sync_interval_s < 0:
            return True
        # Checked in the future: the clock was set back since, and nobody knows how long ago that was.
        return 0 <= time.time_ns() - checked_ns < self._sync_interval_s * NS_PER_S

    def _note_failure(self, mounted: MountedStore, error: Exception) -> None:
        mounted.serving_stale += 1
        if isinstance(error, NotFoundError):
            # A root that is gone is no answer of a store that is well.
            mounted.health.failed(error)
        if not mounted.is_told:
            mounted.is_told = True
            logger.warning("under-store fails, serving what is known mount=%s error=%s", mounted.mount.path, error)
