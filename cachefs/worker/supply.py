"""Where the bytes of blocks come from that are not here: a worker that has them, the one that fetches them, or the
under-store.

    the master says: these hold it        -> their pages, from the nearest, in turns if several are
                     that one fetches it  -> its pages, as they arrive
                     you fetch it (lease) -> the under-store

Whoever fails is left out, and the master is asked again; it then moves the lease to whoever asks. With no other worker
alive nobody is asked. While the master is away the under-store is read without a lease: better twice than not at all.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from cachefs.model import BlockId, CachefsError, CapacityError, Geometry, StaleError
from cachefs.store import page_checksum
from cachefs.wire.cluster import BlockPlace, Effort
from cachefs.worker.members import Members
from cachefs.worker.origin import Origin
from cachefs.worker.peers import Data, PeerBytes, Peers
from cachefs.worker.places import Places
from cachefs.worker.slots import Slots
from cachefs.worker.sources import Source

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""For how long a worker may say of a page that it is being fetched: longer than the deadline of an under-store."""
_BELIEVED_S = 5.0
"""How long an answer of the master is used for content that is not kept here."""
_REMEMBERED = 10_000
_HOMES = 2
"""Workers asked to take in a block that this one cannot, one after the other."""
_REFUSED_S = 5.0
"""How long a worker that could not take in a block is not asked to again."""
_INLINE_BYTES = 256 * 1024
"""Compared without a thread: 30 microseconds."""


@dataclass
class Route:
    """How one block is got, from its first page to its last. To be ended by `Supply.end`."""

    block: BlockId
    source: Source
    start: int
    """Of the block in its content."""
    place: BlockPlace | None = None
    """As the master said; None: to be asked for."""
    has_lease: bool = False
    ended: bool = False
    """No page of it is wanted any more; one that was on its way may still ask."""
    failed: set[str] = field(default_factory=set)
    """Workers that did not give it."""
    turn: int = 0


class Page(NamedTuple):
    """Bytes of a block, and where they came from."""

    data: Data
    checksum: int | None
    """As it travelled with them, not compared yet; None: from the under-store, to be made."""
    worker: str
    """Empty: the under-store."""


