"""What is pinned: paths, what is known below them, and telling workers which contents that is.

Workers are told all keys of pinned contents when they come, and again when pins change, or names at or below a pin do:
not each change, which would have to follow names through directories that go and come back, but the whole set, walked
anew in the database. How often that may happen is bounded by how long it takes. Between two such tellings, a worker
learns of a new content when it resolves it (`ObjectLocation.pinned`).
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import trio

from cachefs.master.workers import Workers
from cachefs.master.writer import Writer
from cachefs.meta import Content, Inode, MetaStore, is_below, parent_path
from cachefs.model import NO_INO, ROOT_INO, CapacityError, Geometry, NotFoundError, format_size
from cachefs.wire.messages import PinInfo, PinList, PinnedContents, PinReply, UnpinReply

SHARE = 0.9
"""Of what all tiers hold, so much may be pinned: the rest is for what a job reads beside it, and for what grows."""
_ALLOCATED = 4096
_CHUNK = 1000
_RETOLD_AFTER_S = 2.0
_RETOLD_TIMES = 10
"""A walk of the database takes at most one part in so many of the time."""
_CONFIRM_TIMEOUT_S = 15.0


@dataclass
class Amount:
    """Of files that are known."""

    files: int = 0
    bytes: int = 0
    needed_bytes: int = 0
    """On a disk: whole pages of the file system, and a file of checksums for each."""
    cached_files: int = 0
    cached_bytes: int = 0

    def add(self, content: Content, geometry: Geometry) -> None:
        size, blocks = content.size_bytes, geometry.block_count(content.size_bytes)
        self.files += 1
        self.bytes += size
        if size and content.key:
            self.needed_bytes += -(-size // _ALLOCATED) * _ALLOCATED + blocks * _ALLOCATED
        if size == 0 or content.cached_blocks >= blocks:
            self.cached_files += 1
            self.cached_bytes += size
        else:
            self.cached_bytes += min(size, content.cached_blocks * geometry.block_size)


class Pins:
    """Called from one trio thread."""

    def __init__(self, store: MetaStore) -> None:
        self._store = store
        self._pinned = store.pins()
        self._serial = 1
        """Of the set of pins."""
        self._changes = 0
        """Of names at or below them."""
        self._news = trio.Event()

    # ---- what is pinned --------------------------------------------------------------------------------------------

    @property
    def paths(self) -> dict[str, int]:
        """Path -> Unix time in nanoseconds."""
        return self._pinned

    def covers(self, path: str) -> str | None:
        """The pin that a normalised path lies at or below, if there is one."""
        while self._pinned:
            if path in self._pinned:
                return path
            if path == "/":
                break
            path = parent_path(path)
        return None

    def covers_inode(self, inode: Inode) -> bool:
        return bool(self._pinned) and inode.live and self.covers(self._store.path(inode)) is not None

    def note_change(self, directory: Inode | None) -> None:
        """Names in a directory point at something else, are new or gone; None: anywhere."""
        if not self._pinned:
            return
        if directory is not None:
            path = self._store.path(directory)
            if self.covers(path) is None and not any(is_below(pin, path) for pin in self._pinned):
                return
        self._changes += 1
        self._tell()

    @property
    def serial(self) -> int:
        """By which workers confirm what is pinned now."""
        return self._serial

    def changed(self) -> None:
        """Others are pinned now, as the database has it."""
        self._pinned = self._store.pins()
        self._serial += 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # ---- what lies below -------------------------------------------------------------------------------------------

    async def measure(self, paths: Iterable[str], geometry: Geometry, *, with_cached: bool = True) -> Amount:
        """Everything at and below some paths, each content once; without what of it is cached it takes less long."""
        amount = Amount()
        async with aclosing(self._walk(paths, with_cached=with_cached)) as chunks:
            async for contents in chunks:
                for content in contents:
                    amount.add(content, geometry)
        return amount

    def exists(self, path: str) -> bool:
        return self._find(path) is not None

    async def contents(self) -> AsyncGenerator[PinnedContents, None]:
        """All keys of pinned contents in portions, and again after changes. Ends never."""
        while True:
            serial, changes, began = self._serial, self._changes, trio.current_time()
            async with aclosing(self._walk(list(self._pinned), with_cached=False)) as chunks:
                async for contents in chunks:
                    yield PinnedContents(serial, b"".join(each.key for each in contents), False)
            yield PinnedContents(serial, b"", True)
            now = trio.current_time()
            again = now + max(_RETOLD_AFTER_S, _RETOLD_TIMES * (now - began))
            while self._serial == serial and (self._changes == changes or trio.current_time() < again):
                with trio.move_on_at(math.inf if self._changes == changes else again):
                    await self._news.wait()

    async def _walk(self, paths: Iterable[str], *, with_cached: bool) -> AsyncGenerator[list[Content], None]:
        """Files at and below some paths, as far as they are known; those of each directory in portions."""
        for path in outermost(paths):
            found = self._find(path)
            if found is None:
                continue
            attr = found.attr
            if not attr.is_dir:
                cached = self._store.cached_blocks(attr.key)
                yield [Content(attr.ino, False, attr.size_bytes, attr.key, cached)]
                continue
            waiting = [attr.ino]
            while waiting:
                ino, after = waiting.pop(), NO_INO
                while contents := self._store.contents(ino, after, _CHUNK, with_cached=with_cached):
                    after = contents[-1].ino
                    waiting += [each.ino for each in contents if each.is_dir]
                    yield [each for each in contents if not each.is_dir]
                    await trio.lowlevel.checkpoint()

    def _find(self, path: str) -> Inode | None:
        """What is known at a path. The under-store is not asked."""
        inode = self._store.get(ROOT_INO)
        for name in [part for part in path.split("/") if part]:
            if inode is None:
                return None
            inode = self._store.child(inode.attr.ino, name)
        return inode


def outermost(paths: Iterable[str]) -> list[str]:
    """Without those that lie below others."""
    found: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(is_below(path, other) for other in found):
            found.append(path)
    return found


class Pinning:
    """Pins and unpins, one request at a time: two that fit alone may not fit together."""

    def __init__(self, store: MetaStore, writer: Writer, pins: Pins, workers: Workers, geometry: Geometry) -> None:
        self._store = store
        self._writer = writer
        self._pins = pins
        self._workers = workers
        self._geometry = geometry
        self.lock = trio.Lock()
        """What else changes what may be pinned holds it."""
        self.check: Callable[[list[str]], Awaitable[None]] | None = None
        """Raises CapacityError when paths may not be pinned, for another reason than the size of the caches."""

    async def pin(self, paths: Sequence[str], *, dry_run: bool) -> PinReply:
        """`paths` are normalised, and exist. Raises CapacityError when that is more than may be pinned."""
        async with self.lock:
            own = await self._pins.measure(paths, self._geometry)
            new = [path for path in dict.fromkeys(paths) if path not in self._pins.paths]
            needed = (await self._pins.measure([*self._pins.paths, *new], self._geometry)).needed_bytes
            capacity = self._workers.capacity_bytes()
            limit = int(SHARE * capacity)
            unconfirmed: list[str] = []
            if new and self.check is not None:
                await self.check(new)
            if new and not dry_run:
                if needed > limit:
                    raise CapacityError(
                        f"{', '.join(paths)}: {format_size(own.bytes)} in {own.files} files; with it, what is pinned"
                        f" takes {format_size(needed)}, and {format_size(limit)} may be pinned: {SHARE:.0%} of the"
                        f" {format_size(capacity)} that the caches of connected workers hold. Nothing was changed"
                    )
                await self._writer.run(lambda: self._store.add_pins(new), then=lambda _: self._pins.changed())
                unconfirmed = await self._confirmed()
            return PinReply(own.files, own.bytes, needed, limit, capacity, unconfirmed)

    async def unpin(self, paths: Sequence[str], *, dry_run: bool = False) -> UnpinReply:
        """Raises NotFoundError for a path that is not pinned itself."""
        async with self.lock:
            for path in paths:
                if path not in self._pins.paths:
                    raise NotFoundError(self._not_pinned(path))
            if dry_run:
                return UnpinReply([])
            gone = set(paths)
            await self._writer.run(lambda: self._store.remove_pins(gone), then=lambda _: self._pins.changed())
            return UnpinReply(await self._confirmed())

    def _not_pinned(self, path: str) -> str:
        by = self._pins.covers(path)
        if by is not None:
            return f"{path}: it is pinned by {by}, which can be unpinned as a whole"
        return f"{path}: it is not pinned; {', '.join(self._pins.paths) or 'nothing'} is"

    async def _confirmed(self) -> list[str]:
        """Returns when all workers have heard of it, or else the names of those that have not after a while."""
        serial = self._pins.serial
        with trio.move_on_after(_CONFIRM_TIMEOUT_S):
            await self._workers.wait_for_pins(serial)
        return self._workers.without_pins(serial)

    async def list_pins(self, *, sizes: bool) -> PinList:
        infos = []
        for path, pinned_ns in sorted(self._pins.paths.items()):
            amount = await self._pins.measure([path], self._geometry) if sizes else Amount()
            infos.append(
                PinInfo(
                    path=path,
                    pinned_ns=pinned_ns,
                    exists=self._pins.exists(path),
                    files=amount.files,
                    bytes=amount.bytes,
                    cached_files=amount.cached_files,
                    cached_bytes=amount.cached_bytes,
                )
            )
        needed = (await self._pins.measure(self._pins.paths, self._geometry)).needed_bytes if sizes else 0
        return PinList(infos, needed, int(SHARE * self._workers.capacity_bytes()))
