"""The file system: what a driver asks, answered from the client library.

Nodes are inode numbers, but for node 1, which is the root of the mounted subtree whatever its number.

How a file is opened (the kernel allows one mode per inode at a time, from the first OPEN to the last RELEASE):

    others have it open?  by passthrough -> passthrough, with the same backing id
                          cached         -> cached
    sealed on this node                  -> passthrough
    size <= open_wait                    -> have the worker promote it, then passthrough
    otherwise, or no room for it         -> cached: READs are answered from what the worker confirms
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from cachefs.client import Client, ContentReader, DirReader
from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fuse.protocol import (
    ROOT_NODE,
    AttrReply,
    DirEntry,
    EntryReply,
    OpenDirReply,
    OpenReply,
    StatfsReply,
)
from cachefs.model import Attr, Entry, Ino, MiB, NotFoundError, StaleError

logger = logging.getLogger(__name__)

_DIR_CHUNK = 512


@dataclass(frozen=True)
class OperationsConfig:
    open_wait_bytes: int = 8 * MiB
    """Files up to this size are made local before their open returns: they never cost a READ."""
    passthrough: bool = True
    """Off: every file is read in cached mode. For kernels before 6.9, and for comparison."""


class _Open:
    """An inode that is open: its mode and its handles."""

    def __init__(self, attr: Attr, backing_id: int | None, reader: ContentReader | None) -> None:
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
        root: Ino,
        backings: BackingRegistry,
        config: OperationsConfig,
        nursery: trio.Nursery,
    ) -> None:
        self._client = client
        self._metadata = client.metadata
        self._root = root
        self._backings = backings
        self._passthrough = config.passthrough
        self._config = config
        self._nursery = nursery
        self._handles = itertools.count(1)
        self._open: dict[Ino, _Open] = {}
        self._by_handle: dict[int, _Open] = {}
        self._dirs: dict[int, DirReader] = {}

    def set_passthrough(self, offered: bool) -> None:
        """What INIT told: whether the kernel can read backing files by itself on this connection."""
        self._passthrough = self._passthrough and offered

    # ---- names and attributes --------------------------------------------------------------------------------------

    def lookup_nowait(self, parent: int, name: bytes) -> EntryReply:
        return self._entry(self._metadata.lookup_nowait(self._ino(parent), _decode(name)))

    async def lookup(self, parent: int, name: bytes) -> EntryReply:
        return self._entry(await self._metadata.lookup(self._ino(parent), _decode(name)))

    def _entry(self, attr: Attr | None) -> EntryReply:
        ttl_s = self._metadata.ttl_s
        if attr is None:
            return EntryReply(0, None, ttl_s, ttl_s)
        return EntryReply(self._node(attr.ino), attr, ttl_s, ttl_s)

    def getattr_nowait(self, node: int) -> AttrReply:
        ino = self._ino(node)
        opened = self._open.get(ino)
        # Of what is open we know all there is to know, whether the master is there or not.
        attr = opened.attr if opened is not None else self._metadata.attr_nowait(ino)
        return AttrReply(node, attr, self._metadata.ttl_s)

    async def getattr(self, node: int) -> AttrReply:
        return AttrReply(node, await self._metadata.attr(self._ino(node)), self._metadata.ttl_s)

    # ---- files -----------------------------------------------------------------------------------------------------

    def open_nowait(self, node: int, flags: int) -> OpenReply:
        attr = self._metadata.current_nowait(self._ino(node))
        reply = self._join_or_pass(attr)
        if reply is not None:
            return reply
        if self._worth_waiting_for(attr):
            raise trio.WouldBlock
        return self._open_cached(attr)

    async def open(self, node: int, flags: int) -> OpenReply:
        attr = await self._metadata.current(self._ino(node))
        reply = self._join_or_pass(attr)
        if reply is None and self._worth_waiting_for(attr):
            try:
                await self._client.promote(attr.ino)
            except StaleError:
                self._metadata.expire(attr.ino)
                raise
            # Others may have opened it while we waited: decide again, and without waiting in between.
            reply = self._join_or_pass(attr)
        return reply or self._open_cached(attr)

    def _worth_waiting_for(self, attr: Attr) -> bool:
        return self._passthrough and 0 < attr.size_bytes <= self._config.open_wait_bytes and bool(attr.key)

    def _join_or_pass(self, attr: Attr) -> OpenReply | None:
        """Open in the mode the inode is open in, or by passthrough if it is sealed here; None if neither."""
        opened = self._open.get(attr.ino)
        if opened is None:
            backing_id = self._register_sealed(attr)
            if backing_id is None:
                return None
            opened = self._open[attr.ino] = _Open(attr, backing_id, None)
        return self._reply(opened)

    def _open_cached(self, attr: Attr) -> OpenReply:
        opened = self._open.get(attr.ino)
        if opened is None:
            opened = self._open[attr.ino] = _Open(attr, None, self._client.open_content(attr))
        return self._reply(opened)

    def _reply(self, opened: _Open) -> OpenReply:
        handle = next(self._handles)
        opened.handles.add(handle)
        self._by_handle[handle] = opened
        self._client.count_open(opened.attr, passthrough=opened.backing_id is not None)
        return OpenReply(handle, opened.backing_id, True)

    def _register_sealed(self, attr: Attr) -> int | None:
        """A backing id for the sealed file of this content, if it is on this node: an open and one ioctl."""
        if not self._passthrough:
            return None
        fd = self._client.open_sealed(attr)
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
        return self._reader(fh).read_nowait(offset, size)

    async def read(self, fh: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        reader = self._reader(fh)
        try:
            return await reader.read(offset, size)
        except StaleError:
            self._metadata.expire(reader.attr.ino)
            raise

    def _reader(self, fh: int) -> ContentReader:
        opened = self._by_handle.get(fh)
        if opened is None or opened.reader is None:
            raise NotFoundError(f"handle {fh} is not open for reading through us")
        return opened.reader

    def release(self, node: int, fh: int) -> None:
        opened = self._by_handle.pop(fh, None)
        if opened is None:
            return
        opened.handles.discard(fh)
        if opened.handles:
            return
        del self._open[opened.attr.ino]
        if opened.reader is not None:
            opened.reader.close()
        if opened.backing_id is not None:
            try:
                self._backings.release(opened.backing_id)
            except OSError as error:
                logger.error("backing file not released id=%d error=%s", opened.backing_id, error)

    # ---- directories -----------------------------------------------------------------------------------------------

    def opendir_nowait(self, node: int) -> OpenDirReply:
        handle = next(self._handles)
        self._dirs[handle] = DirReader(self._metadata, self._ino(node), self._nursery)
        return OpenDirReply(handle)

    async def opendir(self, node: int) -> OpenDirReply:
        return self.opendir_nowait(node)

    def readdir_nowait(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        reader = self._dir(fh)
        return self._dir_entries(reader.read_nowait(Ino(offset), min(limit, _DIR_CHUNK)))

    async def readdir(self, fh: int, offset: int, limit: int) -> Sequence[DirEntry]:
        reader = self._dir(fh)
        return self._dir_entries(await reader.read(Ino(offset), min(limit, _DIR_CHUNK)))

    def _dir(self, fh: int) -> DirReader:
        reader = self._dirs.get(fh)
        if reader is None:
            raise NotFoundError(f"directory handle {fh} is not open")
        return reader

    def _dir_entries(self, entries: list[Entry]) -> list[DirEntry]:
        ttl_s = self._metadata.ttl_s
        return [
            DirEntry(name.encode(), self._node(attr.ino), attr.kind, attr.ino, attr, ttl_s, ttl_s)
            for name, attr in ((entry.name, entry.attr) for entry in entries)
        ]

    def releasedir(self, fh: int) -> None:
        reader = self._dirs.pop(fh, None)
        if reader is not None:
            reader.close()

    # ---- the rest --------------------------------------------------------------------------------------------------

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
        for reader in self._dirs.values():
            reader.close()
        self._open.clear()
        self._by_handle.clear()
        self._dirs.clear()

    def _ino(self, node: int) -> Ino:
        return self._root if node == ROOT_NODE else Ino(node)

    def _node(self, ino: Ino) -> int:
        return ROOT_NODE if ino == self._root else ino


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise NotFoundError("names are UTF-8 here") from None
