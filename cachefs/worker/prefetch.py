"""Small files fetched ahead of whoever opens those of a directory one after the other.

What helps is having several on their way at once: each costs a round trip to the under-store, whatever its size.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import trio

from cachefs.model import BlockId, CachefsError, Ino
from cachefs.policy import FileOrder, FileOrderConfig, Run
from cachefs.ufs import UnderStore
from cachefs.ufs.files import Claim
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.sources import Source, Sources

logger = logging.getLogger(__name__)

_READERS = 64
_REMEMBERED = 8192
"""Files fetched ahead, of which it may still be heard that they were opened."""

_BATCHES = 2
"""Under way at once: the next one begins while the last files of the one before are awaited."""
_TAKEN = object()

Reader = tuple[int, int]
"""A mount's session, and which of those who open files through it."""
_Directory = tuple[UnderStore, str]


class KeepFiles(Protocol):
    async def __call__(
        self, wanted: Sequence[tuple[BlockId, Source]], claim: Claim, on_kept: Callable[[int], None]
    ) -> list[Exception | None]: ...


class Prefetch:
    """`keep` makes files local, those that it can `claim`, and tells of each that is (as `Filler.keep_files`);
    `is_wanted` says of one whether it is neither here nor on its way, `has_room` whether that many bytes would be kept.

    Memory: `ahead_slots` files of at most `ahead_file_bytes` for each of two batches.
    """

    def __init__(
        self,
        config: WorkerConfig,
        sources: Sources,
        has_room: Callable[[int], bool],
        is_wanted: Callable[[Source], bool],
        keep: KeepFiles,
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._sources = sources
        self._has_room = has_room
        self._is_wanted = is_wanted
        self._keep = keep
        self._counters = counters
        self._nursery = nursery
        self._batches = trio.CapacityLimiter(_BATCHES)
        self._orders: OrderedDict[Reader, FileOrder[_Directory]] = OrderedDict()
        self._fetched: OrderedDict[BlockId, tuple[FileOrder[_Directory], Source]] = OrderedDict()
        self._under_way: dict[BlockId, trio.Event] = {}
        """By whoever has such an event: a reader may have taken it from a batch that still runs, and failed."""
        self._unclaimed: dict[trio.Event, None] = {}
        """Of those under way, what was not asked for yet; taken from in other threads too, by `pop` alone."""

    async def join(self, block: BlockId) -> bool:
        """Wait for a file that is being fetched ahead; False, at once, if it is not. One that is only queued is taken
        out of the queue: its reader fetches it sooner.
        """
        event = self._under_way.get(block)
        if event is None:
            return False
        if self._claim(event):
            del self._under_way[block]
            return False
        await event.wait()
        return True

    def is_coming(self, block: BlockId) -> bool:
        return block in self._under_way

    def _claim(self, event: trio.Event) -> bool:
        return self._unclaimed.pop(event, _TAKEN) is None

    def _end(self, block: BlockId, event: trio.Event) -> None:
        """It is kept, or was not going to be."""
        if self._under_way.get(block) is event:
            del self._under_way[block]
        event.set()

    def asked(self, reader: Reader, source: Source) -> None:
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
            self._nursery.start_soon(self._go_on, order, run, source.attr.ino)

    def opened(self, blocks: Iterable[BlockId]) -> bool:
        """A mount has opened these by itself, in whatever order, some while ago. Was any of them fetched ahead?"""
        places = [self._fetched.pop(block) for block in blocks if block in self._fetched]
        for order, source in sorted(places, key=lambda place: place[1].attr.ino):
            run = order.passed(_directory(source), source.attr.ino)
            if run is not None:
                self._nursery.start_soon(self._go_on, order, run, source.attr.ino)
        return bool(places)

    async def _go_on(self, order: FileOrder[_Directory], run: Run, ino: Ino) -> None:
        """Fetch the next files of a run: after inode `ino` and what was fetched ahead before."""
        try:
            sources, until = await self._sources.resolve_next(ino, Ino(run.after), run.window)
        except (CachefsError, OSError) as error:
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
        stores = {source.ufs for source in wanted}
        for ufs in stores:
            await self._fetch(order, run, [source for source in wanted if source.ufs is ufs])

    async def _fetch(self, order: FileOrder[_Directory], run: Run, sources: list[Source]) -> None:
        """The files of one store. Their readers find out by themselves what is wrong with those that are not kept."""
        wanted: list[tuple[BlockId, Source]] = []
        events: list[trio.Event] = []
        for source in sources:
            block = BlockId(source.attr.key, 0)
            if block in self._under_way or not self._is_wanted(source):
                continue
            if not self._has_room(source.attr.size_bytes):
                run.over = True
                break
            wanted.append((block, source))
            event = self._under_way[block] = trio.Event()
            events.append(event)
            self._unclaimed[event] = None
            self._fetched[block] = order, source
            if len(self._fetched) > _REMEMBERED:
                self._fetched.popitem(last=False)
        if not wanted:
            return

        def claim(number: int) -> bool:
            return not run.over and self._claim(events[number])

        def on_kept(number: int) -> None:
            self._counters.files_ahead += 1
            self._end(wanted[number][0], events[number])

        try:
            async with self._batches:
                outcomes = await self._keep(wanted, claim, on_kept)
            for (_, source), error in zip(wanted, outcomes, strict=True):
                if error is not None:
                    run.over = True
                    level = logging.INFO if isinstance(error, CachefsError) else logging.WARNING
                    logger.log(level, "not fetched ahead path=%s error=%r", source.info.path, error)
        except CachefsError as error:
            logger.info("not fetched ahead files=%d error=%r", len(wanted), error)
            run.over = True
        except OSError as error:
            logger.warning("not fetched ahead files=%d error=%r", len(wanted), error)
            run.over = True
        finally:
            for (block, _), event in zip(wanted, events, strict=True):
                self._unclaimed.pop(event, None)
                self._end(block, event)


def _directory(source: Source) -> _Directory:
    return source.ufs, source.info.path.rpartition("/")[0]
