"""The under-stores this worker reads from, as the master names them, and the objects behind inodes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import trio

from cachefs.model import (
    Attr,
    CachefsError,
    DeniedError,
    Ino,
    Kind,
    LogLimiter,
    NamespaceChangedError,
    NamespaceError,
    ObjectInfo,
    StaleError,
    UnavailableError,
    UnderStoreError,
    without_credentials,
)
from cachefs.policy import Neighbours
from cachefs.ufs import StoreHealth, UnderStore, open_under_store
from cachefs.ufs.files import Claim, Keep
from cachefs.wire import Request
from cachefs.wire.messages import GetStores, ObjectLocation, Resolve, ResolveNext, StoreInfo
from cachefs.worker.master_link import MasterLink

logger = logging.getLogger(__name__)
_limited = LogLimiter(logger)

R = TypeVar("R")

_REMEMBERED = 100_000
"""Inodes whose objects are remembered, a few hundred bytes each. They never change: an inode names one content."""


class Source(NamedTuple):
    """Where the bytes of one inode come from."""

    attr: Attr
    info: ObjectInfo
    ufs: UnderStore
    """Not the number that the master gives it: that means something else under another database."""


_OPEN_S = 10.0
"""How long a store that is just opened is waited for: a path of this machine may be on a file server that hangs."""


class _Begun(NamedTuple):
    """A store that is being opened."""

    done: trio.Event
    give_up: float


class Sources:
    """Opened with the stores of each registration; `nursery` holds them until the worker ends."""

    def __init__(self, master: MasterLink, nursery: trio.Nursery) -> None:
        self.namespace_id = ""
        """Of the master this worker is registered with: the one that inode numbers are of."""
        self.on_pinned: Callable[[Source], None] = lambda source: None
        """Called with what is pinned, when the master says so."""
        self.on_quota: Callable[[Source, int], None] = lambda source, quota: None
        """Called with what counts for a quota, the innermost one."""
        self._master = master
        self._nursery = nursery
        self._open: dict[int, UnderStore] = {}
        self._begun: dict[int, _Begun] = {}
        """Those that are open, too."""
        self.health: dict[str, StoreHealth] = {}
        """By origin, of all that were ever read from."""
        self._known: OrderedDict[Ino, Source] = OrderedDict()
        self._unused: set[Ino] = set()
        """Of those, which came along with another one and were not asked for yet."""
        self._neighbours = Neighbours()

    async def add(self, namespace_id: str, stores: list[StoreInfo], wanted: int | None = None) -> None:
        """Open those that are not open yet, and wait for them, or for that one alone; not for one that hangs.

        Numbers of inodes and stores never change their meaning under one master's database; with another one,
        everything known by number is forgotten. What is being read goes on.
        """
        if namespace_id != self.namespace_id:
            self._known.clear()
            self._unused.clear()
            self._open = {}
            self._begun = {}
            self.namespace_id = namespace_id
        waited_for = []
        for store in stores:
            begun = self._begun.get(store.store_id)
            if begun is None:
                begun = self._begun[store.store_id] = _Begun(trio.Event(), trio.current_time() + _OPEN_S)
                self._nursery.start_soon(self._hold, store, namespace_id, begun)
            if wanted in (None, store.store_id):
                waited_for.append((store, begun))
        for store, begun in waited_for:
            with trio.move_on_at(begun.give_up):
                await begun.done.wait()
            if not begun.done.is_set():
                url = without_credentials(store.url)
                _limited.log(logging.WARNING, url, "under-store is not opened yet, it hangs url=%s", url)

    async def _hold(self, store: StoreInfo, namespace_id: str, begun: _Begun) -> None:
        url = without_credentials(store.url)
        try:
            async with open_under_store(store.url, store.options) as ufs:
                if self.namespace_id == namespace_id:
                    self._open[store.store_id] = ufs
                begun.done.set()
                await trio.sleep_forever()
        except CachefsError as error:
            # A package that is missing here must not take the other stores away.
            logger.warning("under-store cannot be opened url=%s error=%s", url, error)
            if self._begun.get(store.store_id) is begun:
                # Whoever wants it next tries again.
                del self._begun[store.store_id]
        finally:
            begun.done.set()

    @property
    def master_away_s(self) -> float:
        """For how many seconds; 0: we are registered."""
        return self._master.away_s

    async def resolve(self, ino: Ino, patience_s: float | None = None) -> Source:
        """Raises NotFoundError, IsADirectory, StaleError, TransportError; NamespaceChangedError when the master, that
        had to be waited for, came back with another namespace; DeadlineError when it has not answered within
        `patience_s`.
        """
        namespace_id = self.namespace_id
        known = self._known.get(ino)
        if known is None and self._neighbours.count > 1:
            known = await self._resolve_with_neighbours(ino, patience_s)
        if known is not None:
            self._known.move_to_end(ino)
            if ino in self._unused:
                self._unused.discard(ino)
                self._neighbours.used()
            return known
        self._neighbours.asked()
        location = await self._ask(Resolve(ino), namespace_id, patience_s)
        return self._remember(location, await self._store(location, namespace_id))

    async def _resolve_with_neighbours(self, ino: Ino, patience_s: float | None) -> Source | None:
        """And what comes after it in its directory: an epoch over a million files must not be a million requests.

        None: it is not in its directory any more.
        """
        namespace_id = self.namespace_id
        found = await self._ask(ResolveNext(ino, Ino(ino - 1), self._neighbours.count), namespace_id, patience_s)
        for each in found.files:
            store = await self._store(each, namespace_id)
            if each.attr.ino not in self._known:
                self._unused.add(each.attr.ino)
            self._remember(each, store)
        self._unused.discard(ino)
        return self._known.get(ino)

    async def _ask(self, request: Request[R], namespace_id: str, patience_s: float | None = None) -> R:
        """Of what has numbers of that namespace, in the request or in the answer. Raises as the master does, and
        NamespaceChangedError whatever another one's master answered: that it has no such inode, too.
        """
        try:
            answer = await self._master.call(request, patience_s)
        except (NamespaceError, StaleError):
            self._check_namespace(namespace_id)
            raise
        self._check_namespace(namespace_id)
        return answer.message

    def _check_namespace(self, namespace_id: str) -> None:
        if self.namespace_id != namespace_id:
            raise NamespaceChangedError("these inode numbers are of a namespace that the master no longer has")

    async def _store(self, location: ObjectLocation, namespace_id: str) -> UnderStore:
        """Where that object is. One that was attached since this worker registered is opened now.

        Raises UnavailableError for one that cannot be opened; NamespaceChangedError, TransportError.
        """
        if location.store_id not in self._open:
            stores = (await self._ask(GetStores(), namespace_id)).stores
            await self.add(namespace_id, stores, location.store_id)
            self._check_namespace(namespace_id)
        ufs = self._open.get(location.store_id)
        if ufs is None:
            raise UnavailableError(f"the under-store of {location.path} cannot be opened on this worker; see its log")
        return ufs

    def _remember(self, location: ObjectLocation, ufs: UnderStore) -> Source:
        attr = location.attr
        info = ObjectInfo(location.path, Kind.FILE, attr.size_bytes, attr.mtime_ns, location.tag)
        source = self._known[attr.ino] = Source(attr, info, ufs)
        if len(self._known) > _REMEMBERED:
            forgotten, _ = self._known.popitem(last=False)
            if forgotten in self._unused:
                self._unused.discard(forgotten)
                self._neighbours.wasted()
        if location.pinned:
            self.on_pinned(source)
        if location.quota:
            self.on_quota(source, location.quota)
        return source

    async def resolve_next(self, ino: Ino, after: Ino, count: int) -> tuple[list[Source], Ino]:
        """Files in the directory of `ino` after inode `after`, of the next `count` entries, and how far was looked.

        Raises as `resolve`.
        """
        namespace_id = self.namespace_id
        found = await self._ask(ResolveNext(ino, after, count), namespace_id)
        self._unused.difference_update(each.attr.ino for each in found.files)
        return [self._remember(each, await self._store(each, namespace_id)) for each in found.files], found.until

    async def read_files(
        self, wanted: Sequence[Source], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        """As `UnderStore.read_files`, of objects of one under-store."""
        ufs = wanted[0].ufs
        outcomes = await ufs.read_files([source.info for source in wanted], keep, at_once, claim)
        failed = [error for error in outcomes if isinstance(error, UnderStoreError)]
        if len(failed) < len(outcomes):
            self._note_answer(ufs)
        elif failed:
            self._note_failure(ufs, failed[-1])
        return outcomes

    async def read(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly those bytes of exactly that version. Raises as `UnderStore.read_range`."""
        with self._watching(source.ufs):
            return await source.ufs.read_range(source.info, offset, length)

    @contextmanager
    def _watching(self, ufs: UnderStore) -> Iterator[None]:
        try:
            yield
        except UnderStoreError as error:
            self._note_failure(ufs, error)
            raise
        except CachefsError:
            self._note_answer(ufs)
            raise
        self._note_answer(ufs)

    def _note_failure(self, ufs: UnderStore, error: UnderStoreError) -> None:
        health = self._health_of(ufs)
        if not health.is_failing:
            # What is refused may be one object, and the next one not.
            level = logging.INFO if isinstance(error, DeniedError) else logging.WARNING
            _limited.log(
                *(level, ufs.origin, "under-store fails, what is cached goes on origin=%s error=%s", ufs.origin, error)
            )
        health.failed(error)

    def _note_answer(self, ufs: UnderStore) -> None:
        health = self._health_of(ufs)
        if health.is_failing:
            _limited.log(
                logging.INFO, ufs.origin, "under-store answers again origin=%s s=%.1f", ufs.origin, health.failing_s
            )
            health.answered()

    def _health_of(self, ufs: UnderStore) -> StoreHealth:
        health = self.health.get(ufs.origin)
        if health is None:
            health = self.health[ufs.origin] = StoreHealth()
        return health
