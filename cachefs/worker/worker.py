"""The worker as a process: opens its tier, registers with the master, and answers mounts."""

from __future__ import annotations

import logging
import platform
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from functools import partial

import trio

from cachefs.model import BlockId, CachefsError, ConfigError, NamespaceChangedError
from cachefs.net import Address, Answer, Hello, Service, Session, UnixAddress, listening, serve_on
from cachefs.store import Store, Tier, TierState, open_store, running_boot_id
from cachefs.wire import messages as m
from cachefs.worker.blocks import Blocks
from cachefs.worker.care import Care
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.jobs import Filler
from cachefs.worker.master_link import MasterLink
from cachefs.worker.pins import Pins
from cachefs.worker.sources import Source, Sources
from cachefs.worker.verify import verify

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 5.0


class Worker:
    """Handlers of requests."""

    def __init__(
        self, config: WorkerConfig, sources: Sources, store: Store, blocks: Blocks, counters: Counters
    ) -> None:
        self._config = config
        self._sources = sources
        self._store = store
        self._blocks = blocks
        self._counters = counters
        self._started = trio.current_time()
        self._passthrough_opens = 0
        self._cached_opens = 0

    def service(self) -> Service:
        service = Service()
        service.on(m.Promote, self.promote)
        service.on(m.Fetch, self.fetch)
        service.on_at_once(m.Opened, self.opened)
        service.on(m.Free, self.free)
        service.on(m.GetBlockStatus, self.block_status)
        service.on_stream(m.Verify, self.verify)
        service.on(m.GetWorkerStatus, self.get_status)
        return service

    def public_service(self) -> Service:
        """What is answered over TCP: no bytes and no descriptors."""
        service = Service()
        service.on(m.GetWorkerStatus, self.get_status)
        return service

    async def promote(self, request: m.Promote, session: Session) -> m.PromoteReply:
        self._check_namespace(session)
        return await self._blocks.promote(request, session.id)

    async def fetch(self, request: m.Fetch, session: Session) -> Answer[m.FetchReply]:
        self._check_namespace(session)
        return await self._blocks.fetch(request, session)

    def _check_namespace(self, session: Session) -> None:
        """Called without a checkpoint before the number is looked up. Raises NamespaceChangedError."""
        asker = session.hello.namespace_id
        if asker not in ("", self._sources.namespace_id):
            raise NamespaceChangedError("inode numbers of another namespace than this worker's master has")

    def opened(self, request: m.Opened, session: Session) -> m.OpenedReply:
        follows = self._blocks.opened([BlockId(key, index) for key, index in request.blocks], session.id)
        self._passthrough_opens += request.counts.passthrough
        self._cached_opens += request.counts.cached
        return m.OpenedReply(follows, self._store.down)

    async def block_status(self, request: m.GetBlockStatus, session: Session) -> m.BlockStatus:
        return self._blocks.status(BlockId(request.key, request.block_index))

    async def free(self, request: m.Free, session: Session) -> m.FreeReply:
        return await self._blocks.free([BlockId(key, index) for key, index in request.blocks])

    async def verify(self, request: m.Verify, session: Session) -> AsyncGenerator[m.VerifyProgress, None]:
        async for progress in verify(self._store, self._counters, repair=request.repair):
            yield progress

    async def get_status(self, request: m.GetWorkerStatus, session: Session) -> m.WorkerStatus:
        tiers = [_tier_info(tier, self._store.state(tier)) for tier in self._store.tiers]
        uptime_s = trio.current_time() - self._started
        counters = m.FetchCounters(**asdict(self._counters))
        opens = m.OpenCounts(self._passthrough_opens, self._cached_opens)
        return m.WorkerStatus(self._config.name, self._sources.namespace_id, uptime_s, tiers, counters, opens)


def _tier_info(tier: Tier, state: TierState) -> m.TierInfo:
    status = tier.status()
    return m.TierInfo(
        kind=tier.config.kind,
        path=tier.config.path,
        capacity_bytes=status.capacity_bytes,
        used_bytes=status.used_bytes,
        reserved_bytes=status.reserved_bytes,
        blocks=status.sealed,
        partials=status.partials,
        evictions=status.evictions,
        pinned_bytes=status.pinned_bytes,
        state=state.value,
    )


