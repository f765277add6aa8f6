"""The file system: what a driver asks, answered from the client library.

Nodes are inode numbers, but for node 1, which is the root of the mounted subtree whatever its number. When the master
has lost its database, numbers begin anew: node = number + (epoch << 48), where the epoch counts the namespaces this
mount has seen. A node of an earlier epoch is ESTALE, except that what is open of it goes on; node 1 is looked up anew.

How a file is opened (the kernel allows one mode per inode at a time, from the first OPEN to the last RELEASE):

    others have it open?  by passthrough -> passthrough, with the same backing id
                          cached         -> cached
    sealed on this node                  -> passthrough
    size <= open_wait                    -> have the worker promote it, then passthrough
    otherwise, or no room for it         -> cached: READs are answered from what the worker confirms

In no-open mode nothing is opened: a READ names the node (see `node_reads`).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from cachefs.client import ChangedName, Client, ContentReader, DirReader, View
from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.counts import OperationCounts
from cachefs.fuse.kept import Found, Kept
from cachefs.fuse.modes import ChosenMode, OpenMode
from cachefs.fuse.node_reads import NodeReads
from cachefs.fuse.protocol import (
    ROOT_NODE,
    AttrReply,
    DirEntry,
    EntryReply,
    OpenDirReply,
    OpenReply,
    StatfsReply,
)
from cachefs.model import (
    Attr,
    BlockId,
    ConfigError,
    Entry,
    GiB,
    Ino,
    MiB,
    NamespaceChangedError,
    NotADirectory,
    NotFoundError,
    StaleError,
    write_size,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_DIR_CHUNK = 512
_EPOCH_SHIFT = 48


MAX_OPEN_WAIT = GiB
"""A second on the fastest networks, half a minute on usual ones. What is larger is read while it arrives."""


@dataclass(frozen=True)
class OperationsConfig:
    open_wait_bytes: int = 8 * MiB
    """Files up to this size are made local before their open returns: they never cost a READ."""
    open_mode: OpenMode = OpenMode.AUTO
    uid: int | None = None
    """Shown as the owner of everything; None: what the under-store says."""
    gid: int | None = None
    umask: int = 0
    """Permission bits that nobody gets."""

    def __post_init__(self) -> None:
        for key in ("uid", "gid"):
            number = getattr(self, key)
            if number is not None and not 0 <= number < 2**32 - 1:
                raise ConfigError(key, number, "0 to 4294967294")
        if not 0 <= self.open_wait_bytes <= MAX_OPEN_WAIT:
            accepted = "0 to 1G: whoever opens a file would wait for all of it, and takes that for a hang"
            raise ConfigError("open_wait", write_size(self.open_wait_bytes), accepted)
        if not 0 <= self.umask <= 0o777:
            raise ConfigError("umask", f"{self.umask:o}", "0 to 777, octal")


class Notices(Protocol):
    """How a driver takes back what it told the kernel."""

    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool) -> None: ...

    def notify_everything(self) -> None: ...


class _Open:
    """A node that is open: its mode and its handles."""

    def __init__(self, node: int, view: View, attr: Attr, backing_id: int | None, reader: ContentReader | None) -> None:
        self.node = node
        self.view = view
        self.attr = attr
        self.backing_id = backing_id
        self.reader = reader
        # A set, not a counter: a RELEASE may come twice.
        self.handles: set[int] = set()


class CacheOperations:
    """Implements `protocol.Operations`. Called from one trio thread; `nursery` has the streams of open directories."""

    def __init__(
        self,
        client: Client,
        path: str,
        config: OperationsConfig,
        nursery: trio.Nursery,
        kept: Kept | None = None,
    ) -> None:
        """`path`: the directory of the namespace that is mounted. `kept`: where it is recorded what is open."""
        self._client = client
        self._path = path
        self._root: tuple[View, Ino] | None = None
        self._backings: BackingRegistry | None = None
        """None: no file was ever opened by passthrough."""
        self._passthrough = False
        self._node_reads: NodeReads | None = None
        self._config = config
        self._changes_owner = (config.uid, config.gid, config.umask) != (None, None, 0)
        self._nursery = nursery
        self._kept = kept
        self._restored: View | None = None
        """The namespace that handles of earlier servers are of."""
        self._first_handle = kept.begin_generation() if kept is not None else 0
        self._handles = itertools.count(self._first_handle + 1)
        self.on_place: Callable[[], None] = lambda: None
        """Called when it is known under which numbers nodes are told: before any is."""
        self._open: dict[int, _Open] = {}
        self._by_handle: dict[int, _Open] = {}
        self._dirs: dict[int, tuple[View, DirReader]] = {}
        self.counts = OperationCounts()

    @property
    def open_files(self) -> int:
        """Handles."""
        return len(self._by_handle)

    @property
    def servers(self) -> int:
        """Of this mount until now, this one included."""
        return self._kept.generation if self._kept is not None else 1

    def set_mode(self, chosen: ChosenMode, backings: BackingRegistry) -> None:
        """What was decided after INIT, and again for other tiers; before, files are opened in cached mode."""
        self._passthrough = chosen.mode is OpenMode.PASSTHROUGH
        if self._passthrough:
            self._backings = backings
            self._client.open_sealed_only_in(chosen.tiers)
        if chosen.mode is OpenMode.NO_OPEN:
            self._node_reads = NodeReads(self._client, self._config.open_wait_bytes)
            self._nursery.start_soon(self._node_reads.close_idle)

    def watch(self, notices: Notices) -> None:
        """From now on take back what the kernel was told of names that change."""

        def on_changed(view: View, changed: list[ChangedName]) -> None:
            if view is self._client.view:
                self.counts.changed_names += len(changed)
                for directory, name, was_directory in changed:
                    notices.notify_inval_entry(self._node(view, directory), name.encode(), expire_only=was_directory)

        def on_everything() -> None:
            self.on_place()
            self.counts.changed_everything += 1
            notices.notify_everything()

        self._client.on_changed = on_changed
        self._client.on_everything = on_everything

    def known_names(self) -> list[tuple[int, bytes]]:
        """(parent node, name) of all that may have been told."""
        view = self._client.view
        return [(self._node(view, directory), name.encode()) for directory, name in view.metadata.names()]

    # ---- taking over from an earlier server of this connection -------------------------------------------------------

    @property
    def root(self) -> Ino | None:
        """The number of the mounted directory, once it is known in the namespace as it is now."""
        return self._root[1] if self._root is not None and self._root[0] is self._client.view else None

    def restore(self, root: Ino | None, found: Found, backings: BackingRegistry) -> None:
        """Go on with what is open. The earlier server must be gone.

        What is open in cached mode goes on as far as the worker has it, or the under-store still does.
        """
        view = self._client.view
        if root is not None:
            self._root = view, root
        self._backings = backings
        self._restored = view
        for kept in found.nodes:
            reader = None
            if kept.backing_id is None and kept.node >> _EPOCH_SHIFT == view.epoch:
                reader = view.open_content(kept.attr)
            opened = self._open[kept.node] = _Open(kept.node, view, kept.attr, kept.backing_id, reader)
            opened.handles |= kept.handles
            self._by_handle.update(dict.fromkeys(kept.handles, opened))
        for backing_id in found.unused_ids:
            self._release_backing(backing_id)

    # ---- nodes -----------------------------------------------------------------------------------------------------

    def _place_nowait(self, node: int) -> tuple[View, Ino]:
        """The namespace and number of a node. Raises StaleError for a node of an earlier namespace."""
        view = self._client.view
        if node == ROOT_NODE:
            if self._root is None or self._root[0] is not view:
                raise trio.WouldBlock
            return self._root
        if node >> _EPOCH_SHIFT != view.epoch:
            raise NamespaceChangedError("the master has another namespace now")
        return view, Ino(node & ((1 << _EPOCH_SHIFT) - 1))

    async def _place(self, node: int) -> tuple[View, Ino]:
        """As `_place_nowait`, looking up the root where needed. Raises as `Metadata.lookup`."""
        while True:
            try:
                return self._place_nowait(node)
            except trio.WouldBlock:
                view = self._client.view
            try:
                root = await view.metadata.resolve(self._path)
            except NamespaceChangedError:
                if view is self._client.view:
                    raise
                continue
            if not root.is_dir:
                raise NotADirectory(f"{self._path} is not a directory")
            if view is self._client.view:
                self._root = view, root.ino
                self.on_place()

    async def _ask(self, node: int, ask: Callable[[View, Ino], Awaitable[T]]) -> T:
        """What `ask` finds about a node. When the namespace changes meanwhile: about the root in the new one, or else
        NamespaceChangedError.
        """
        while True:
            view, ino = await self._place(node)
            try:
                found = await ask(view, ino)
            except NamespaceChangedError:
                if view is self._client.view:
                    raise
            else:
                if view is self._client.view:
                    return found

    def _node(self, view: View, ino: Ino) -> int:
        if self._root is not None and self._root[0] is view and ino == self._root[1]:
            return ROOT_NODE
        return ino + (view.epoch << _EPOCH_SHIFT)

    # ---- names and attributes --------------------------------------------------------------------------------------

    async def resolve_root(self) -> None:
        """Raises NotFoundError and NotADirectory about the path, TransportError."""
        await self._place(ROOT_NODE)

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        view, ino = self._place_nowait(parent)
        return self._entry(view, view.metadata.lookup_nowait(ino, _decode(name)))

    async def lookup(self, parent: int, name: bytes) -> EntryReply:
        async def ask(view: View, ino: Ino) -> EntryReply:
            return self._entry(view, await view.metadata.lookup(ino, _decode(name)))

        return await self._ask(parent, ask)

    def _entry(self, view: View, attr: Attr | None) -> EntryReply:
        if attr is None:
            return EntryReply(0, None, 0.0, view.metadata.negative_ttl_s)
        metadata = view.metadata
        return EntryReply(self._node(view, attr.ino), self._shown(attr), metadata.ttl_s, metadata.entry_ttl_s)

    def _shown(self, attr: Attr) -> Attr:
        """With the owner and the permissions that were asked for."""
        if not self._changes_owner:
            return attr
        config = self._config
        uid = attr.uid if config.uid is None else config.uid
        gid = attr.gid if config.gid is None else config.gid
        return Attr(attr.ino, attr.kind, attr.size_bytes, attr.mtime_ns, attr.mode & ~config.umask, uid, gid, attr.key)

    def getattr_nowait(self, node: int) -> AttrReply:
        opened = self._open.get(node)
        if opened is not None:
            # Of what is open we know all there is to know, whether the master is there or not.
            return AttrReply(node, self._shown(opened.attr), opened.view.metadata.ttl_s)
        view, ino = self._place_nowait(node)
        return AttrReply(node, self._shown(view.metadata.attr_nowait(ino)), view.metadata.ttl_s)

    async def getattr(self, node: int) -> AttrReply:
        async def ask(view: View, ino: Ino) -> AttrReply:
            return AttrReply(node, self._shown(await view.metadata.attr(ino)), view.metadata.ttl_s)

        return await self._ask(node, ask)

    # ---- files -----------------------------------------------------------------------------------------------------

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        view, ino = self._place_nowait(node)
        attr = view.metadata.current_nowait(ino)
        reply = self._join_or_pass(node, view, attr)
        if reply is not None:
            return reply
        if self._worth_waiting_for(attr):
            raise trio.WouldBlock
        return self._open_cached(node, view, attr)

    async def open(self, node: int, flags: int, pid: int) -> OpenReply:
        view, ino = await self._place(node)
        attr = await view.metadata.current(ino)
        reply = self._join_or_pass(node, view, attr)
        if reply is None and self._worth_waiting_for(attr):
            try:
                await view.promote(ino, reader=pid)
            except StaleError:
                view.metadata.expire(ino)
                raise
            # Others may have opened it while we waited: decide again, and without waiting in between.
            reply = self._join_or_pass(node, view, attr)
        return reply or self._open_cached(node, view, attr)

    def _worth_waiting_for(self, attr: Attr) -> bool:
        return self._passthrough and 0 < attr.size_bytes <= self._config.open_wait_bytes and bool(attr.key)

    def _join_or_pass(self, node: int, view: View, attr: Attr) -> OpenReply | None:
        """Open in the mode the node is open in, or by passthrough if it is sealed here; None if neither.

        Raises NamespaceChangedError if the namespace was left while the caller waited.
        """
        if view is not self._client.view:
            raise NamespaceChangedError("the master has another namespace now")
        opened = self._open.get(node)
        if opened is None:
            backing_id = self._register_sealed(view, attr)
            if backing_id is None:
                return None
            opened = self._opened(node, view, attr, backing_id)
        return self._reply(opened)

    def _open_cached(self, node: int, view: View, attr: Attr) -> OpenReply:
        opened = self._open.get(node)
        if opened is None:
            opened = self._opened(node, view, attr, None)
        return self._reply(opened)

    def _opened(self, node: int, view: View, attr: Attr, backing_id: int | None) -> _Open:
        """Raises OSError (ENFILE)."""
        if self._kept is not None:
            try:
                self._kept.add_node(node, attr, backing_id)
            except OSError:
                if backing_id is not None:
                    self._release_backing(backing_id)
                raise
        reader = view.open_content(attr) if backing_id is None else None
        opened = self._open[node] = _Open(node, view, attr, backing_id, reader)
        return opened

    def _reply(self, opened: _Open) -> OpenReply:
        handle = next(self._handles)
        opened.handles.add(handle)
        self._by_handle[handle] = opened
        is_passthrough = opened.backing_id is not None
        self._client.count_open(opened.attr, passthrough=is_passthrough)
        if is_passthrough:
            self.counts.passthrough_opens += 1
        else:
            self.counts.cached_opens += 1
        return OpenReply(handle, opened.backing_id, True)

    def _register_sealed(self, view: View, attr: Attr) -> int | None:
        """A backing id for the sealed file of this content, if it is on this node: an open and one ioctl."""
        if self._backings is None or not self._passthrough:
            return None
        fd = view.open_sealed(attr)
        if fd is None:
            return None
        try:
            # The shared lock taken on the descriptor stays with the kernel's reference after our close, and tells
            # eviction that somebody reads the file.
            return self._backings.register(fd)
        except PassthroughUnavailable as error:
            logger.warning("passthrough is off from now on, files are read in cached mode reason=%s", error.reason)
            self._passthrough = False
            return None
        finally:
            os.close(fd)

    def read_nowait(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        if self._node_reads is not None:
            data = self._node_reads.read_nowait(*self._place_nowait(fh), offset, size)
        else:
            data = self._read_open(fh)[1].read_nowait(offset, size)
        self.counts.read_bytes += len(data)
        return data

    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        data = await self._read(fh, offset, size)
        self.counts.read_bytes += len(data)
        return data

    async def _read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        if self._node_reads is not None:
            return await self._node_reads.read(*await self._place(fh), offset, size)
        opened, reader = self._read_open(fh)
        try:
            return await reader.read(offset, size)
        except StaleError:
            opened.view.metadata.expire(reader.attr.ino)
            raise

    def _read_open(self, fh: int) -> tuple[_Open, ContentReader]:
        opened = self._by_handle.get(fh)
        if opened is not None and opened.reader is None and opened.backing_id is None:
            raise NamespaceChangedError("the file was opened in an earlier namespace, by an earlier server")
        if opened is None or opened.reader is None:
            raise NotFoundError(f"handle {fh} is not open for reading through us")
        return opened, opened.reader

    def release(self, node: int, fh: int) -> None:
        opened = self._by_handle.pop(fh, None)
        if opened is None:
            return
        opened.handles.discard(fh)
        if self._kept is not None:
            self._kept.remove_handle(fh)
        if opened.handles:
            return
        del self._open[opened.node]
        if opened.reader is not None:
            opened.reader.close()
        if opened.backing_id is not None:
            self._release_backing(opened.backing_id)
        if self._kept is not None:
            self._kept.remove_node(opened.node)

    def _release_backing(self, backing_id: int) -> None:
        if self._backings is not None:
            try:
                self._backings.release(backing_id)
            except OSError as error:
                logger.error("backing file not released id=%d error=%s", backing_id, error)

    # ---- directories -----------------------------------------------------------------------------------------------

    def opendir_nowait(self, node: int) -> OpenDirReply:
        return self._open_dir(*self._place_nowait(node))

    async def opendir(self, node: int) -> OpenDirReply:
        return self._open_dir(*await self._place(node))

    def _open_dir(self, view: View, ino: Ino) -> OpenDirReply:
        handle = next(self._handles)
        self._dirs[handle] = view, DirReader(view.metadata, ino, self._nursery)
        # The kernel keeps what it is told of a directory; once it was told all of it, it need not ask again until
        # something changes or is no longer believed.
        return OpenDirReply(handle, view.metadata.is_still_whole(ino))

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        view, reader = self._dir(fh)
        return self._dir_entries(view, reader, reader.read_nowait(Ino(offset), min(limit, _DIR_CHUNK)))

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        view, reader = self._dir(fh)
        entries = await reader.read(Ino(offset), min(limit, _DIR_CHUNK))
        self._dir(fh)
        return self._dir_entries(view, reader, entries)

    def _dir(self, fh: int) -> tuple[View, DirReader]:
        """Raises NamespaceChangedError for a directory of an earlier namespace: positions in it mean nothing now."""
        opened = self._dirs.get(fh)
        if opened is None:
            if fh <= self._first_handle:
                raise NamespaceChangedError("the directory was opened in an earlier namespace")
            raise NotFoundError(f"directory handle {fh} is not open")
        if opened[0] is not self._client.view:
            raise NamespaceChangedError("the master has another namespace now")
        return opened

    def _dir_entries(self, view: View, reader: DirReader, entries: list[Entry]) -> list[DirEntry]:
        attr_ttl_s, entry_ttl_s = view.metadata.ttl_s, view.metadata.entry_ttl_s
        return [
            # Of a name that has changed since it was listed the kernel learns no more than that.
            DirEntry(name.encode(), self._node(view, attr.ino), attr.kind, attr.ino)
            if reader.is_outdated(name)
            else DirEntry(
                *(name.encode(), self._node(view, attr.ino), attr.kind, attr.ino),
                *(self._shown(attr), attr_ttl_s, entry_ttl_s),
            )
            for name, attr in ((entry.name, entry.attr) for entry in entries)
        ]

    def adopt_directory(self, node: int, fh: int) -> None:
        view = self._restored
        if view is not None and view is self._client.view and fh <= self._first_handle and fh not in self._dirs:
            with suppress(trio.WouldBlock, NamespaceChangedError):
                self._dirs[fh] = view, DirReader(view.metadata, self._place_nowait(node)[1], self._nursery)

    def releasedir(self, fh: int) -> None:
        opened = self._dirs.pop(fh, None)
        if opened is not None:
            opened[1].close()

    # ---- the rest --------------------------------------------------------------------------------------------------

    async def xattrs(self, node: int) -> Mapping[bytes, bytes]:
        async def ask(view: View, ino: Ino) -> Mapping[bytes, bytes]:
            attr = await view.metadata.attr(ino)
            if not attr.key:
                return {}
            found = {"key": attr.key.hex()}
            cached = 0
            tiers: list[str] = []
            holders: list[str] = []
            geometry = view.cluster.geometry
            for index in range(geometry.block_count(attr.size_bytes)):
                status = await view.block_status(BlockId(attr.key, index))
                # What a file takes on its disk is rounded up to blocks of that.
                cached += min(status.cached_bytes, geometry.block_length(attr.size_bytes, index))
                tiers += [status.tier] if status.tier and status.tier not in tiers else []
                holders += [name for name in await self._client.holders(attr, index) if name not in holders]
            found |= {"cached_bytes": str(cached), "tier": ",".join(tiers), "workers": ",".join(holders)}
            return {f"user.cachefs.{name}".encode(): value.encode() for name, value in found.items()}

        return await self._ask(node, ask)

    def statfs(self) -> StatfsReply:
        # Nobody knows the size of a bucket. Zero is what file systems without one say, and df(1) leaves them out.
        return StatfsReply(4096, 0, 0, 0)

    def forget(self, node: int, lookups: int) -> None:
        """Nothing is kept per node."""

    def close(self) -> None:
        """Give back every descriptor; the kernel's references end with the connection."""
        for opened in self._open.values():
            if opened.reader is not None:
                opened.reader.close()
        for _, reader in self._dirs.values():
            reader.close()
        if self._node_reads is not None:
            self._node_reads.close()
        self._open.clear()
        self._by_handle.clear()
        self._dirs.clear()


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise NotFoundError("names are UTF-8 here") from None
