"""The under-stores this worker reads from, as the master names them, and the objects behind inodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import trio

from cachefs.model import (
    Attr,
    Ino,
    IsADirectory,
    Kind,
    NamespaceChangedError,
    NotFoundError,
    ObjectInfo,
    StaleError,
    UnavailableError,
)
from cachefs.ufs import UnderStore, open_under_store
from cachefs.ufs.files import Claim, Keep
from cachefs.wire import Request
from cachefs.wire.messages import NextLocations, ObjectLocation, Resolve, ResolveNext, StoreInfo
from cachefs.worker.master_link import MasterLink

R = TypeVar("R")

_REMEMBERED = 100_000
"""Inodes whose objects are remembered, a few hundred bytes each. They never change: an inode names one content."""


class Source(NamedTuple):
    """Where the bytes of one inode come from."""

    attr: Attr
    info: ObjectInfo
    ufs: UnderStore
    """Not the number that the master gives it: that means something else under another database."""


class Sources:
    """Opened with the stores of each registration; `nursery` holds them until the worker ends."""

    def __init__(self, master: MasterLink, nursery: trio.Nursery) -> None:
        self.namespace_id = ""
        """Of the master this worker is registered with: the one that inode numbers are of."""
        self._master = master
        self._nursery = nursery
        self._open: dict[int, UnderStore] = {}
        self._known: OrderedDict[Ino, Source] = OrderedDict()

    async def add(self, namespace_id: str, stores: list[StoreInfo]) -> None:
        """Open those that are not open yet. Numbers of inodes and stores never change their meaning under one master's
        database; with another one, everything known by number is forgotten. What is being read goes on.
        """
        if namespace_id != self.namespace_id:
            self._known.clear()
            self._open = {}
            self.namespace_id = namespace_id
        for store in stores:
            if store.store_id not in self._open:
                self._open[store.store_id] = await self._nursery.start(self._hold, store)

    async def _hold(self, store: StoreInfo, task_status: trio.TaskStatus[UnderStore]) -> None:
        async with open_under_store(store.url, store.options) as ufs:
            task_status.started(ufs)
            await trio.sleep_forever()

    async def resolve(self, ino: Ino) -> Source:
        """Raises NotFoundError, IsADirectory, StaleError, TransportError; NamespaceChangedError when the master, that
        had to be waited for, came back with another namespace.
        """
        known = self._known.get(ino)
        if known is not None:
            self._known.move_to_end(ino)
            return known
        location: ObjectLocation = await self._ask(Resolve(ino), ino)
        ufs = self._open.get(location.store_id)
        if ufs is None:
            raise UnavailableError(f"under-store {location.store_id} of {location.path} is not open on this worker")
        return self._remember(location, ufs)

    async def _ask(self, request: Request[R], ino: Ino) -> R:
        """What the master says, unless it speaks of another namespace by now: also that there is no such inode."""
        namespace_id = self.namespace_id
        try:
            found = (await self._master.call(request)).message
        except (NotFoundError, IsADirectory, StaleError):
            if self.namespace_id == namespace_id:
                raise
        else:
            if self.namespace_id == namespace_id:
                return found
        raise NamespaceChangedError(f"inode {ino} is of a namespace that the master no longer has")

    def _remember(self, location: ObjectLocation, ufs: UnderStore) -> Source:
        attr = location.attr
        info = ObjectInfo(location.path, Kind.FILE, attr.size_bytes, attr.mtime_ns, location.tag)
        source = self._known[attr.ino] = Source(attr, info, ufs)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return source

    async def resolve_next(self, ino: Ino, after: Ino, count: int) -> tuple[list[Source], Ino]:
        """Files in the directory of `ino` after inode `after`, of the next `count` entries, and how far was looked.

        Raises as `resolve`.
        """
        found: NextLocations = await self._ask(ResolveNext(ino, after, count), ino)
        located = [(each, self._open.get(each.store_id)) for each in found.files]
        return [self._remember(each, ufs) for each, ufs in located if ufs is not None], found.until

    async def read_files(
        self, wanted: Sequence[Source], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        """As `UnderStore.read_files`, of objects of one under-store."""
        return await wanted[0].ufs.read_files([source.info for source in wanted], keep, at_once, claim)

    async def read(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly those bytes of exactly that version. Raises as `UnderStore.read_range`."""
        return await source.ufs.read_range(source.info, offset, length)
