"""Quotas: what is set, which contents count for which, how much all workers have of each, and what each may take.

Workers are told all keys of contents below quotas, as they are told those that are pinned (`pins`). A worker learns of
a new content that it resolves by `ObjectLocation.quota`. What a quota has left is granted to those who ask
(`policy.Shares`), once all that are alive have said what they have.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple

import msgspec
import trio

from cachefs.master.pins import Pinning, Pins
from cachefs.master.walks import find
from cachefs.master.workers import Workers
from cachefs.master.writer import Writer
from cachefs.meta import Inode, MetaStore, Quota, is_below, parent_path
from cachefs.model import NO_INO, CapacityError, ConfigError, Geometry, Ino, NotFoundError, format_size
from cachefs.policy import Shares
from cachefs.wire.quotas import (
    MOST_QUOTAS,
    QuotaContents,
    QuotaGrant,
    QuotaGrants,
    QuotaInfo,
    QuotaList,
    QuotaRule,
    ReportQuotas,
)

_CHUNK = 1000
_RETOLD_AFTER_S = 2.0
_RETOLD_TIMES = 10
"""A walk of the database takes at most one part in so many of the time."""
_CONFIRM_TIMEOUT_S = 15.0
_SETTLED_S = 15.0
"""After the start of the master, a new quota or a worker's coming, so long is waited for what each worker has before
anybody gets more."""


class Quotas:
    """Called from one trio thread."""

    def __init__(self, store: MetaStore) -> None:
        self._store = store
        self._serial = 1
        """Of the set of quotas and their limits."""
        self._paths_serial = 1
        """Of the set of paths."""
        self._changes = 0
        """Of names at or below them."""
        self._news = trio.Event()
        self._by_path: dict[str, Quota] = {}
        self.by_id: dict[int, Quota] = {}
        self.since: dict[int, int] = {}
        """Quota -> the serial that it was first told with."""
        self._read()

    def _read(self) -> None:
        self._by_path = {each.path: each for each in self._store.quotas()}
        self.by_id = {each.quota_id: each for each in self._by_path.values()}
        self.since = {quota_id: self.since.get(quota_id, self._serial) for quota_id in self.by_id}

    @property
    def by_path(self) -> Mapping[str, Quota]:
        return self._by_path

    @property
    def serial(self) -> int:
        """By which workers confirm what is set now."""
        return self._serial

    def changed(self) -> None:
        """Others are set now, as the database has it."""
        before = self._by_path.keys()
        self._serial += 1
        self._read()
        if self._by_path.keys() != before:
            self._paths_serial += 1
        self._tell()

    def note_change(self, directory: Inode | None) -> None:
        """Names in a directory point at something else, are new or gone; None: anywhere."""
        if not self._by_path:
            return
        if directory is not None:
            path = self._store.path(directory)
            if self.covers(path) is None and not any(is_below(quota, path) for quota in self._by_path):
                return
        self._changes += 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def covers(self, path: str) -> Quota | None:
        """The innermost quota that a normalised path lies at or below, if there is one."""
        while self._by_path:
            if path in self._by_path:
                return self._by_path[path]
            if path == "/":
                break
            path = parent_path(path)
        return None

    def covering(self, path: str) -> list[Quota]:
        """All that it lies at or below, the innermost first."""
        found = []
        quota = self.covers(path)
        while quota is not None:
            found.append(quota)
            quota = self._outer(quota)
        return found

    def _outer(self, quota: Quota) -> Quota | None:
        return self.covers(parent_path(quota.path)) if quota.path != "/" else None

    def id_of(self, inode: Inode | None) -> int:
        """The innermost one that a file or directory counts for; 0: none."""
        if not self._by_path or inode is None or not inode.live:
            return 0
        quota = self.covers(self._store.path(inode))
        return quota.quota_id if quota is not None else 0

    def exists(self, path: str) -> bool:
        inode = find(self._store, path)
        return inode is not None and inode.attr.is_dir

    # ---- what workers are told -------------------------------------------------------------------------------------

    async def contents(self) -> AsyncGenerator[QuotaContents, None]:
        """All keys of contents that count, in portions, and again after changes; only limits, where these are all that
        changed. Ends never.
        """
        walked, keys_told, again = -1, -1, 0.0
        while True:
            serial, began = self._serial, trio.current_time()
            due = walked != self._paths_serial or (keys_told != self._changes and began >= again)
            if due:
                walked, keys_told = self._paths_serial, self._changes
                async with aclosing(self._walk()) as parts:
                    async for quota_id, keys in parts:
                        yield QuotaContents(serial, quota_id, keys)
                now = trio.current_time()
                again = now + max(_RETOLD_AFTER_S, _RETOLD_TIMES * (now - began))
            yield QuotaContents(serial, 0, b"", last=True, rules=self.rules(), same_keys=not due)
            while self._serial == serial and (self._changes == keys_told or trio.current_time() < again):
                with trio.move_on_at(math.inf if self._changes == keys_told else again):
                    await self._news.wait()

    def rules(self) -> list[QuotaRule]:
        found = []
        for quota in self._by_path.values():
            outer = self._outer(quota)
            found.append(
                QuotaRule(quota.quota_id, quota.path, quota.limit_bytes, outer.quota_id if outer is not None else 0)
            )
        return found

    async def _walk(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """(innermost quota, keys) of the files below, as far as they are known; those of each directory in portions."""
        roots: dict[Ino, int] = {}
        outermost: list[tuple[Ino, int]] = []
        for quota in list(self._by_path.values()):
            inode = find(self._store, quota.path)
            if inode is not None and inode.attr.is_dir:
                roots[inode.attr.ino] = quota.quota_id
                if self._outer(quota) is None:
                    outermost.append((inode.attr.ino, quota.quota_id))
        while outermost:
            ino, quota_id = outermost.pop()
            after = NO_INO
            while contents := self._store.contents(ino, after, _CHUNK, with_cached=False):
                after = contents[-1].ino
                outermost += [(each.ino, roots.get(each.ino, quota_id)) for each in contents if each.is_dir]
                keys = b"".join(each.key for each in contents if not each.is_dir)
                if keys:
                    yield quota_id, keys
                await trio.lowlevel.checkpoint()


class _Said(NamedTuple):
    """By a worker, last."""

    serial: int
    """Of the quotas that it counts for."""
    refused: dict[int, int]
    """Blocks not kept, by quota."""


class QuotaShares:
    """What workers have of quotas, and may take. Called from one trio thread."""

    def __init__(self, quotas: Quotas, workers: Workers) -> None:
        self._quotas = quotas
        self._workers = workers
        self._shares = {quota.quota_id: Shares(quota.limit_bytes) for quota in quotas.by_id.values()}
        self._said: dict[str, _Said] = {}
        self._all_there_at = self._settled_at = trio.current_time() + _SETTLED_S

    def changed(self) -> None:
        """Others are set, or have other limits."""
        before, self._shares = self._shares, {}
        for quota_id, quota in self._quotas.by_id.items():
            shares = self._shares[quota_id] = before.get(quota_id) or Shares(quota.limit_bytes)
            shares.limit_bytes = quota.limit_bytes
        self._settled_at = trio.current_time() + _SETTLED_S

    def came(self, worker: str) -> None:
        """It has registered: what it said before is over, and is replaced by what it says next. What it has is waited
        for.
        """
        if worker in self._said:
            self._said[worker] = self._said[worker]._replace(serial=0)
        self._settled_at = trio.current_time() + _SETTLED_S

    def gone(self, worker: str) -> None:
        """It is dead, or to go: what it has does not count."""
        said = self._said.pop(worker, None)
        for quota_id in said.refused if said is not None else ():
            if quota_id in self._shares:
                self._shares[quota_id].gone(worker)

    def report(self, worker: str, request: ReportQuotas) -> QuotaGrants:
        """What a worker has and wants; returns what it may have."""
        before, refused = self._said.get(worker), {use.quota_id: use.refused for use in request.uses}
        for quota_id in before.refused.keys() - refused.keys() if before is not None else ():
            if quota_id in self._shares:
                self._shares[quota_id].gone(worker)
        self._said[worker] = _Said(request.serial, refused)
        if self._workers.state(worker) != "active":
            # What it has is to go, and is copied elsewhere before: that takes room only once.
            self.gone(worker)
            return QuotaGrants([])
        counting = [each.name for each in self._workers.members() if each.state == "active"]
        told = self._told_by(counting)
        grants = []
        for use in request.uses:
            shares = self._shares.get(use.quota_id)
            if shares is None:
                continue
            shares.told(worker, use.used_bytes, use.granted_bytes)
            is_settled = self._quotas.since[use.quota_id] <= told
            wanted = use.wanted_bytes if is_settled else 0
            granted = shares.grant(worker, wanted, len(counting), use.idle_bytes)
            needed = max(use.used_bytes, use.granted_bytes) + use.wanted_bytes
            is_short = granted < needed
            # Less than what is asked for helps nobody, and would go round among those who ask.
            most = granted + shares.unused_by_others(worker)
            soon = is_short and (not is_settled or most >= needed)
            grants.append(QuotaGrant(use.quota_id, granted, soon))
        return QuotaGrants(grants)

    def _told_by(self, counting: list[str]) -> float:
        """The serial of quotas of which all workers have said what they have."""
        now = trio.current_time()
        if now >= self._settled_at:
            return math.inf
        if now < self._all_there_at and not all(map(self._workers.is_alive, self._workers.names())):
            return 0
        return min((self._said[name].serial if name in self._said else 0 for name in counting), default=0)

    def by_path(self, read: Callable[[int], float]) -> dict[tuple[str, ...], float]:
        """What is read of each, by its path, as a label."""
        return {(path,): read(quota.quota_id) for path, quota in self._quotas.by_path.items()}

    def limit_bytes(self, quota_id: int) -> int:
        return self._shares[quota_id].limit_bytes

    def used_bytes(self, quota_id: int) -> int:
        return self._shares[quota_id].used_bytes

    def refused(self, quota_id: int) -> int:
        """Blocks, by all workers that are alive."""
        return sum(said.refused.get(quota_id, 0) for said in self._said.values())


class QuotaControl:
    """Sets and removes quotas, one request at a time, and not while something is pinned."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        quotas: Quotas,
        shares: QuotaShares,
        pins: Pins,
        pinning: Pinning,
        workers: Workers,
        geometry: Geometry,
    ) -> None:
        self._store = store
        self._writer = writer
        self._quotas = quotas
        self._shares = shares
        self._pins = pins
        self._lock = pinning.lock
        self._workers = workers
        self._geometry = geometry
        pinning.check = self._check_pins

    async def set(self, path: str, limit_bytes: int) -> QuotaInfo:
        """`path` is normalised, and a directory that exists. Raises ConfigError, CapacityError."""
        async with self._lock:
            known = self._quotas.by_path.get(path)
            if known is None or known.limit_bytes != limit_bytes:
                await self.check(path, limit_bytes)
                await self._writer.run(lambda: self._store.set_quota(path, limit_bytes), lambda _: self.changed())
            return self._info(self._quotas.by_path[path], await self._confirmed())

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[Mapping[str, Quota], None]:
        """Nobody else changes quotas or what is pinned within the block, which is given what is set. Whoever does so
        has asked `check`, and calls `changed` when it is committed.
        """
        async with self._lock:
            # An asker that left may have left a write behind.
            await self._writer.run(lambda: None)
            yield self._quotas.by_path

    async def check(self, path: str, limit_bytes: int) -> None:
        """Within `alone`: raises ConfigError, CapacityError when a path may not get a quota of that."""
        if path not in self._quotas.by_path and len(self._quotas.by_path) >= MOST_QUOTAS:
            raise ConfigError("PATH", path, f"at most {MOST_QUOTAS} quotas in a cluster, which are set already")
        pinned = await self._pinned_bytes(path, list(self._pins.paths))
        if pinned > limit_bytes:
            raise CapacityError(
                f"{path}: {format_size(pinned)} on disk are pinned there, more than a quota of"
                f" {format_size(limit_bytes)}; cachefs unpin comes first. Nothing was changed"
            )

    async def remove(self, path: str, *, dry_run: bool) -> QuotaInfo:
        """Raises NotFoundError for a path that has none itself."""
        async with self._lock:
            quota = self._quotas.by_path.get(path)
            if quota is None:
                by = self._quotas.covers(path)
                within = (
                    f"it lies below {by.path}, which has one" if by is not None else "no directory above it has one"
                )
                raise NotFoundError(f"{path}: it has no quota of its own; {within}")
            info = self._info(quota, [])
            if dry_run:
                return info
            await self._writer.run(lambda: self._store.remove_quota(path), lambda _: self.changed())
            return msgspec.structs.replace(info, unconfirmed=await self._confirmed())

    def used_bytes(self, path: str) -> int:
        """Of the quota of a path; 0: it has none."""
        quota = self._quotas.by_path.get(path)
        return self._shares.used_bytes(quota.quota_id) if quota is not None else 0

    def list_all(self) -> QuotaList:
        return QuotaList([self._info(quota, []) for quota in self._quotas.by_path.values()])

    def changed(self) -> None:
        """Others are set now, as the database has it."""
        self._quotas.changed()
        self._shares.changed()

    def _info(self, quota: Quota, unconfirmed: list[str]) -> QuotaInfo:
        return QuotaInfo(
            path=quota.path,
            limit_bytes=quota.limit_bytes,
            used_bytes=self._shares.used_bytes(quota.quota_id),
            refused=self._shares.refused(quota.quota_id),
            set_ns=quota.set_ns,
            exists=self._quotas.exists(quota.path),
            unconfirmed=unconfirmed,
        )

    async def _confirmed(self) -> list[str]:
        """Returns when all workers have heard of it, or else the names of those that have not after a while."""
        serial = self._quotas.serial
        with trio.move_on_after(_CONFIRM_TIMEOUT_S):
            await self._workers.wait_for_quotas(serial)
        return self._workers.without_quotas(serial)

    async def _pinned_bytes(self, path: str, pins: list[str]) -> int:
        """What pinned contents below a path take on a disk."""
        inside = any(is_below(path, pin) for pin in pins)
        below = [path] if inside else [pin for pin in pins if is_below(pin, path)]
        return (await self._pins.measure(below, self._geometry, with_cached=False)).needed_bytes

    async def _check_pins(self, new: list[str]) -> None:
        """Raises CapacityError when these cannot be pinned beside what is, for a quota."""
        for quota in self._quotas.by_path.values():
            if any(is_below(path, quota.path) or is_below(quota.path, path) for path in new):
                pinned = await self._pinned_bytes(quota.path, [*self._pins.paths, *new])
                if pinned > quota.limit_bytes:
                    raise CapacityError(
                        f"{', '.join(new)}: with it, {format_size(pinned)} on disk are pinned below {quota.path}, which"
                        f" has a quota of {format_size(quota.limit_bytes)}. Nothing was changed"
                    )


async def check_fits(paths: list[str], copies: int, quotas: Quotas, pins: Pins, geometry: Geometry) -> None:
    """Raises CapacityError when what is below paths cannot all be cached at once, for a quota."""
    for quota in list(quotas.by_path.values()):
        below = [path if is_below(path, quota.path) else quota.path for path in paths]
        below = [path for path in below if any(is_below(path, each) for each in paths)]
        amount = await pins.measure(below, geometry, with_cached=False)
        if amount.needed_bytes * copies > quota.limit_bytes:
            raise CapacityError(
                f"{quota.path} has a quota of {format_size(quota.limit_bytes)}; {amount.files} files of"
                f" {format_size(amount.bytes)} that were to be loaded there take"
                f" {format_size(amount.needed_bytes * copies)} on disk"
                + (f" in {copies} copies" if copies > 1 else "")
                + ". Nothing was loaded"
            )
