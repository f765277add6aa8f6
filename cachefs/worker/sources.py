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
    TransportError,
    UnavailableError,
    UnderStoreError,
)
from cachefs.net import Peer
from cachefs.policy import Neighbours
from cachefs.ufs import StoreHealth, UnderStore
from cachefs.ufs.files import Claim, Keep
from cachefs.wire import Request
from cachefs.wire.messages import GetStores, ObjectLocation, Resolve, ResolveNext, StoreInfo, WatchStores
from cachefs.worker.master_link import MasterLink
from cachefs.worker.open_store import OpenStore
from cachefs.worker.stores import Stores

logger = logging.getLogger(__name__)
_limited = LogLimiter(logger)

R = TypeVar("R")

_ANSWER_S = 10.0
"""How long the master may take to tell of other options, which nobody waits for."""

_REMEMBERED = 100_000
"""Inodes whose objects are remembered, a few hundred bytes each. They never change: an inode names one content."""


class Source(NamedTuple):
    """Where the bytes of one inode come from."""

    attr: Attr
    info: ObjectInfo
    ufs: UnderStore
    """Not the number that the master gives it: that means something else under another database."""


class Sources:
    """Opened with the stores of each registration; `nursery` holds them until they are removed, or the worker ends.
    `removed_idle_s` as of `WorkerConfig`.
    """

    def __init__(self, master: MasterLink, nursery: trio.Nursery, removed_idle_s: float = 60.0) -> None:
        self.namespace_id = ""
        """Of the master this worker is registered with: the one that inode numbers are of."""
        self.on_pinned: Callable[[Source], None] = lambda source: None
        """Called with what is pinned, when the master says so."""
        self.on_quota: Callable[[Source, int], None] = lambda source, quota: None
        """Called with what counts for a quota, the innermost one."""
        self._master = master
        self._stores = Stores(self._ask_stores, nursery, removed_idle_s)
        self._known: OrderedDict[Ino, Source] = OrderedDict()
        self._unused: set[Ino] = set()
        """Of those, which came along with another one and were not asked for yet."""
        self._neighbours = Neighbours()

    async def registered(self, namespace_id: str, stores: Sequence[StoreInfo]) -> None:
        """With a master of that namespace, in which these are all that are attached: open those that are not open yet,
        and those that have other options now; and wait for them, but not for one that hangs.

        Numbers of inodes and stores never change their meaning under one master's database; with another one,
        everything known by number is forgotten. What is being read goes on.
        """
        if namespace_id != self.namespace_id:
            self._known.clear()
            self._unused.clear()
            self._stores.forget()
            self.namespace_id = namespace_id
        self._stores.registered(stores)
        await self._stores.add(stores)

    async def follow(self, peer: Peer) -> None:
        """Hear which stores are in use until the connection is lost, or cancelled."""
        try:
            async with peer.stream(WatchStores()) as changes:
                async for told in changes:
                    if self._stores.in_use(told):
                        await self._ask_for_options()
        except TransportError as error:
            logger.debug("stores not heard of error=%s", error)

    async def _ask_for_options(self) -> None:
        try:
            self._stores.renew(await self._ask_stores(_ANSWER_S))
        except CachefsError as error:
            logger.info("other options of under-stores are asked for when these are refused error=%s", error)

    async def _ask_stores(self, patience_s: float | None = None) -> list[StoreInfo]:
        """All that are attached now. Raises as `_ask`."""
        return (await self._ask(GetStores(), self.namespace_id, patience_s)).stores

    @property
    def open_stores(self) -> int:
        """Those among them that are being closed, or are to be when nobody reads from them."""
        return self._stores.opened

    @property
    def health(self) -> dict[str, StoreHealth]:
        """By origin, of all that are open and were ever read from."""
        return self._stores.health

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

    async def _store(self, location: ObjectLocation, namespace_id: str) -> OpenStore:
        """Where that object is. One that was attached since this worker registered is opened now.

        Raises StaleError for one that is attached no more, UnavailableError for one that cannot be opened;
        NamespaceChangedError, TransportError.
        """
        ufs = self._stores.find(location.store_id)
        if ufs is None:
            stores = (await self._ask(GetStores(), namespace_id)).stores
            await self._stores.add(stores, location.store_id)
            self._check_namespace(namespace_id)
            ufs = self._stores.find(location.store_id)
            if ufs is None and all(each.store_id != location.store_id for each in stores):
                raise StaleError(f"the under-store of {location.path} is no longer mounted")
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
        try:
            outcomes = await ufs.read_files([source.info for source in wanted], keep, at_once, claim)
        except StaleError:
            self._forget(wanted)
            raise
        failed = [error for error in outcomes if isinstance(error, UnderStoreError)]
        if len(failed) < len(outcomes):
            self._note_answer(ufs)
        elif failed:
            self._note_failure(ufs, failed[-1])
        return outcomes

    async def read(self, source: Source, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Exactly those bytes of exactly that version. Raises as `UnderStore.read_range`, and StaleError when the store
        is closed, as no mount uses it any more.
        """
        try:
            with self._watching(source.ufs):
                return await source.ufs.read_range(source.info, offset, length)
        except StaleError:
            self._forget([source])
            raise

    def _forget(self, sources: Sequence[Source]) -> None:
        """Their store is closed: the master is asked, should somebody want them again."""
        for each in sources:
            if self._known.get(each.attr.ino) is each:
                del self._known[each.attr.ino]
                self._unused.discard(each.attr.ino)

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
        health = self._stores.health_of(ufs)
        if not health.is_failing:
            # What is refused may be one object, and the next one not.
            level = logging.INFO if isinstance(error, DeniedError) else logging.WARNING
            _limited.log(
                *(level, ufs.origin, "under-store fails, what is cached goes on origin=%s error=%s", ufs.origin, error)
            )
        health.failed(error)

    def _note_answer(self, ufs: UnderStore) -> None:
        health = self._stores.health_of(ufs)
        if health.is_failing:
            _limited.log(
                logging.INFO, ufs.origin, "under-store answers again origin=%s s=%.1f", ufs.origin, health.failing_s
            )
            health.answered()