class Supply:
    """`slots` bounds what is read from other workers at once: each holds a page of memory. They are none of the slots
    in which the under-store is read, or two workers that serve each other could wait for each other.
    """

    def __init__(
        self,
        geometry: Geometry,
        members: Members,
        places: Places,
        peers: Peers,
        origin: Origin,
        slots: Slots,
    ) -> None:
        self._geometry = geometry
        self._members = members
        self._places = places
        self._peers = peers
        self._origin = origin
        self._slots = slots
        self._recent: OrderedDict[BlockId, tuple[float, BlockPlace]] = OrderedDict()
        self._refusals: OrderedDict[tuple[str, BlockId], float] = OrderedDict()
        """Of workers that cannot take in a block, and until when they are not asked again."""
        self.on_end: Callable[[BlockId], None] = lambda block: None
        """Called with each block whose route ends."""

    @property
    def alone(self) -> bool:
        """There is no other worker."""
        return not self._members.others

    # ---- blocks that are kept here ---------------------------------------------------------------------------------

    async def routes(self, wanted: Sequence[tuple[BlockId, Source, int]]) -> list[Route]:
        """How to get these blocks, each (block, source, start in its content): the master is asked once for all."""
        routes = [Route(*each) for each in wanted]
        if not self.alone and routes:
            places = await self._places.ask([route.block for route in routes], lease=True)
            for number, route in enumerate(routes):
                self._settle(route, places[number] if places is not None else None)
        return routes

    def _settle(self, route: Route, place: BlockPlace | None) -> None:
        route.place = place if place is not None else BlockPlace([], "")
        if route.place.origin == self._members.name:
            if route.has_lease or route.ended:
                # Several pages asked at once: one grant is kept. None, by who asked when it was ended.
                self._places.end(route.block)
            route.has_lease = not route.ended

    def is_first_copy(self, route: Route) -> bool:
        """Nobody else has it or fetches it, as far as is known."""
        place = route.place
        return place is None or (not place.holders and place.origin in ("", self._members.name))

    def is_last_copy(self, route: Route) -> bool:
        """Nobody else has it or fetches it, or only workers that are to go."""
        place = route.place
        staying = [name for name in place.holders if self._members.stays(name)] if place is not None else []
        return self.is_first_copy(route) or (place is not None and bool(place.holders) and not staying)

    def has_lease(self, block: BlockId) -> bool:
        return self._places.has_lease(block)

    def end(self, route: Route) -> None:
        """It is sealed, or given up."""
        self.on_end(route.block)
        route.ended = True
        if route.has_lease:
            route.has_lease = False
            self._places.end(route.block)

    @asynccontextmanager
    async def page(self, route: Route, offset: int, length: int, slots: Slots) -> AsyncGenerator[Page, None]:
        """One page of a block, at that offset in it; its slot is taken until the end of the block. From the under-store
        in one of `slots`.

        Raises StaleError, UnderStoreError and its kinds.
        """
        give_up = trio.current_time() + _PATIENCE_S
        while True:
            effort, workers = await self._whom_to_ask(route)
            if not workers:
                async with slots.one(length, route.source.ufs.origin):
                    yield Page(await self._origin.read(route.source, route.start + offset, length), None, "")
                return
            route.turn += 1
            worker = workers[route.turn % len(workers)]
            async with self._slots.one(length, route.source.ufs.origin):
                if not self._is_usable(route, worker):
                    # It was found to be silent while this page waited for its turn.
                    continue
                got = await self._try(route, worker, effort, offset, length)
                if got is not None:
                    yield Page(got.data, got.checksum, worker)
                    return
            if trio.current_time() > give_up:
                self._leave_out(route, worker)

    async def _whom_to_ask(self, route: Route) -> tuple[Effort, list[str]]:
        """Workers, one as good as the other, and for what; none: the under-store is ours to read."""
        while not self.alone:
            if route.has_lease and not self._places.has_lease(route.block):
                # Moved: others could wait for us no longer.
                route.has_lease, route.place = False, None
            if route.place is None:
                places = await self._places.ask([route.block], lease=True, without=route.failed)
                self._settle(route, places[0] if places is not None else None)
            place = route.place
            assert place is not None
            holders = [name for name in place.holders if self._is_usable(route, name)]
            if holders:
                return "held", self._members.equally_near(holders, route.block)
            if not place.holders and place.origin in ("", self._members.name):
                return "origin", []
            if not place.holders and self._is_usable(route, place.origin):
                return "origin", [place.origin]
            route.failed.update(place.holders, [place.origin] if place.origin else [])
            route.place = None
        return "origin", []

    def _is_usable(self, route: Route, name: str) -> bool:
        return name not in route.failed and self._peers.is_usable(name)

    async def _try(self, route: Route, worker: str, effort: Effort, offset: int, length: int) -> PeerBytes | None:
        """None: not yet, or not from this one."""
        try:
            return await self._peers.read(worker, route.block, offset, length, effort, route.source.attr.ino)
        except StaleError:
            raise
        except CachefsError as error:
            logger.info("not from worker name=%s block=%s error=%s", worker, route.block.filename, error)
            self._leave_out(route, worker)
            return None

    def _leave_out(self, route: Route, worker: str) -> None:
        route.failed.add(worker)
        route.place = None

    async def damaged(self, route: Route, page: Page) -> None:
        """A page does not match its checksum: whoever sent it is told, and not asked again."""
        self._leave_out(route, page.worker)
        await self._peers.doubt(page.worker, route.block)

    # ---- content that is not kept here -----------------------------------------------------------------------------

    async def read(self, source: Source, block: BlockId, start: int, offset: int, length: int, slots: Slots) -> Data:
        """[offset, offset+length) of a block that starts there in its content: from whoever has it, else by way of a
        worker that takes it in, else from the under-store in one of `slots`. Raises as `page`.
        """
        parts = []
        if not self.alone and block.key:
            for page in self._geometry.pages_covering(offset, length):
                first = max(offset, page * self._geometry.page_size)
                end = min(offset + length, (page + 1) * self._geometry.page_size)
                data = await self._from_others(source, block, first, end - first)
                if data is None:
                    break
                parts.append(data)
                offset, length = end, length - (end - first)
        if length or not parts:
            async with slots.one(length, source.ufs.origin):
                parts.append(await self._origin.read(source, start + offset, length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _from_others(self, source: Source, block: BlockId, offset: int, length: int) -> Data | None:
        place = await self._place_of(block)
        for worker in self._members.nearest(place.holders, block):
            data = await self._verified(worker, source, block, offset, length, "held")
            if data is not None:
                return data
        if place.origin and place.origin != self._members.name:
            data = await self._verified(place.origin, source, block, offset, length, "origin")
            if data is not None:
                return data
        self._recent.pop(block, None)
        block_length = self._geometry.block_length(source.attr.size_bytes, block.block_index)
        for worker in self._members.homes(block, block_length, _HOMES):
            if self._refusals.get((worker, block), 0.0) > trio.current_time():
                continue
            data = await self._verified(worker, source, block, offset, length, "home")
            if data is not None:
                # The next reads go there at once, before the master has heard of it.
                self._remember(block, BlockPlace([], worker))
                return data
        return None

    async def _verified(
        self, worker: str, source: Source, block: BlockId, offset: int, length: int, effort: Effort
    ) -> Data | None:
        """None: that one does not have it, or sends something else."""
        give_up = trio.current_time() + _PATIENCE_S
        while self._peers.is_usable(worker) and trio.current_time() < give_up:
            try:
                async with self._slots.one(length, source.ufs.origin):
                    got = await self._peers.read(worker, block, offset, length, effort, source.attr.ino)
                    if got is None:
                        continue
                    if await _matches(got):
                        return got.data
                await self._peers.doubt(worker, block)
                return None
            except StaleError:
                raise
            except CachefsError as error:
                logger.debug("not from worker name=%s block=%s error=%s", worker, block.filename, error)
                if isinstance(error, CapacityError):
                    self._note_refusal(worker, block)
                return None
        return None

    def _note_refusal(self, worker: str, block: BlockId) -> None:
        self._refusals[worker, block] = trio.current_time() + _REFUSED_S
        self._refusals.move_to_end((worker, block))
        if len(self._refusals) > _REMEMBERED:
            self._refusals.popitem(last=False)

    async def _place_of(self, block: BlockId) -> BlockPlace:
        known = self._recent.get(block)
        if known is not None and known[0] > trio.current_time():
            return known[1]
        places = await self._places.ask([block], lease=False)
        place = places[0] if places is not None else BlockPlace([], "")
        self._remember(block, place)
        return place

    def _remember(self, block: BlockId, place: BlockPlace) -> None:
        self._recent[block] = trio.current_time() + _BELIEVED_S, place
        self._recent.move_to_end(block)
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)


async def _matches(got: PeerBytes) -> bool:
    if len(got.data) <= _INLINE_BYTES:
        return page_checksum(got.data) == got.checksum
    return await trio.to_thread.run_sync(page_checksum, got.data) == got.checksum
