"""What workers ask the master: to join, to be heard, where blocks are, who fetches them, and which may be dropped."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import trio

from cachefs.master.leases import Leases
from cachefs.master.workers import Workers
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, Standing
from cachefs.model import BlockId
from cachefs.net import Service, Session
from cachefs.wire import cluster as c
from cachefs.wire import messages as m

logger = logging.getLogger(__name__)


class Cluster:
    """Handlers of requests, and what they share. `told` is what a worker is told when it registers."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        told: Callable[[], tuple[m.ClusterInfo, list[m.StoreInfo]]],
        nursery: trio.Nursery,
    ) -> None:
        self._store = store
        self._writer = writer
        self._told = told
        self._nursery = nursery
        self.workers = Workers(store.workers(), self._on_dead)
        self.leases = Leases(self.workers.is_alive)
        self.on_dead: list[Callable[[str], None]] = []
        """Called with each worker that was alive and is not any more."""
        self.on_come: list[Callable[[str], None]] = []
        """Called with each that registers."""

    def add_to(self, service: Service) -> None:
        service.on(c.RegisterWorker, self.register_worker)
        service.on(c.ReportBlocks, self.report_blocks)
        service.on_stream(c.WatchMembers, self.watch_members)
        service.on_at_once(c.AskBlocks, self.ask_blocks)
        service.on(c.AskDrops, self.ask_drops)
        service.on(c.Locate, self.locate)

    async def register_worker(self, request: c.RegisterWorker, session: Session) -> c.Registered:
        self.workers.check_free(request)
        known = await self._writer.run(
            lambda: self._store.register_worker(request.name, request.address, request.labels, request.capacity_bytes)
        )
        self.workers.check_free(request)
        self.leases.end_all(request.name)
        self.workers.register(request, known, session)
        for tell in self.on_come:
            tell(request.name)
        cluster, stores = self._told()
        return c.Registered(cluster, stores, known.epoch)

    async def report_blocks(self, request: c.ReportBlocks, session: Session) -> c.ReportReply:
        workers, name = self.workers, self.workers.name_of(session)
        workers.heard(name, request.epoch, request.room_bytes, request.capacity_bytes)
        moved = self.leases.renew(name, m.block_ids(request.fetching), trio.current_time())
        if request.added or request.removed or request.full:
            await self._write_report(name, request)
            # That may have taken a while: it is alive all the same, or has begun anew, and this answer is for nobody.
            name = workers.name_of(session)
            workers.heard(name, request.epoch, request.room_bytes, request.capacity_bytes)
        workers.settles(name, request.unsettled)
        self.leases.end(name, [BlockId(each.key, each.block_index) for each in request.added])
        self.leases.end(name, m.block_ids(request.released))
        shared, sole = workers.take_standings(name, c.REPORTED_AT_ONCE)
        return c.ReportReply(m.block_names(shared), m.block_names(sole), m.block_names(moved))

    async def _write_report(self, name: str, request: c.ReportBlocks) -> None:
        workers = self.workers
        added = [(BlockId(each.key, each.block_index), each.length) for each in request.added]
        removed = m.block_ids(request.removed)
        complete = request.full and not request.more

        # What it holds counts, for others, once it has said all of it.
        counting = workers.counting()
        alive = counting if not request.full else frozenset[str]()

        def write() -> list[Standing]:
            found = self._store.report(name, request.epoch, added, removed, alive)
            if complete:
                itself = {name} if workers.state(name) == "active" else set()
                found += self._store.end_full_report(name, request.epoch, counting | itself)
            return found

        def then(standings: list[Standing]) -> None:
            if complete:
                workers.count(name, request.epoch)
            workers.note(standings)

        await self._writer.run(write, then)

    async def watch_members(self, request: c.WatchMembers, session: Session) -> AsyncGenerator[c.Members, None]:
        async with aclosing(self.workers.watch()) as members:
            async for each in members:
                yield each

    def ask_blocks(self, request: c.AskBlocks, session: Session) -> c.BlockPlaces:
        asker, now_s = self.workers.name_of(session), trio.current_time()
        return c.BlockPlaces([self._place(block, asker, request, now_s) for block in m.block_ids(request.blocks)])

    def _place(self, block: BlockId, asker: str, request: c.AskBlocks, now_s: float) -> c.BlockPlace:
        holders = [
            name
            for name in self._store.holders(block)
            if name != asker and name not in request.without and self.workers.is_alive(name)
        ]
        if holders:
            return c.BlockPlace(holders, "")
        if request.lease:
            return c.BlockPlace([], self.leases.take(block, asker, now_s, request.without))
        holder = self.leases.holder(block, now_s)
        return c.BlockPlace([], holder if holder not in request.without else "")

    async def ask_drops(self, request: c.AskDrops, session: Session) -> c.Granted:
        name, blocks, counting = self.workers.name_of(session), m.block_ids(request.blocks), self.workers.counting()
        granted, _ = await self._writer.run(
            lambda: self._store.grant_drops(name, blocks, counting),
            lambda result: self.workers.note(result[1]),
        )
        return c.Granted(m.block_names(granted))

    async def locate(self, request: c.Locate, session: Session) -> c.Holders:
        return c.Holders(self._store.holders(BlockId(request.key, request.block_index)))

    def _on_dead(self, name: str) -> None:
        self.leases.end_all(name)
        for tell in self.on_dead:
            tell(name)
        # What others share with it alone they hold alone now.
        self._nursery.start_soon(self._count_without, name)

    async def set_state(self, name: str, state: c.WorkerState) -> None:
        """For good. What a worker holds that is to go counts no more: others must not give up theirs for it. Raises
        NotFoundError.
        """
        if self.workers.state(name) == state:
            return
        await self._writer.run(
            lambda: self._store.set_worker_state(name, state), lambda _: self.workers.set_state(name, state)
        )
        await self._count_again(name)

    async def forget(self, name: str) -> None:
        """For good. Raises NotFoundError; ConfigError for one that is alive."""
        self.workers.forget(name)
        await self._writer.run(lambda: self._store.forget_worker(name))

    async def _count_without(self, name: str) -> None:
        try:
            await self._count_again(name)
        except Exception:
            # They keep a copy more than they must, until each has reported everything again.
            logger.exception("what others hold alone is not known name=%s", name)

    async def _count_again(self, name: str) -> None:
        counting = self.workers.counting()
        await self._writer.run(lambda: self._store.standings(name, counting), self.workers.note)
