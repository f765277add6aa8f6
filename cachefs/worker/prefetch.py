"""Small files fetched ahead of whoever opens those of a directory one after the other.

What helps is having several on their way at once: each costs a round trip to the under-store, whatever its size.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable

import trio

from cachefs.model import BlockId, CachefsError, Ino
from cachefs.policy import FileOrder, FileOrderConfig, Run
from cachefs.ufs import UnderStore
from cachefs.worker.config import WorkerConfig
from cachefs.worker.sources import Source, Sources

logger = logging.getLogger(__name__)

_READERS = 64
_REMEMBERED = 8192
"""Files fetched ahead, of which it may still be heard that they were opened."""

_Directory = tuple[UnderStore, str]


class Prefetch:
    """`keep` makes one file local and returns whether there was room; it raises as `Filler.keep_whole`.

    Memory: `ahead_slots` files of at most `ahead_file_bytes`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        sources: Sources,
        has_room: Callable[[int], bool],
        keep: Callable[[Source], Awaitable[bool]],
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._sources = sources
        self._has_room = has_room
        self._keep = keep
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(max(1, config.ahead_slots))
        self._orders: OrderedDict[int, FileOrder[_Directory]] = OrderedDict()
        self._fetched: OrderedDict[BlockId, tuple[_Directory, Ino]] = OrderedDict()

    def asked(self, reader: int, source: Source) -> None:
        """A mount waits for this file."""
        size = source.attr.size_bytes
        if not self._config.files_ahead or not 0 < size <= self._config.ahead_file_bytes:
            return
        order = self._orders.get(reader)
        if order is None:
            order = self._orders[reader] = FileOrder(FileOrderConfig(max_files=self._config.files_ahead))
            if len(self._orders) > _READERS:
                self._orders.popitem(last=False)
        run = order.asked(_directory(source), source.attr.ino)
        if run is not None and not self._has_room(size):
            run.over = True
        elif run is not None:
            self._nursery.start_soon(self._go_on, run, source.attr.ino)

    def opened(self, reader: int, blocks: Iterable[BlockId]) -> bool:
        """A mount has opened these by itself, in whatever order, some while ago. Was any of them fetched ahead?"""
        order = self._orders.get(reader)
        if order is None:
            return False
        places = [self._fetched.pop(block) for block in blocks if block in self._fetched]
        for directory, ino in sorted(places, key=lambda place: place[1]):
            run = order.passed(directory, ino)
            if run is not None:
                self._nursery.start_soon(self._go_on, run, ino)
        return bool(places)

    async def _go_on(self, run: Run, ino: Ino) -> None:
        """Fetch the next files of a run: after inode `ino` and what was fetched ahead before."""
        try:
            sources, until = await self._sources.resolve_next(ino, Ino(run.after), run.window)
        except CachefsError as error:
            logger.debug("no files ahead ino=%d error=%s", ino, error)
            run.over = True
            return
        wanted, total = [], 0
        for source in sources:
            total += source.attr.size_bytes
            if total > self._config.ahead_bytes:
                break
            until = source.attr.ino
            if source.attr.key and 0 < source.attr.size_bytes <= self._config.ahead_file_bytes:
                wanted.append(source)
        run.took(until, wanted[len(wanted) // 2].attr.ino if wanted else until)
        for source in wanted:
            # One slot after the other, so that what nobody fetches yet is not in the way of a reader who asks for it.
            slot = object()
            await self._slots.acquire_on_behalf_of(slot)
            if run.over:
                self._slots.release_on_behalf_of(slot)
                return
            self._nursery.start_soon(self._fetch, run, source, slot)

    async def _fetch(self, run: Run, source: Source, slot: object) -> None:
        self._fetched[BlockId(source.attr.key, 0)] = _directory(source), source.attr.ino
        if len(self._fetched) > _REMEMBERED:
            self._fetched.popitem(last=False)
        try:
            if not await self._keep(source):
                run.over = True
        except CachefsError as error:
            # A reader that comes for it finds out by itself.
            logger.info("not fetched ahead path=%s error=%s", source.info.path, error)
            run.over = True
        finally:
            self._slots.release_on_behalf_of(slot)


def _directory(source: Source) -> _Directory:
    return source.ufs, source.info.path.rpartition("/")[0]
