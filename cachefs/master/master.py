"""The master as a process: opens its database and under-stores, and answers requests."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import trio

from cachefs.master.access import ACCESS
from cachefs.master.attaching import Attaching, open_mounts
from cachefs.master.cluster import Cluster
from cachefs.master.config import MasterConfig
from cachefs.master.jobs import Jobs
from cachefs.master.metrics import MasterParts, watch_master
from cachefs.master.mounted import Holder, MountedStore
from cachefs.master.namespace import Namespace
from cachefs.master.pins import Pinning
from cachefs.master.quotas import QuotaControl, QuotaShares
from cachefs.master.unopened import open_when_they_answer
from cachefs.master.volumes import Volumes
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, normalise_mount_path, open_meta_store
from cachefs.metrics import Monitor
from cachefs.model import Geometry, NamespaceChangedError, NotADirectory, without_credentials
from cachefs.net import Address, Hello, Service, Session, answer_ping, open_background, serve
from cachefs.wire import messages as m
from cachefs.wire import quotas as q

logger = logging.getLogger(__name__)


class Master:
    """Handlers of requests."""

    def __init__(
        self,
        store: MetaStore,
        writer: Writer,
        namespace: Namespace,
        attaching: Attaching,
        pinning: Pinning,
        shares: QuotaShares,
        quotas: QuotaControl,
        volumes: Volumes,
        info: m.ClusterInfo,
        cluster: Cluster,
    ) -> None:
        self._store = store
        self._writer = writer
        self._namespace = namespace
        self._attaching = attaching
        self._pinning = pinning
        self._shares = shares
        self._quotas = quotas
        self._volumes = volumes
        self._info = info
        self._cluster = cluster
        self._started = trio.current_time()

    def service(self) -> Service:
        service = Service(ACCESS)
        service.on_at_once(m.Ping, answer_ping)
        service.on(m.GetCluster, self.get_cluster)
        service.on_at_once(m.GetAttr, self.get_attr)
        service.on(m.ResolvePath, self.resolve_path)
        service.on(m.Lookup, self.lookup)
        service.on_stream(m.ListDir, self.list_dir)
        service.on_stream(m.Watch, self.watch)
        service.on(m.Refresh, self.refresh)
        service.on_stream(m.LoadMetadata, self.load_metadata)
        service.on(m.GetMasterStatus, self.get_status)
        service.on_at_once(m.ListWorkers, self.list_workers)
        service.on(m.AddStore, self.add_store)
        service.on(m.RemoveStore, self.remove_store)
        service.on(m.GetStores, self.get_stores)
        service.on_stream(m.WatchStores, self.watch_stores)
        service.on(m.Pin, self.pin)
        service.on(m.Unpin, self.unpin)
        service.on(m.ListPins, self.list_pins)
        service.on_stream(m.WatchPins, self.watch_pins)
        service.on(m.PinsApplied, self.pins_applied)
        service.on(q.SetQuota, self.set_quota)
        service.on(q.RemoveQuota, self.remove_quota)
        service.on_at_once(q.ListQuotas, self.list_quotas)
        service.on_stream(q.WatchQuotas, self.watch_quotas)
        service.on(q.QuotasApplied, self.quotas_applied)
        service.on_at_once(q.ReportQuotas, self.report_quotas)
        service.on_at_once(m.Resolve, self.resolve)
        service.on_at_once(m.ResolveNext, self.resolve_next)
        service.on(m.ReportChanged, self.report_changed)
        self._volumes.add_to(service)
        self._cluster.add_to(service)
        return service

    async def get_cluster(self, request: m.GetCluster, session: Session) -> m.ClusterInfo:
        return self._info

    def _check_namespace(self, session: Session) -> None:
        """For what has inode numbers in the request or the answer. Raises NamespaceChangedError."""
        if session.hello.namespace_id not in ("", self._info.namespace_id):
            raise NamespaceChangedError("the master has another namespace than the one these inode numbers are of")

    def get_attr(self, request: m.GetAttr, session: Session) -> m.AttrReply:
        self._check_namespace(session)
        return self._namespace.getattr(request.ino)

    async def resolve_path(self, request: m.ResolvePath, session: Session) -> m.AttrReply:
        self._check_namespace(session)
        return await self._namespace.resolve_path(request.path)

    async def lookup(self, request: m.Lookup, session: Session) -> m.LookupReply:
        self._check_namespace(session)
        return m.LookupReply(await self._namespace.lookup(request.parent, request.name))

    async def list_dir(self, request: m.ListDir, session: Session) -> AsyncGenerator[m.ListChunk, None]:
        self._check_namespace(session)
        async with aclosing(self._namespace.list_dir(request.ino, request.after)) as chunks:
            async for entries in chunks:
                yield m.ListChunk(entries)

    async def watch(self, request: m.Watch, session: Session) -> AsyncGenerator[m.Changes, None]:
        self._check_namespace(session)
        with self._namespace.watchers.watch() as watcher:
            yield m.Changes([])
            while True:
                yield await watcher.next()

    async def refresh(self, request: m.Refresh, session: Session) -> m.RefreshReply:
        return await self._namespace.refresh(request.path, recursive=request.recursive)

    async def load_metadata(self, request: m.LoadMetadata, session: Session) -> AsyncGenerator[m.LoadProgress, None]:
        async for progress in self._namespace.load(request.path):
            yield progress

    async def get_status(self, request: m.GetMasterStatus, session: Session) -> m.MasterStatus:
        mounts, totals = await self._mount_infos(self._namespace.mounts.all())
        uptime_s = trio.current_time() - self._started
        return m.MasterStatus(self._info, uptime_s, mounts, self._cluster.workers.infos(totals))

    def list_workers(self, request: m.ListWorkers, session: Session) -> m.WorkerList:
        return m.WorkerList(self._cluster.workers.infos({}))

    async def _mount_infos(self, mounted: list[MountedStore]) -> tuple[list[m.MountInfo], dict[str, tuple[int, int]]]:
        """With the totals of workers, counted at the same time."""
        # Counting scans tables: in a thread, through the writer's connection, which nobody else uses meanwhile.
        counts, totals = await self._writer.run(
            lambda: ([self._store.counts(each.mount.mount_id) for each in mounted], self._store.replica_totals())
        )
        infos = [
            m.MountInfo(
                path=each.mount.path,
                url=without_credentials(each.url),
                directories=directories,
                files=files,
                hidden_keys=each.ufs.hidden_keys,
                serving_stale=each.serving_stale,
                by_hand=each.by_hand,
                failing_s=each.health.failing_s,
                failures=each.health.failures,
                last_error=each.health.last_error,
            )
            for each, (directories, files) in zip(mounted, counts, strict=True)
        ]
        return infos, totals

    async def add_store(self, request: m.AddStore, session: Session) -> m.MountInfo:
        mounted = await self._attaching.add(request.path, request.url, request.options)
        return (await self._mount_infos([mounted]))[0][0]

    async def remove_store(self, request: m.RemoveStore, session: Session) -> m.MountInfo:
        self._volumes.check_no_volume(normalise_mount_path(request.path, "PATH"))
        mounted = await self._attaching.remove(request.path, dry_run=True)
        # Told as it was before.
        (info,), _ = await self._mount_infos([mounted])
        if not request.dry_run:
            await self._attaching.remove(request.path, dry_run=False)
        return info

    async def get_stores(self, request: m.GetStores, session: Session) -> m.Stores:
        self._check_namespace(session)
        return m.Stores(_store_infos(self._namespace))

    async def watch_stores(self, request: m.WatchStores, session: Session) -> AsyncGenerator[m.StoresInUse, None]:
        self._check_namespace(session)
        async with aclosing(self._namespace.mounts.told.watch()) as changes:
            async for each in changes:
                yield each

    async def pin(self, request: m.Pin, session: Session) -> m.PinReply:
        paths = [normalise_mount_path(path, "PATH") for path in request.paths]
        for path in paths:
            await self._namespace.resolve_path(path)
        return await self._pinning.pin(paths, dry_run=request.dry_run)

    async def unpin(self, request: m.Unpin, session: Session) -> m.UnpinReply:
        paths = [normalise_mount_path(path, "PATH") for path in request.paths]
        return await self._pinning.unpin(paths, dry_run=request.dry_run)

    async def list_pins(self, request: m.ListPins, session: Session) -> m.PinList:
        return await self._pinning.list_pins(sizes=request.sizes)

    async def watch_pins(self, request: m.WatchPins, session: Session) -> AsyncGenerator[m.PinnedContents, None]:
        async with aclosing(self._namespace.pins.contents()) as contents:
            async for part in contents:
                yield part

    async def pins_applied(self, request: m.PinsApplied, session: Session) -> m.Done:
        workers = self._cluster.workers
        workers.pins_applied(workers.name_of(session), request.serial)
        return m.Done()

    async def set_quota(self, request: q.SetQuota, session: Session) -> q.QuotaInfo:
        path = normalise_mount_path(request.path, "PATH")
        try:
            attr = (await self._namespace.resolve_path(path)).attr
        except NotADirectory as error:
            raise NotADirectory(f"{path}: a quota is of a directory, and something above it is none") from error
        if not attr.is_dir:
            raise NotADirectory(f"{path}: a quota is of a directory, for all that is below it; this is a file")
        return await self._quotas.set(path, request.limit_bytes)

    async def remove_quota(self, request: q.RemoveQuota, session: Session) -> q.QuotaInfo:
        return await self._quotas.remove(normalise_mount_path(request.path, "PATH"), dry_run=request.dry_run)

    def list_quotas(self, request: q.ListQuotas, session: Session) -> q.QuotaList:
        return self._quotas.list_all()

    async def watch_quotas(self, request: q.WatchQuotas, session: Session) -> AsyncGenerator[q.QuotaContents, None]:
        async with aclosing(self._namespace.quotas.contents()) as contents:
            async for part in contents:
                yield part

    async def quotas_applied(self, request: q.QuotasApplied, session: Session) -> m.Done:
        workers = self._cluster.workers
        workers.quotas_applied(workers.name_of(session), request.serial)
        return m.Done()

    def report_quotas(self, request: q.ReportQuotas, session: Session) -> q.QuotaGrants:
        return self._shares.report(self._cluster.workers.name_of(session), request)

    def resolve(self, request: m.Resolve, session: Session) -> m.ObjectLocation:
        self._check_namespace(session)
        return self._namespace.resolve(request.ino)

    def resolve_next(self, request: m.ResolveNext, session: Session) -> m.NextLocations:
        self._check_namespace(session)
        return self._namespace.resolve_next(request.ino, request.after, request.count)

    async def report_changed(self, request: m.ReportChanged, session: Session) -> m.Done:
        self._check_namespace(session)
        await self._namespace.recheck(request.ino)
        return m.Done()


def _store_infos(namespace: Namespace) -> list[m.StoreInfo]:
    return [m.StoreInfo(each.mount.mount_id, each.url, each.options) for each in namespace.mounts.all()]


async def run_master(
    config: MasterConfig,
    monitor: Monitor | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; reports the addresses it listens on. `monitor` is shown how it does.

    Raises ConfigError; CachefsError for a database that cannot be used; as `open_mounts` for under-stores.
    """
    with open_meta_store(config.data_dir) as store:
        async with open_background() as holding:
            geometry = _settle_geometry(store, config)
            holder = Holder(holding)
            mounted = await open_mounts(store, config.mounts, config.ufs_options, holder)
            info = m.ClusterInfo(config.cluster_id, store.namespace_id, geometry, config.sync_interval_s)
            async with trio.open_nursery() as nursery:
                writer = Writer(store)
                nursery.start_soon(writer.serve)
                namespace = Namespace(store, writer, mounted, config.sync_interval_s, nursery)
                open_when_they_answer(nursery, holder, mounted)
                del mounted  # whose credentials go with each that is removed
                attaching = Attaching(namespace.mounts, holder)
                cluster = Cluster(store, writer, lambda: (info, _store_infos(namespace)), nursery)
                nursery.start_soon(cluster.workers.run)
                pinning = Pinning(store, writer, namespace.pins, cluster.workers, geometry)
                shares = QuotaShares(namespace.quotas, cluster.workers)
                cluster.on_come.append(shares.came)
                cluster.on_dead.append(shares.gone)
                quotas = QuotaControl(
                    store, writer, namespace.quotas, shares, namespace.pins, pinning, cluster.workers, geometry
                )
                volumes = Volumes(store, writer, namespace, attaching, quotas)
                master = Master(store, writer, namespace, attaching, pinning, shares, quotas, volumes, info, cluster)
                hello = Hello(role="master", name=config.cluster_id, namespace_id=store.namespace_id)
                service = master.service()
                jobs = Jobs(store, writer, namespace, cluster, geometry, nursery)
                jobs.add_to(service)
                if monitor is not None:
                    parts = MasterParts(
                        store,
                        writer,
                        namespace,
                        cluster.workers,
                        jobs=jobs,
                        quotas=shares,
                        leases=lambda: len(cluster.leases),
                        open_stores=lambda: holder.opened,
                    )
                    service.observe = parts.requests.observe
                    nursery.start_soon(watch_master, monitor, parts)
                await serve(service, [config.listen], hello=hello, security=config.security, task_status=task_status)


def _settle_geometry(store: MetaStore, config: MasterConfig) -> Geometry:
    text = store.fact("geometry")
    known = msgspec.json.decode(text, type=Geometry) if text is not None else None
    geometry = config.settle_geometry(known)
    if known is None:
        store.set_fact("geometry", msgspec.json.encode(geometry).decode())
    return geometry
