"""The worker as a process: opens its tier, registers with the master, and answers mounts."""

from __future__ import annotations

import logging
import platform
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from functools import partial

import msgspec
import trio

from cachefs.metrics import Monitor, Times
from cachefs.model import BlockId, CachefsError, ConfigError, NamespaceChangedError
from cachefs.net import Address, Answer, Hello, Peer, Service, Session, UnixAddress, answer_ping, listening, serve_on
from cachefs.store import Store, Tier, TierState, open_store, running_boot_id
from cachefs.wire import cluster as c
from cachefs.wire import control
from cachefs.wire import messages as m
from cachefs.worker.access import ACCESS
from cachefs.worker.admission import Admission
from cachefs.worker.blocks import Blocks
from cachefs.worker.care import Care
from cachefs.worker.checked import CheckedReads
from cachefs.worker.config import WorkerConfig
from cachefs.worker.counters import Counters
from cachefs.worker.drops import Drops
from cachefs.worker.giving import Giving
from cachefs.worker.jobs import Filler
from cachefs.worker.master_link import MasterLink
from cachefs.worker.members import Members
from cachefs.worker.metrics import WorkerParts, watch_worker
from cachefs.worker.origin import Origin
from cachefs.worker.outside import Outside
from cachefs.worker.peers import Peers
from cachefs.worker.pins import Pins
from cachefs.worker.places import Places
from cachefs.worker.quotas import QuotaFollower
from cachefs.worker.slots import Slots
from cachefs.worker.sources import Source, Sources
from cachefs.worker.supply import Supply
from cachefs.worker.suspects import Suspects
from cachefs.worker.tasks import Tasks
from cachefs.worker.verify import verify

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 5.0
_FOLLOW_AGAIN_S = 1.0


class Worker:
    """Handlers of requests."""

    def __init__(
        self,
        config: WorkerConfig,
        sources: Sources,
        store: Store,
        blocks: Blocks,
        checked: CheckedReads,
        giving: Giving,
        suspects: Suspects,
        counters: Counters,
        nursery: trio.Nursery,
    ) -> None:
        self._config = config
        self._sources = sources
        self._store = store
        self._suspects = suspects
        self._blocks = blocks
        self._giving = giving
        self._outside = Outside(blocks, checked, self._check_namespace, counters, nursery)
        self._counters = counters
        self.times: Times[str] | None = None
        """Of requests; None: nobody wants to know."""
        self._started = trio.current_time()
        self._passthrough_opens = 0
        self._cached_opens = 0

    def service(self) -> Service:
        service = Service()
        service.on_at_once(m.Ping, answer_ping)
        service.observe = self.times.observe if self.times is not None else None
        service.on(m.Promote, self.promote)
        service.on(m.Fetch, self.fetch)
        service.on_at_once(m.Opened, self.opened)
        service.on(m.Free, self.free)
        service.on(m.GetBlockStatus, self.block_status)
        service.on_stream(m.Verify, self.verify)
        service.on(m.GetWorkerStatus, self.get_status)
        return service

    def public_service(self) -> Service:
        """What is answered over TCP, to other workers, to mounts of other hosts and to tools."""
        service = Service(ACCESS)
        service.on_at_once(m.Ping, answer_ping)
        service.on(c.ReadBlock, self._giving.read_block)
        service.on(c.DoubtBlock, self._giving.doubt_block)
        service.on(m.Fetch, self._outside.fetch)
        service.on(m.Promote, self._outside.promote)
        service.on_at_once(m.Opened, self.opened_outside)
        service.on(m.GetBlockStatus, self.block_status)
        service.on(control.MeasureBlock, self._giving.measure_block)
        service.observe = self.times.observe if self.times is not None else None
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
        follows = self._blocks.opened(m.block_ids(request.blocks), session.id)
        self._passthrough_opens += request.counts.passthrough
        self._cached_opens += request.counts.cached
        return m.OpenedReply(follows, self._store.down)

    def opened_outside(self, request: m.Opened, session: Session) -> m.OpenedReply:
        """The disks of this node are no concern of that one."""
        return msgspec.structs.replace(self.opened(request, session), down=[])

    async def block_status(self, request: m.GetBlockStatus, session: Session) -> m.BlockStatus:
        return self._blocks.status(BlockId(request.key, request.block_index))

    async def free(self, request: m.Free, session: Session) -> m.FreeReply:
        return await self._blocks.free(m.block_ids(request.blocks))

    async def verify(self, request: m.Verify, session: Session) -> AsyncGenerator[m.VerifyProgress, None]:
        async for progress in verify(self._store, self._suspects, self._counters, repair=request.repair):
            yield progress

    async def get_status(self, request: m.GetWorkerStatus, session: Session) -> m.WorkerStatus:
        tiers = [_tier_info(tier, self._store.state(tier)) for tier in self._store.tiers]
        uptime_s = trio.current_time() - self._started
        counters = m.FetchCounters(
            **{name: getattr(self._counters, name) for name in m.FetchCounters.__struct_fields__}
        )
        opens = m.OpenCounts(self._passthrough_opens, self._cached_opens)
        stores = [
            m.StoreState(origin, each.failing_s, each.failures, each.last_error)
            for origin, each in sorted(self._sources.health.items())
        ]
        return m.WorkerStatus(
            name=self._config.name,
            namespace_id=self._sources.namespace_id,
            uptime_s=uptime_s,
            tiers=tiers,
            counters=counters,
            opens=opens,
            stores=stores,
            master_away_s=self._sources.master_away_s,
            open_stores=self._sources.open_stores,
        )


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