async def run_worker(
    config: WorkerConfig, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; reports the addresses it listens on, when it is registered with the master.

    Raises ConfigError, also when the master comes back as that of another cluster or with another geometry: what is
    open here was made for the first one. TierError when the tier cannot be used.
    """
    counters = Counters()
    held: Callable[[], list[tuple[BlockId, int]]] = list
    async with listening([config.listen, UnixAddress(config.socket)]) as listeners, trio.open_nursery() as nursery:
        public, local = listeners
        registration = m.RegisterWorker(
            name=config.name,
            address=str(public.address),
            socket=config.socket,
            host_boot_id=running_boot_id(),
            capacity_bytes=sum(tier.capacity_bytes for tier in config.tiers),
        )
        link = MasterLink(config.master, registration)
        sources = Sources(link, nursery)
        pins = Pins()
        known: m.ClusterInfo | None = None

        async def on_registered(registered: m.Registered) -> None:
            nonlocal known
            cluster = registered.cluster
            if known is not None and known.namespace_id != cluster.namespace_id:
                if (known.cluster_id, known.geometry) != (cluster.cluster_id, cluster.geometry):
                    raise ConfigError(
                        "--master", str(config.master), "the cluster, block and page size that this worker began with"
                    )
                logger.warning("the master has another namespace now, inode numbers are forgotten")
            known = cluster
            await sources.add(cluster.namespace_id, registered.stores)

        registered: m.Registered = await nursery.start(link.serve, on_registered, lambda: held(), pins.follow)
        geometry, cluster = registered.cluster.geometry, registered.cluster
        with open_store(config.tiers, geometry, cluster.cluster_id, pins.keys) as store:
            held = store.blocks
            pins.apply = store.apply_pins
            # Nothing is evicted before it is known what must not be.
            await pins.known.wait()
            await trio.to_thread.run_sync(store.apply_pins)

            def on_pinned(source: Source) -> None:
                key, blocks = source.attr.key, geometry.block_count(source.attr.size_bytes)
                store.pin([BlockId(key, index) for index in range(blocks)] if key else [])

            sources.on_pinned = on_pinned
            token = trio.lowlevel.current_trio_token()

            def on_evicted(block: BlockId) -> None:
                token.run_sync_soon(link.lost, block)

            async def on_changed(source: Source) -> None:
                await _report_changed(link, source)

            def on_restored(block: BlockId, size: int) -> None:
                token.run_sync_soon(link.sealed, block, size)

            store.on_evicted, store.on_restored = on_evicted, on_restored
            blocks: Blocks | None = None
            try:
                async with trio.open_nursery() as background:
                    filler = Filler(
                        store,
                        sources,
                        counters,
                        demand_slots=config.demand_slots,
                        background_slots=config.background_slots,
                        load_slots=config.load_slots,
                        on_changed=on_changed,
                        on_sealed=link.sealed,
                        nursery=background,
                    )
                    blocks = Blocks(config, geometry, store, sources, filler, counters, background)
                    background.start_soon(blocks.end_idle)
                    background.start_soon(Care(store, counters, config).run)
                    worker = Worker(config, sources, store, blocks, counters)
                    hello = Hello(role="worker", name=config.name, namespace_id=cluster.namespace_id)
                    background.start_soon(partial(serve_on, worker.service(), [local], hello=hello))
                    background.start_soon(partial(serve_on, worker.public_service(), [public], hello=hello))
                    task_status.started([public.address, local.address])
            finally:
                # When nothing runs any more: partials are left on disk as they are.
                if blocks is not None:
                    blocks.close()


async def _report_changed(link: MasterLink, source: Source) -> None:
    """Returns when the master has looked at the object again; without it, after a while."""
    try:
        with trio.move_on_after(_REPORT_TIMEOUT_S):
            await link.call(m.ReportChanged(source.attr.ino))
    except CachefsError as error:
        logger.info("change not reported path=%s error=%s", source.info.path, error)


def default_name() -> str:
    """The host's name."""
    return platform.node() or "localhost"
