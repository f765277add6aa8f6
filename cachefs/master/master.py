"""The master as a process: opens its database and under-stores, and answers requests."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

import msgspec
import trio

from cachefs.master.config import MasterConfig
from cachefs.master.namespace import MountedStore, Namespace
from cachefs.master.workers import Workers
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, open_meta_store
from cachefs.model import BlockId, Geometry, NamespaceChangedError, NotFoundError, UnavailableError, UnderStoreError
from cachefs.net import Address, Hello, Service, Session, serve
from cachefs.ufs import UnderStore, at_most, open_under_store
from cachefs.wire import messages as m

logger = logging.getLogger(__name__)

FIRST_CONTACT_S = 8.0
"""How long an under-store may take to answer at the start; later requests have their store's deadline."""


class Master:
    """Handlers of requests."""

    def __init__(
        self, store: MetaStore, writer: Writer, namespace: Namespace, cluster: m.ClusterInfo, workers: Workers
    ) -> None:
        self._store = store
        self._writer = writer
        self._namespace = namespace
        self._cluster = cluster
        self._workers = workers
        self._started = trio.current_time()

    def service(self) -> Service:
        service = Service()
        service.on(m.GetCluster, self.get_cluster)
        service.on(m.GetAttr, self.get_attr)
        service.on(m.ResolvePath, self.resolve_path)
        service.on(m.Lookup, self.lookup)
        service.on_stream(m.ListDir, self.list_dir)
        service.on_stream(m.Watch, self.watch)
        service.on(m.Refresh, self.refresh)
        service.on_stream(m.LoadMetadata, self.load_metadata)
        service.on(m.GetMasterStatus, self.get_status)
        service.on(m.Locate, self.locate)
        service.on(m.RegisterWorker, self.register_worker)
        service.on(m.Resolve, self.resolve)
        service.on(m.ResolveNext, self.resolve_next)
        service.on(m.ReportChanged, self.report_changed)
        service.on(m.ReportBlocks, self.report_blocks)
        return service

    async def get_cluster(self, request: m.GetCluster, session: Session) -> m.ClusterInfo:
        return self._cluster

    def _check_namespace(self, session: Session) -> None:
        """For what has inode numbers in the request or the answer. Raises NamespaceChangedError."""
        if session.hello.namespace_id not in ("", self._cluster.namespace_id):
            raise NamespaceChangedError("the master has another namespace than the one these inode numbers are of")

    async def get_attr(self, request: m.GetAttr, session: Session) -> m.AttrReply:
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
        # Counting scans tables: in a thread, through the writer's connection, which nobody else uses meanwhile.
        mounted = self._namespace.mounted()
        counts, totals = await self._writer.run(
            lambda: ([self._store.counts(each.mount.mount_id) for each in mounted], self._store.replica_totals())
        )
        mounts = [
            m.MountInfo(each.mount.path, each.url, directories, files, each.ufs.hidden_keys, each.serving_stale)
            for each, (directories, files) in zip(mounted, counts, strict=True)
        ]
        uptime_s = trio.current_time() - self._started
        return m.MasterStatus(self._cluster, uptime_s, mounts, self._workers.infos(totals))

    async def locate(self, request: m.Locate, session: Session) -> m.Holders:
        return m.Holders(self._store.holders(BlockId(request.key, request.block_index)))

    async def register_worker(self, request: m.RegisterWorker, session: Session) -> m.Registered:
        self._workers.register(request, session)
        stores = [m.StoreInfo(each.mount.mount_id, each.url, each.options) for each in self._namespace.mounted()]
        return m.Registered(self._cluster, stores)

    async def resolve(self, request: m.Resolve, session: Session) -> m.ObjectLocation:
        self._check_namespace(session)
        return self._namespace.resolve(request.ino)

    async def resolve_next(self, request: m.ResolveNext, session: Session) -> m.NextLocations:
        self._check_namespace(session)
        return self._namespace.resolve_next(request.ino, request.after, request.count)

    async def report_changed(self, request: m.ReportChanged, session: Session) -> m.Done:
        self._check_namespace(session)
        await self._namespace.recheck(request.ino)
        return m.Done()

    async def report_blocks(self, request: m.ReportBlocks, session: Session) -> m.Done:
        worker = self._workers.name_of(session)
        added = [(BlockId(each.key, each.block_index), each.length) for each in request.added]
        removed = [BlockId(key, index) for key, index in request.removed]
        await self._writer.run(lambda: self._store.report(worker, added, removed, request.whole))
        return m.Done()


async def run_master(
    config: MasterConfig, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled; reports the addresses it listens on.

    Raises ConfigError; CachefsError for a database that cannot be used; NotFoundError, DeniedError, UnavailableError
    when a store to be mounted does not answer at the start; one that was mounted before may be unavailable.
    """
    with open_meta_store(config.data_dir) as store:
        async with AsyncExitStack() as stack:
            geometry = _settle_geometry(store, config)
            opened = [
                await stack.enter_async_context(open_under_store(url, config.ufs_options)) for _, url in config.mounts
            ]
            silent = [
                ufs
                for (path, _), ufs in zip(config.mounts, opened, strict=True)
                if not await _first_contact(ufs, is_known=store.is_attached(path, ufs.origin))
            ]
            mounts = store.attach([(path, ufs.origin) for (path, _), ufs in zip(config.mounts, opened, strict=True)])
            mounted = [
                MountedStore(mount, url, config.ufs_options, ufs, failing=ufs in silent)
                for mount, (_, url), ufs in zip(mounts, config.mounts, opened, strict=True)
            ]
            cluster = m.ClusterInfo(config.cluster_id, store.namespace_id, geometry, config.sync_interval_s)
            async with trio.open_nursery() as nursery:
                writer = Writer(store)
                nursery.start_soon(writer.serve)
                namespace = Namespace(store, writer, mounted, config.sync_interval_s, nursery)
                master = Master(store, writer, namespace, cluster, Workers())
                hello = Hello(role="master", name=config.cluster_id, namespace_id=store.namespace_id)
                await serve(master.service(), [config.listen], hello=hello, task_status=task_status)


async def _first_contact(ufs: UnderStore, *, is_known: bool) -> bool:
    """A wrong name, endpoint or key is told now, to the person who typed it and waits, and not to a reader later.

    One that was mounted before may be away for now: what is known of it is worth serving. Returns whether it answered.
    Raises NotFoundError, UnderStoreError.
    """
    try:
        with at_most(FIRST_CONTACT_S):
            await ufs.stat("")
        return True
    except UnavailableError as error:
        if not is_known:
            raise UnavailableError(f"cannot mount {ufs.origin}: {error}") from error
        logger.warning("under-store is away, serving what is known origin=%s error=%s", ufs.origin, error)
        return False
    except (NotFoundError, UnderStoreError) as error:
        raise type(error)(f"cannot mount {ufs.origin}: {error}") from error


def _settle_geometry(store: MetaStore, config: MasterConfig) -> Geometry:
    text = store.fact("geometry")
    known = msgspec.json.decode(text, type=Geometry) if text is not None else None
    geometry = config.settle_geometry(known)
    if known is None:
        store.set_fact("geometry", msgspec.json.encode(geometry).decode())
    return geometry
