"""Names and attributes as a client remembers them: for `sync_interval`, and longer while the master is away.

A name points at an inode number, and the number at attributes; both expire. Since an inode names one content for good,
expired attributes are still right about it: what expires is the knowledge that a name points at it.

The master tells what changes (`watch`), and that is dropped before its time. An answer that was under way meanwhile may
be older than what was told: it is not remembered.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple, TypeVar

import trio

from cachefs.client.config import Timeouts
from cachefs.client.reach import MasterReach
from cachefs.client.remembered import Copied, Known, Name, Remembered
from cachefs.model import (
    NO_INO,
    Attr,
    CachefsError,
    Entry,
    Ino,
    NamespaceChangedError,
    StaleError,
    TransportError,
)
from cachefs.net import Peer, Pool
from cachefs.net.flights import Flights
from cachefs.wire import Request
from cachefs.wire.messages import Changes, GetAttr, ListDir, Lookup, ResolvePath, Watch

logger = logging.getLogger(__name__)

R = TypeVar("R")

_TOUCHES = 4
"""Names asked for one by one in a directory, before the rest of it is fetched by one listing."""
_TOUCHED_DIRECTORIES = 10_000
_WHOLE_DIRECTORIES = 10_000
_CHANGES_FOLLOWED = 10_000
"""Names that changed in a directory while it is being listed; with more, nothing of the listing is believed."""
_STALE_NAMES = 100_000
"""Of a directory that is listed from memory: sorting them takes a third of a second, in which nobody is answered."""
_STALE_CHUNK = 1000

_PAST = -1.0

FOREVER_S = 365 * 24 * 3600.0
"""What a TTL without end is told to the kernel as."""


class _Touched(NamedTuple):
    asked: int
    expires: float


class _Whole(NamedTuple):
    expires: float
    generation: int
    names: int


class ChangedName(NamedTuple):
    directory: Ino
    name: str
    was_directory: bool
    """As far as is known."""


class Following:
    """What changed in a directory since somebody began to list it: the listing may have it as it was before."""

    def __init__(self, directory: Ino) -> None:
        self.directory = directory
        self._changed: set[str] = set()
        self._everything = False

    def is_outdated(self, name: str) -> bool:
        return self._everything or name in self._changed

    @property
    def is_changed(self) -> bool:
        """Whether anything has."""
        return self._everything or bool(self._changed)

    def add(self, names: list[str]) -> None:
        self._changed.update(names)
        if len(self._changed) > _CHANGES_FOLLOWED:
            self.add_everything()

    def add_everything(self) -> None:
        self._everything = True
        self._changed.clear()


class Metadata:
    """Of one namespace. Called from one trio thread. `x_nowait` answers from memory or raises trio.WouldBlock.

    What asks the master raises NamespaceChangedError when that has another namespace now, after `on_foreign`.
    """

    def __init__(
        self,
        master: Pool,
        *,
        namespace_id: str,
        sync_interval_s: float,
        metadata_cache_entries: int,
        timeouts: Timeouts,
        reach: MasterReach,
        patience_s: float,
        on_foreign: Callable[[], Awaitable[None]],
        nursery: trio.Nursery,
    ) -> None:
        self.namespace_id = namespace_id
        ttl_s = FOREVER_S if sync_interval_s < 0 else sync_interval_s
        self.ttl_s = ttl_s if timeouts.attr_s is None else timeouts.attr_s
        """Seconds for which attributes may be believed, by us and by the kernel."""
        self.entry_ttl_s = ttl_s if timeouts.entry_s is None else timeouts.entry_s
        """The same for what a name points at."""
        self.negative_ttl_s = ttl_s if timeouts.negative_s is None else timeouts.negative_s
        """The same for names that do not exist."""
        self._master = master
        self.reach = reach
        self._metadata_cache_entries = metadata_cache_entries
        self.patience_s = patience_s
        self._remembered = Remembered(metadata_cache_entries)
        self._nursery = nursery
        self._now = trio.lowlevel.current_clock().current_time
        self._touched: OrderedDict[Ino, _Touched] = OrderedDict()
        self._lookups: Flights[tuple[Ino, str], Attr | None] = Flights(nursery)
        self._on_foreign = on_foreign
        self.told_by_others = False
        """Whether whoever asks us has been told names by one before us."""
        self.hits = 0
        """Questions that were answered from memory, and `misses`: requests that the master got."""
        self.misses = 0
        self._generation = 0
        """What was remembered under an earlier one is not believed without asking."""
        self._changes = 0
        """How often something was told to have changed."""
        self._overtaken: set[tuple[Ino, str]] = set()
        """Names that changed while the master was being asked for them."""
        self._followers: dict[Ino, set[Following]] = {}
        self._whole: OrderedDict[Ino, _Whole] = OrderedDict()
        """Directories that somebody was told all names of."""
        self._by_directory: dict[Ino, list[str]] | None = None
        """All names that are remembered, while listings are made of them: as long as the master is away."""

    # ---- attributes ------------------------------------------------------------------------------------------------

    def attr_nowait(self, ino: Ino) -> Attr:
        known = self._remembered.known(ino)
        if known is None or not self._is_fresh(known):
            raise trio.WouldBlock
        self.hits += 1
        return known.attr

    async def attr(self, ino: Ino) -> Attr:
        """Of any inode, superseded or not. Raises NotFoundError, TransportError."""
        return (await self._known(ino)).attr

    def current_nowait(self, ino: Ino) -> Attr:
        """As `current`, from memory."""
        attr = self._remembered.current(ino, self._now(), self._generation)
        if attr is not None:
            self.hits += 1
            return attr
        known = self._remembered.known(ino)
        if known is None or not self._is_fresh(known):
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

    async def _known(self, ino: Ino) -> Known:
        known = self._remembered.known(ino)
        if known is not None and self._is_fresh(known):
            return known
        changes = self._changes
        try:
            reply = await self._ask(GetAttr(ino), 0 if known is not None else self.patience_s)
        except TransportError:
            if known is None:
                raise
            self.reach.count_stale()
            return known
        if changes == self._changes:
            return self._remember(reply.attr, superseded=reply.superseded)
        return Known(reply.attr, reply.superseded, 0, self._generation)

    # ---- names -----------------------------------------------------------------------------------------------------

    def lookup_nowait(self, parent: Ino, name: str) -> Attr | None:
        """What the name points at; None: no such name."""
        found = self._remembered.name(parent, name)
        if found is None or not self._is_fresh(found):
            raise trio.WouldBlock
        if found.ino == NO_INO:
            self.hits += 1
            return None
        known = self._remembered.known(found.ino)
        if known is None or known.superseded or not self._is_fresh(known):
            raise trio.WouldBlock
        self.hits += 1
        return known.attr

    async def lookup(self, parent: Ino, name: str) -> Attr | None:
        """As `lookup_nowait`, asking the master where needed.

        Raises NotFoundError, NotADirectory, StaleError about the parent; UnderStoreError; TransportError.
        """
        return await self._lookups.join((parent, name), lambda: self._lookup(parent, name))

    async def _lookup(self, parent: Ino, name: str) -> Attr | None:
        key = (parent, name)
        try:
            while True:
                generation = self._generation
                self._overtaken.discard(key)
                found = self._remembered.name(parent, name)
                known = self._remembered.known(found.ino) if found is not None else None
                is_missing = found is not None and found.ino == NO_INO
                usable = is_missing or (known is not None and not known.superseded)
                try:
                    reply = await self._ask(Lookup(parent, name), 0 if usable else self.patience_s)
                except TransportError:
                    if not usable:
                        raise
                    self.reach.count_stale()
                    return known.attr if known is not None else None
                if generation == self._generation and key not in self._overtaken:
                    break
        finally:
            self._overtaken.discard(key)
        self._touch(parent)
        attr = reply.attr
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
        left = self._metadata_cache_entries // 2
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
        changes = self._changes
        reply = await self._ask(ResolvePath(path), self.patience_s)
        if changes == self._changes:
            self._remember(reply.attr, superseded=reply.superseded)
        return reply.attr

    def expire(self, ino: Ino) -> None:
        """The content of this inode is no longer what its name points at: ask again before it is opened."""
        self._remembered.supersede(ino)

    # ---- directories -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def list_dir(
        self, ino: Ino, after: Ino = NO_INO, following: Following | None = None
    ) -> AsyncGenerator[AsyncGenerator[list[Entry], None], None]:
        """The entries after inode `after`, streamed in chunks by ascending inode number; they are remembered too, but
        for those that changed meanwhile, which `following` (made before by `follow`) tells.

        Raises as `lookup`, at entry or between two chunks; TransportError when the master is lost in between, to be
        resumed after the last entry got.
        """
        with self.follow(ino) as own:
            follower = following or own

            async def entries() -> AsyncGenerator[list[Entry], None]:
                async for chunk in chunks:
                    for entry in chunk.entries:
                        if not follower.is_outdated(entry.name):
                            self._remember_entry(ino, entry)
                    yield chunk.entries

            try:
                async with (await self._master_peer()).stream(ListDir(ino, after)) as chunks:
                    iterator = entries()
                    try:
                        yield iterator
                    finally:
                        await iterator.aclose()
            except NamespaceChangedError:
                await self._on_foreign()
                raise

    def told_whole(self, directory: Ino, following: Following, since: float, names: int) -> None:
        """Somebody was told all `names` of a directory, from `since` (trio's clock) on, and what they stood for."""
        if not following.is_changed:
            expires = since + min(self.ttl_s, self.entry_ttl_s)
            self._whole[directory] = _Whole(expires, self._generation, names)
            self._whole.move_to_end(directory)
            if len(self._whole) > _WHOLE_DIRECTORIES:
                self._whole.popitem(last=False)

    def is_still_whole(self, directory: Ino) -> bool:
        """Whether what was last told of it is still to be believed, or there is nobody to ask."""
        whole = self._whole.get(directory)
        if whole is None or whole.generation != self._generation:
            return False
        return self._now() < whole.expires or self.reach.is_away

    def was_told_whole(self, directory: Ino) -> bool:
        """Whether anybody was, as far as is known."""
        return directory in self._whole

    def stale_listing(self, directory: Ino, after: Ino) -> Iterator[list[Entry]] | None:
        """The entries after inode `after`, in chunks by ascending inode number, as they were when the master was last
        there; None if it is there, or not all of the directory is remembered, or that is too large to be sorted here.
        """
        whole = self._whole.get(directory)
        if whole is None or not self.reach.is_away or whole.names > _STALE_NAMES:
            return None
        if self._by_directory is None:
            # Once for an outage: it takes half a second for a million names, of which none is added meanwhile.
            self._by_directory = {}
            for parent, name in self._remembered.existing_names():
                self._by_directory.setdefault(parent, []).append(name)
        names = []
        for name in self._by_directory.get(directory, ()):
            found = self._remembered.name(directory, name)
            known = self._remembered.known(found.ino) if found is not None else None
            if known is not None and not known.superseded:
                names.append((known.attr.ino, name))
        if len(names) != whole.names:
            return None
        self.reach.count_stale()
        return self._stale_entries(sorted(each for each in names if each[0] > after))

    def _stale_entries(self, names: list[tuple[Ino, str]]) -> Iterator[list[Entry]]:
        for start in range(0, len(names), _STALE_CHUNK):
            known = [(name, self._remembered.known(ino)) for ino, name in names[start : start + _STALE_CHUNK]]
            yield [Entry(name, each.attr) for name, each in known if each is not None]

    @contextmanager
    def follow(self, directory: Ino) -> Iterator[Following]:
        """Be told what changes in a directory while the block lasts."""
        following = Following(directory)
        self._followers.setdefault(directory, set()).add(following)
        try:
            yield following
        finally:
            followers = self._followers[directory]
            followers.discard(following)
            if not followers:
                del self._followers[directory]

    # ---- changes ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def watch(self) -> AsyncGenerator[AsyncIterator[Changes], None]:
        """What the master says has changed: for `apply`. Raises as `Peer.stream`, NamespaceChangedError."""
        async with (await self._master_peer()).stream(Watch()) as changes:
            yield changes

    def apply(self, changes: Changes) -> list[ChangedName]:
        """Forget what changed. Returns the names that somebody may have been told by us."""
        self._by_directory = None
        if changes.everything:
            self.distrust()
            return []
        self._changes += 1
        told = []
        for directory, names in changes.names:
            self._whole.pop(directory, None)
            for follower in self._followers.get(directory, ()):
                follower.add(names)
            for name in names:
                key = (directory, name)
                if key in self._lookups:
                    self._overtaken.add(key)
                found = self._remembered.forget_name(directory, name)
                known = self._remembered.forget(found.ino) if found is not None else None
                if found is not None:
                    told.append(ChangedName(directory, name, known is not None and known.attr.is_dir))
                elif self._remembered.has_forgotten or self.told_by_others:
                    told.append(ChangedName(directory, name, True))
        return told

    def distrust(self) -> None:
        """Believe nothing that is remembered without asking again; without the master it still serves."""
        self._by_directory = None
        self._changes += 1
        self._generation += 1
        for followers in self._followers.values():
            for follower in followers:
                follower.add_everything()

    def __len__(self) -> int:
        """Inodes remembered."""
        return len(self._remembered)

    def copy(self, most: int) -> tuple[Copied, list[tuple[Ino, int]]]:
        """What is remembered, for somebody else, and of how many names each directory is that was told whole."""
        return self._remembered.copy(most), [(ino, whole.names) for ino, whole in self._whole.items()]

    def recall(self, copied: Copied, whole: list[tuple[Ino, int]]) -> Iterator[None]:
        """Remember that as well, past its time, without what we know better. Raises ValueError, IndexError."""
        yield from self._remembered.recall(copied)
        self._by_directory = None
        for directory, names in whole:
            if directory not in self._whole:
                self._whole[directory] = _Whole(_PAST, self._generation, names)

    def names(self) -> list[tuple[Ino, str]]:
        """(directory, name) of all that is remembered."""
        return self._remembered.names()

    # ---- the master ------------------------------------------------------------------------------------------------

    async def _ask(self, request: Request[R], patience_s: float) -> R:
        async def ask() -> R:
            return (await (await self._master_peer()).call(request)).message

        if not self.reach.is_away:
            self._by_directory = None
            self.misses += 1
        try:
            return await self.reach.ask(ask, patience_s)
        except NamespaceChangedError:
            await self._on_foreign()
            raise

    async def _master_peer(self) -> Peer:
        peer = await self._master.peer()
        # It would refuse our numbers anyway; its hello says so before the first request.
        if peer.hello.namespace_id not in ("", self.namespace_id):
            raise NamespaceChangedError("the master has another namespace now")
        return peer

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _is_fresh(self, remembered: Known | Name) -> bool:
        return remembered.generation == self._generation and remembered.expires >= self._now()

    def _remember(self, attr: Attr, *, superseded: bool = False) -> Known:
        known = Known(attr, superseded, trio.current_time() + self.ttl_s, self._generation)
        self._remembered.put(attr, superseded=superseded, expires=known.expires, generation=known.generation)
        return known

    def _remember_entry(self, parent: Ino, entry: Entry) -> None:
        self._remember(entry.attr)
        self._remember_name(parent, entry.name, entry.attr.ino)

    def _remember_name(self, parent: Ino, name: str, ino: Ino) -> None:
        before = self._remembered.name(parent, name)
        if before is not None and before.ino != ino:
            # Superseded, or one of two answers came late: to be asked for.
            self._remembered.forget(before.ino)
        now = trio.current_time()
        if ino == NO_INO:
            expires = now + self.negative_ttl_s
            self._remembered.put_missing(parent, name, expires=expires, generation=self._generation)
        else:
            expires = now + self.entry_ttl_s
            self._remembered.put_name(parent, name, ino, expires=expires, generation=self._generation)