class _Reporting:
    """What the master is told of this worker, and what becomes of its answers."""

    def __init__(self, store: Store, places: Places, members: Members, blocks: Blocks) -> None:
        self._store = store
        self._places = places
        self._members = members
        self._blocks = blocks

    def held(self) -> list[tuple[BlockId, int]]:
        return self._store.blocks()

    def fetching(self) -> list[BlockId]:
        return self._places.fetching()

    def take_released(self) -> list[BlockId]:
        return self._places.take_released()

    def room(self) -> tuple[int, int]:
        """Without any for others where it keeps nothing."""
        return self._store.room_bytes() if self._blocks.keeps else 0, self._store.capacity_bytes()

    def unsettled(self) -> c.Unsettled | None:
        return None if self._members.takes_blocks else self._blocks.unsettled()

    def answered(self, shared: Iterable[BlockId], sole: Iterable[BlockId], moved: Iterable[BlockId]) -> None:
        self._store.share(list(shared), True)
        self._store.share(list(sole), False)
        self._places.moved(moved)

    def began(self) -> None:
        self._store.unshare_all()


async def run_worker(
    config: WorkerConfig,
    monitor: Monitor | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; reports the addresses it listens on, when it is registered with the master. `monitor` is
    shown how it does.

    Raises ConfigError, also when the master comes back as that of another cluster or with another geometry: what is
    open here was made for the first one, and when another worker has this one's name. HandshakeError when the master,
    at the start, does not accept the worker's token, or cannot prove that it has it. TierError when the tier cannot be
    used.
    """
    counters = Counters()
    async with listening([config.listen, UnixAddress(config.socket)]) as listeners, trio.open_nursery() as nursery:
        public, local = listeners
        registration = c.RegisterWorker(
            name=config.name,
            address=config.advertise or str(public.address),
            socket=config.socket,
            host_boot_id=running_boot_id(),
            capacity_bytes=sum(tier.capacity_bytes for tier in config.tiers),
            instance=secrets.token_hex(8),
            labels=dict(config.labels),
        )
        link = MasterLink(config.master, registration, security=config.security)
        sources = Sources(link, nursery, config.removed_store_idle_s)
        pins, quotas = Pins(), QuotaFollower()
        members = Members(config.name, config.labels)
        tasks = Tasks()
        known: m.ClusterInfo | None = None

        async def on_registered(registered: c.Registered) -> None:
            nonlocal known
            cluster = registered.cluster
            if known is not None and known.namespace_id != cluster.namespace_id:
                if (known.cluster_id, known.geometry) != (cluster.cluster_id, cluster.geometry):
                    raise ConfigError(
                        "--master", str(config.master), "the cluster, block and page size that this worker began with"
                    )
                logger.warning("the master has another namespace now, inode numbers are forgotten")
            known = cluster
            await sources.registered(cluster.namespace_id, registered.stores)

        async def follow(peer: Peer) -> None:
            async with trio.open_nursery() as following:
                following.start_soon(_keep_following, pins.follow, peer)
                following.start_soon(_keep_following, quotas.follow, peer)
                following.start_soon(_keep_following, members.follow, peer)
                following.start_soon(_keep_following, tasks.follow, peer)
                following.start_soon(_keep_following, sources.follow, peer)

        cluster: m.ClusterInfo = await nursery.start(link.serve, on_registered, follow)
        geometry = cluster.geometry
        with open_store(config.tiers, geometry, cluster.cluster_id, pins.keys, quotas=quotas.quotas) as store:
            pins.apply, quotas.apply = store.apply_pins, store.quotas.apply
            quotas.idle, quotas.trim = store.quotas.idle_bytes, store.quotas.trim
            # Nothing is evicted before it is known what must not be, and nothing is fetched before it is known who else
            # could have it.
            await pins.known.wait()
            await members.known.wait()
            await quotas.known.wait()
            await trio.to_thread.run_sync(store.apply_pins)
            await trio.to_thread.run_sync(store.quotas.apply)

            def blocks_of(source: Source) -> list[BlockId]:
                key, count = source.attr.key, geometry.block_count(source.attr.size_bytes)
                return [BlockId(key, index) for index in range(count)] if key else []

            sources.on_pinned = lambda source: store.pin(blocks_of(source))
            sources.on_quota = lambda source, quota: store.quotas.add(blocks_of(source), quota)
            token = trio.lowlevel.current_trio_token()

            def on_evicted(block: BlockId) -> None:
                token.run_sync_soon(link.lost, block)

            async def on_changed(source: Source) -> None:
                await _report_changed(link, source)

            def peer_hello() -> Hello:
                return Hello(role="worker", name=config.name, namespace_id=sources.namespace_id)

            def on_sealed(block: BlockId, size: int) -> None:
                # Whoever evicted it since, in another thread, may have been heard of before.
                if store.is_sealed(block):
                    link.sealed(block, size)

            def on_restored(block: BlockId, size: int) -> None:
                token.run_sync_soon(on_sealed, block, size)

            store.on_evicted, store.on_restored = on_evicted, on_restored
            blocks: Blocks | None = None
            try:
                async with trio.open_nursery() as background:
                    places = Places(link, members, counters)
                    peers = Peers(members, peer_hello, counters, background, config.security)
                    origin = Origin(store, sources, counters, on_changed)
                    slots = Slots(config.peer_slots, config.peer_bytes)
                    supply = Supply(geometry, members, places, peers, origin, slots)
                    supply.on_end = store.quotas.settle
                    drops = Drops(store, link, counters, on_sealed)
                    filler = Filler(
                        store,
                        origin,
                        supply,
                        counters,
                        demand_slots=config.demand_slots,
                        background_slots=config.background_slots,
                        load_slots=config.load_slots,
                        on_sealed=on_sealed,
                        nursery=background,
                    )
                    admission = Admission(geometry, store, members, supply, drops, quotas, counters)
                    suspects, checked = Suspects(store), CheckedReads(store)
                    blocks = Blocks(
                        config,
                        geometry,
                        store,
                        suspects,
                        checked,
                        sources,
                        filler,
                        supply,
                        admission,
                        counters,
                        background,
                    )
                    background.start_soon(quotas.run)
                    background.start_soon(blocks.end_idle)
                    background.start_soon(Care(store, suspects, counters, config).run)
                    giving = Giving(store, blocks, checked, sources, counters, background)
                    worker = Worker(config, sources, store, blocks, checked, giving, suspects, counters, background)
                    if monitor is not None:
                        worker.times = Times()
                        parts = WorkerParts(
                            counters,
                            store,
                            filler,
                            link,
                            sources,
                            worker.times,
                            lambda: len(places.fetching()),
                            lambda: len(members.others),
                        )
                        watch_worker(monitor, parts)
                    hello = Hello(role="worker", name=config.name, namespace_id=cluster.namespace_id)
                    background.start_soon(partial(serve_on, worker.service(), [local], hello=hello))
                    public_service = worker.public_service()
                    background.start_soon(
                        partial(serve_on, public_service, [public], hello=hello, security=config.security)
                    )
                    link.begin(_Reporting(store, places, members, blocks))
                    tasks.begin(geometry, sources, blocks, peers)
                    task_status.started([public.address, local.address])
                    try:
                        await trio.sleep_forever()
                    finally:
                        # Its tasks are not ours, and still use what ends with us.
                        await tasks.end()
            finally:
                # When nothing runs any more: partials are left on disk as they are.
                if blocks is not None:
                    blocks.close()


async def _keep_following(follow: Callable[[Peer], Awaitable[None]], peer: Peer) -> None:
    """Again, should the master have trouble of its own; until the connection is lost."""
    while not peer.closed.is_set():
        try:
            await follow(peer)
        except CachefsError as error:
            logger.warning("the master tells no more, asking again error=%s", error)
        with trio.move_on_after(_FOLLOW_AGAIN_S):
            await peer.closed.wait()


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
