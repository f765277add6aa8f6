"""Names and attributes as a client remembers them: for `sync_interval`, and longer while the master is away.

A name points at an inode number, and the number at attributes; both expire. Since an inode names one content for good,
expired attributes are still right about it: what expires is the knowledge that a name points at it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from cachefs.client.patience import patiently
from cachefs.model import NO_INO, Attr, CachefsError, Entry, Ino, StaleError, TransportError
from cachefs.net import Pool
from cachefs.net.flights import Flights
from cachefs.wire.messages import GetAttr, ListDir, Lookup, ResolvePath

logger = logging.getLogger(__name__)

_TOUCHES = 4
"""Names asked for one by one in a directory, before the rest of it is fetched by one listing."""
_TOUCHED_DIRECTORIES = 10_000

FOREVER_S = 365 * 24 * 3600.0
"""What a TTL without end is told to the kernel as."""


class _Known(NamedTuple):
    attr: Attr
    superseded: bool
    expires: float


class _Touched(NamedTuple):
    asked: int
    expires: float


class _Name(NamedTuple):
    ino: Ino
    """NO_INO: there is no such name."""
    expires: float


class Metadata:
    """Called from one trio thread. `x_nowait` answers from memory or raises trio.WouldBlock."""

    def __init__(
        self, master: Pool, *, sync_interval_s: float, max_names: int, patience_s: float, nursery: trio.Nursery
    ) -> None:
        self.ttl_s = FOREVER_S if sync_interval_s < 0 else sync_interval_s
        """Seconds for which an answer may be believed, by us and by the kernel."""
        self._master = master
        self._max_names = max_names
        self.patience_s = patience_s
        self._attrs: OrderedDict[Ino, _Known] = OrderedDict()
        self._names: OrderedDict[tuple[Ino, str], _Name] = OrderedDict()
        self._nursery = nursery
        self._touched: OrderedDict[Ino, _Touched] = OrderedDict()
        self._lookups: Flights[tuple[Ino, str], Attr | None] = Flights(nursery)

    # ---- attributes ------------------------------------------------------------------------------------------------

    def attr_nowait(self, ino: Ino) -> Attr:
        known = self._attrs.get(ino)
        if known is None or known.expires < trio.current_time():
            raise trio.WouldBlock
        return known.attr

    async def attr(self, ino: Ino) -> Attr:
        """Of any inode, superseded or not. Raises NotFoundError, TransportError."""
        return (await self._known(ino)).attr

    def current_nowait(self, ino: Ino) -> Attr:
        """As `current`, from memory."""
        known = self._attrs.get(ino)
        if known is None or known.expires < trio.current_time():
            raise trio.WouldBlock
        if known.superseded:
            raise StaleError(f"inode {ino} is superseded")
        return known.attr

    async def current(self, ino: Ino) -> Attr:
        """Of an inode that a name points at now. Raises StaleError for a superseded one, and as `attr`."""
        known = await self._known(ino)
        if known.superseded:
            raise StaleError(f"inode {ino} is superseded")
        return known.attr

    async def _known(self, ino: Ino) -> _Known:
        known = self._attrs.get(ino)
        if known is not None and known.expires >= trio.current_time():
            return known
        try:
            reply = await patiently(
                lambda: self._master.call(GetAttr(ino)), 0 if known is not None else self.patience_s
            )
        except TransportError:
            if known is None:
                raise
            return known
        return self._remember(reply.message.attr, superseded=reply.message.superseded)

    # ---- names -----------------------------------------------------------------------------------------------------

    def lookup_nowait(self, parent: Ino, name: str) -> Attr | None:
        """What the name points at; None: no such name."""
        found = self._names.get((parent, name))
        now = trio.current_time()
        if found is None or found.expires < now:
            raise trio.WouldBlock
        if found.ino == NO_INO:
            return None
        known = self._attrs.get(found.ino)
        if known is None or known.superseded or known.expires < now:
            raise trio.WouldBlock
        return known.attr

    async def lookup(self, parent: Ino, name: str) -> Attr | None:
        """As `lookup_nowait`, asking the master where needed.

        Raises NotFoundError, NotADirectory, StaleError about the parent; UnderStoreError; TransportError.
        """
        return await self._lookups.join((parent, name), lambda: self._lookup(parent, name))

    async def _lookup(self, parent: Ino, name: str) -> Attr | None:
        found = self._names.get((parent, name))
        known = self._attrs.get(found.ino) if found is not None else None
        usable = known is not None and not known.superseded
        try:
            reply = await patiently(lambda: self._master.call(Lookup(parent, name)), 0 if usable else self.patience_s)
        except TransportError:
            if known is None or not usable:
                raise
            return known.attr
        self._touch(parent)
        attr = reply.message.attr
        if attr is None:
            self._remember_name(parent, name, NO_INO)
        else:
            self._remember_entry(parent, Entry(name, attr))
        return attr

    def _touch(self, directory: Ino) -> None:
        """Count a name that had to be asked for; at the fourth, fetch all of the directory's.

        An epoch must not be a million requests, nor a look at one name the listing of a million.
        """
        touched = self._touched.pop(directory, None)
        now = trio.current_time()
        if touched is None or touched.expires < now:
            touched = _Touched(0, now + self.ttl_s)
        touched = self._touched[directory] = touched._replace(asked=touched.asked + 1)
        if len(self._touched) > _TOUCHED_DIRECTORIES:
            self._touched.popitem(last=False)
        if touched.asked == _TOUCHES and self.ttl_s > 0:
            self._nursery.start_soon(self._prefill, directory)

    async def _prefill(self, directory: Ino) -> None:
        # More than half of the memory would push out what it brings in.
        left = self._max_names // 2
        try:
            async with self.list_dir(directory) as chunks:
                async for entries in chunks:
                    left -= len(entries)
                    if left <= 0:
                        return
        except CachefsError as error:
            logger.info("directory not fetched ino=%d error=%s", directory, error)

    async def resolve(self, path: str) -> Attr:
        """The inode at an absolute path of the namespace. Raises as `lookup`."""
        reply = await patiently(lambda: self._master.call(ResolvePath(path)), self.patience_s)
        return self._remember(reply.message.attr, superseded=reply.message.superseded).attr

    def expire(self, ino: Ino) -> None:
        """The content of this inode is no longer what its name points at: ask again before it is opened."""
        known = self._attrs.get(ino)
        if known is not None:
            self._attrs[ino] = known._replace(superseded=True)

    # ---- directories -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def list_dir(self, ino: Ino, after: Ino = NO_INO) -> AsyncGenerator[AsyncGenerator[list[Entry], None], None]:
        """The entries after inode `after`, streamed in chunks by ascending inode number; they are remembered too.

        Raises as `lookup`, at entry or between two chunks; TransportError when the master is lost in between, to be
        resumed after the last entry got.
        """
        async with self._master.stream(ListDir(ino, after)) as chunks:

            async def entries() -> AsyncGenerator[list[Entry], None]:
                async for chunk in chunks:
                    for entry in chunk.entries:
                        self._remember_entry(ino, entry)
                    yield chunk.entries

            iterator = entries()
            try:
                yield iterator
            finally:
                await iterator.aclose()

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _remember(self, attr: Attr, *, superseded: bool = False) -> _Known:
        known = _Known(attr, superseded, trio.current_time() + self.ttl_s)
        self._attrs[attr.ino] = known
        self._attrs.move_to_end(attr.ino)
        if len(self._attrs) > self._max_names:
            self._attrs.popitem(last=False)
        return known

    def _remember_entry(self, parent: Ino, entry: Entry) -> None:
        self._remember(entry.attr)
        self._remember_name(parent, entry.name, entry.attr.ino)

    def _remember_name(self, parent: Ino, name: str, ino: Ino) -> None:
        self._names[(parent, name)] = _Name(ino, trio.current_time() + self.ttl_s)
        self._names.move_to_end((parent, name))
        if len(self._names) > self._max_names:
            self._names.popitem(last=False)
