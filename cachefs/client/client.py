"""Everything a front end needs, in one place: names and attributes, sealed files, and reading what is not sealed."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from cachefs.client.config import ClientConfig
from cachefs.client.files import ContentReader, Data
from cachefs.client.metadata import ChangedName, Metadata
from cachefs.client.outlasting import recall_names
from cachefs.client.passed import PassedFiles
from cachefs.client.patience import patiently
from cachefs.client.reach import MasterReach
from cachefs.client.view import View
from cachefs.client.workers import Workers
from cachefs.model import (
    Attr,
    BlockId,
    CachefsError,
    Ino,
    IsADirectory,
    NamespaceChangedError,
    TransportError,
)
from cachefs.net import Address, Hello, Pool, Security, open_background
from cachefs.store import SealedReader
from cachefs.wire import Request
from cachefs.wire.cluster import Locate
from cachefs.wire.control import JobInfo, JobSpec, StartJob
from cachefs.wire.messages import (
    AddStore,
    ClusterInfo,
    Free,
    FreeReply,
    GetCluster,
    GetMasterStatus,
    ListPins,
    LoadMetadata,
    LoadProgress,
    MasterStatus,
    MountInfo,
    OpenCounts,
    Opened,
    Pin,
    PinList,
    PinReply,
    Refresh,
    RefreshReply,
    RemoveStore,
    Unpin,
    UnpinReply,
    block_names,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

_OPENED_BATCH = 512
_OPENED_EVERY_S = 1.0
_OPENED_MANY = 32
"""Reported without waiting, while the worker fetches ahead of whoever opens one file after the other."""
_WATCH_PAUSE_S = 0.1
_WATCH_LONGEST_PAUSE_S = 1.0
_WATCH_REFUSED_PAUSE_S = 5.0
_CONNECT_TIMEOUT_S = 5.0
_FREED_WITHIN_S = 60.0
"""By a worker that is alive: removing hundreds of large files takes some disks a while."""
_BEGIN_AGAIN_S = 2.0
"""For the worker to answer, of whoever goes on with the work of another: readers wait meanwhile."""


class Client:
    """Made by `open_client`; called from one trio thread."""

    def __init__(
        self,
        config: ClientConfig,
        cluster: ClusterInfo,
        master: Pool,
        reach: MasterReach,
        workers: Workers,
        sealed: SealedReader,
        nursery: trio.Nursery,
        epoch: int = 0,
    ) -> None:
        self.on_changed: Callable[[View, list[ChangedName]], None] = _ignore_names
        """Called with names that changed, when we have forgotten them: whoever was told of them may do so too."""
        self.on_everything: Callable[[], None] = _ignore
        """Called when nothing that was told may be believed any more: changes were missed, or it is another namespace.
        """
        self._config = config
        self._master = master
        """For what has no inode numbers: its hello names no namespace."""
        self.reach = reach
        """Whether the master answers."""
        reach.on_back = self._on_master_back
        self.workers = workers
        """Which of them is read through."""
        self._sealed = sealed
        self._passed = PassedFiles()
        self._nursery = nursery
        self._opened: set[BlockId] = set()
        self._many_opened = trio.Event()
        self._many = _OPENED_BATCH
        self._opens = {"passthrough": 0, "cached": 0}
        self._settling = trio.Lock()
        self._watching = trio.CancelScope()
        self.view = self._look_at(cluster, epoch)
        """The namespace as it is now; those before are kept by whoever has something open in them."""

    @property
    def security(self) -> Security | None:
        """What it proves to those it meets over TCP."""
        return self._config.security

    def _look_at(self, cluster: ClusterInfo, epoch: int) -> View:
        hello = Hello(role="client", namespace_id=cluster.namespace_id)

        async def on_foreign() -> None:
            await self._is_current(view)

        metadata = Metadata(
            Pool(self._config.master, hello, _CONNECT_TIMEOUT_S, self._nursery, self._config.security),
            namespace_id=cluster.namespace_id,
            sync_interval_s=cluster.sync_interval_s,
            metadata_cache_entries=self._config.metadata_cache_entries,
            timeouts=self._config.timeouts,
            reach=self.reach,
            patience_s=self._config.patience_s,
            on_foreign=on_foreign,
            nursery=self._nursery,
        )

        def connect(address: Address) -> Pool:
            return Pool(address, hello, _CONNECT_TIMEOUT_S, self._nursery, self._config.security)

        view = View(
            epoch,
            cluster,
            metadata,
            self.workers,
            connect,
            self._sealed,
            self._passed,
            promote=self._config.promote,
            patience_s=self._config.patience_s,
            is_current=self._is_current,
            on_promoted=self._on_promoted,
        )
        return view

    async def _is_current(self, view: View) -> bool:
        """Somebody refused the numbers of this view: ask the master whether they are of its namespace, and go over to
        that one if they are not.
        """
        async with self._settling:
            if self.view is not view:
                return False
            try:
                cluster = await self.ask(GetCluster())
            except TransportError:
                return True
            if cluster.namespace_id == view.cluster.namespace_id:
                return True
            logger.warning("the master has another namespace now, everything known is forgotten epoch=%d", view.epoch)
            self.view = self._look_at(cluster, view.epoch + 1)
            # What changes in the one before concerns nobody any more, should its master go on telling it.
            self._watching.cancel()
        self.on_everything()
        return False

    # ---- the namespace as it is now --------------------------------------------------------------------------------

    @property
    def cluster(self) -> ClusterInfo:
        return self.view.cluster

    @property
    def metadata(self) -> Metadata:
        return self.view.metadata

    @property
    def worker(self) -> Pool:
        """Raises UnavailableError when there is none."""
        return self.view.worker

    @property
    def tiers(self) -> tuple[str, ...]:
        """Paths of the tiers of this node's worker, the first the fastest."""
        return self._sealed.tiers

    def open_sealed_only_in(self, tiers: Sequence[str]) -> None:
        """Of the sealed files of other tiers the worker passes descriptors, in cached mode."""
        self._sealed.restrict(tiers)

    def open_sealed(self, attr: Attr) -> int | None:
        """As `View.open_sealed`."""
        return self.view.open_sealed(attr)

    async def promote(self, ino: Ino) -> bool:
        """As `View.promote`."""
        return await self.view.promote(ino)

    def _on_promoted(self) -> None:
        # It was not there: perhaps the worker fetches ahead of whoever asks for it.
        self._many = _OPENED_MANY

    def open_content(self, attr: Attr) -> ContentReader:
        """As `View.open_content`."""
        return self.view.open_content(attr)

    async def read_file(self, path: str, chunk_bytes: int) -> AsyncGenerator[Data, None]:
        """The whole content at a path of the namespace, in chunks. For tools; training jobs read a mount.

        Raises as `Metadata.lookup` and `ContentReader.read`.
        """
        view = self.view
        attr = await view.metadata.resolve(path)
        if attr.is_dir:
            raise IsADirectory(f"{path} is a directory")
        reader = view.open_content(attr)
        try:
            for offset in range(0, attr.size_bytes, chunk_bytes):
                yield await reader.read(offset, chunk_bytes)
        finally:
            reader.close()

    def _on_master_back(self) -> None:
        # Of what was told past its time, nobody may be sure any longer that there is nobody to ask.
        self.view.metadata.distrust()
        self.on_everything()

    async def watch(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hear from the master what changes, and forget it. Runs until cancelled; started once it is told the first
        time, or cannot be.
        """
        pause_s = _WATCH_PAUSE_S
        started = False

        def start() -> None:
            nonlocal started
            if not started:
                started = True
                task_status.started()

        while True:
            view = self.view
            try:
                with trio.CancelScope() as self._watching:
                    async with view.metadata.watch() as stream:
                        first = True
                        async for changes in stream:
                            told = view.metadata.apply(changes)
                            if first or changes.everything:
                                # What changed before we were listening was told to nobody.
                                view.metadata.distrust()
                                self.on_everything()
                            elif told:
                                self.on_changed(view, told)
                            first = False
                            pause_s = _WATCH_PAUSE_S
                            start()
                if view is not self.view:
                    continue
            except NamespaceChangedError:
                await self._is_current(view)
            except TransportError as error:
                logger.debug("changes not heard of error=%s", error)
                self.reach.doubt()
            except CachefsError as error:
                logger.log(logging.DEBUG if started else logging.INFO, "the master tells no changes error=%s", error)
                pause_s = _WATCH_REFUSED_PAUSE_S
            start()
            await trio.sleep(pause_s)
            pause_s = min(_WATCH_LONGEST_PAUSE_S, 2 * pause_s)

    # ---- what is the same in every namespace -----------------------------------------------------------------------

    def count_open(self, attr: Attr, *, passthrough: bool) -> None:
        """A file was opened: the worker is told soon, and counts."""
        self._opens["passthrough" if passthrough else "cached"] += 1
        if passthrough:
            self.note_use(attr)

    def note_use(self, attr: Attr) -> None:
        """A sealed file was used: the worker is told soon, so that it evicts others."""
        self._opened.add(BlockId(attr.key, 0))
        if len(self._opened) >= self._many:
            self._many_opened.set()

    async def holders(self, attr: Attr, block_index: int) -> list[str]:
        """Names of the workers that said they hold a block of this content. Raises TransportError."""
        request = Locate(attr.key, block_index)
        return (await self.ask(request)).workers

    async def ask_master(self) -> None:
        """Returns when it has answered. Raises TransportError at once when it cannot be reached."""
        await self._master.call(GetCluster())

    async def master_status(self) -> MasterStatus:
        """Raises TransportError."""
        return await self.ask(GetMasterStatus())

    async def add_store(self, path: str, url: str, options: dict[str, str]) -> MountInfo:
        """Have the master attach one more under-store.

        Raises ConfigError, NotFoundError, UnderStoreError and its kinds, TransportError.
        """
        return (await self._master.call(AddStore(path, url, options))).message

    async def remove_store(self, path: str, *, dry_run: bool = False) -> MountInfo:
        """Have the master detach an under-store, or only tell of it. Raises ConfigError, TransportError."""
        return (await self._master.call(RemoveStore(path, dry_run))).message

    async def pin(self, paths: list[str], *, dry_run: bool = False) -> PinReply:
        """Have contents at and below these paths never evicted, or only see whether they would fit.

        Raises NotFoundError, UnderStoreError, CapacityError, TransportError.
        """
        return (await self._master.call(Pin(paths, dry_run))).message

    async def unpin(self, paths: list[str], *, dry_run: bool = False) -> UnpinReply:
        """Let it be evicted again, or only see whether it is pinned. Raises NotFoundError, TransportError."""
        return (await self._master.call(Unpin(paths, dry_run))).message

    async def pins(self, *, sizes: bool) -> PinList:
        """What is pinned; without `sizes` at once. Raises TransportError."""
        return (await self._master.call(ListPins(sizes))).message

    async def refresh(self, path: str, *, recursive: bool = False) -> RefreshReply:
        """Have the master look at the under-store now: at a file, or at a directory's names (`recursive`: also of those
        below that were listed before). Every client is told what changed.

        Raises NotFoundError, NotADirectory, UnderStoreError and its kinds, TransportError.
        """
        return await self.ask(Refresh(path, recursive))

    @asynccontextmanager
    async def load_metadata(self, path: str) -> AsyncGenerator[AsyncIterator[LoadProgress], None]:
        """Have the master list a directory and everything below; what comes is how far it is, the last is the result.

        Leaving the block ends it. Raises NotFoundError, NotADirectory, UnderStoreError, TransportError.
        """
        async with (await self._master.peer()).stream(LoadMetadata(path)) as progress:
            yield progress

    async def ask(self, request: Request[R]) -> R:
        """Ask the master something that may be asked twice. Raises what it raises, and TransportError."""
        return (await self.reach.ask(lambda: self._master.call(request), self._config.patience_s)).message

    async def start_job(self, spec: JobSpec, *, dry_run: bool = False) -> JobInfo:
        """Have the master begin a job, or only tell what it would do. Raises as `StartJob`, and TransportError."""
        return (await self._master.call(StartJob(spec, dry_run))).message

    async def free(self, blocks: list[BlockId]) -> FreeReply:
        """Have this node's worker drop blocks that nobody reads.

        Raises TransportError, which names the worker when it says nothing: what of them it drops is not known then.
        UnavailableError.
        """
        request = Free(block_names(blocks))
        chosen = await self.workers.get()
        with trio.move_on_after(_FREED_WITHIN_S), chosen.calling(self.worker):
            return (await self.worker.call(request)).message
        raise TransportError(f"{chosen.candidate} does not answer within {_FREED_WITHIN_S:g} s")

    async def report_opens(self) -> None:
        """Tell the worker now and then what was opened. Runs until cancelled."""
        while True:
            with trio.move_on_after(_OPENED_EVERY_S):
                await self._many_opened.wait()
            self._many_opened = trio.Event()
            while (chosen := self.workers.chosen) is not None and (self._opened or any(self._opens.values())):
                batch = [self._opened.pop() for _ in range(min(_OPENED_BATCH, len(self._opened)))]
                counts, self._opens = OpenCounts(**self._opens), dict.fromkeys(self._opens, 0)
                try:
                    told = Opened(block_names(batch), counts)
                    with chosen.calling(self.worker):
                        reply = (await self.worker.call(told)).message
                    self._many = _OPENED_MANY if reply.follows else _OPENED_BATCH
                    if chosen.is_local:
                        self._sealed.avoid(reply.down)
                except CachefsError as error:
                    # Hints, not worth keeping for a worker that is away or does not want them.
                    logger.debug("the worker is not told what was opened error=%s", error)
                    self._opened.clear()


@dataclass(frozen=True)
class Earlier:
    """What a client knew whose work another goes on with."""

    cluster: ClusterInfo
    epoch: int
    tiers: tuple[str, ...] = ()
    names: bytes = b""
    """As of `pack_names`; empty: none."""


@asynccontextmanager
async def open_client(config: ClientConfig, earlier: Earlier | None = None) -> AsyncGenerator[Client, None]:
    """Connect to the master, and to the worker if there is one.

    Raises TransportError when the master, a worker that was named, or every worker there is cannot be reached.

    `earlier`: nobody is waited for, as whoever asks has been told all that it takes to begin; numbers mean the same.
    """
    if earlier is not None:
        async with _open_again(config, earlier) as client:
            yield client
        return
    async with open_background() as nursery:
        master = Pool(config.master, Hello(role="client"), _CONNECT_TIMEOUT_S, nursery, config.security)
        cluster = (await patiently(lambda: master.call(GetCluster()), config.first_contact_s)).message
        sealed = SealedReader([])
        reach = _reach(config, master)
        workers = Workers(config, master, reach, sealed)
        nursery.start_soon(reach.follow)
        await workers.begin()
        client = Client(config, cluster, master, reach, workers, sealed, nursery)
        nursery.start_soon(client.report_opens)
        if config.with_worker:
            nursery.start_soon(workers.follow)
        await nursery.start(client.watch)
        yield client


@asynccontextmanager
async def _open_again(config: ClientConfig, earlier: Earlier) -> AsyncGenerator[Client, None]:
    async with open_background() as nursery:
        master = Pool(config.master, Hello(role="client"), _CONNECT_TIMEOUT_S, nursery, config.security)
        sealed = SealedReader(earlier.tiers)
        reach = _reach(config, master)
        workers = Workers(config, master, reach, sealed)
        nursery.start_soon(reach.follow)
        try:
            with trio.move_on_after(_BEGIN_AGAIN_S):
                await workers.begin_again()
        except CachefsError as error:
            logger.warning("no worker yet error=%s", error)
        client = Client(config, earlier.cluster, master, reach, workers, sealed, nursery, earlier.epoch)
        client.metadata.told_by_others = True
        if earlier.names:
            await recall_names(client.metadata, earlier.names)
        nursery.start_soon(client.report_opens)
        if config.with_worker:
            nursery.start_soon(workers.follow)
        nursery.start_soon(client.watch)
        yield client


def _reach(config: ClientConfig, master: Pool) -> MasterReach:
    return MasterReach(lambda: master.call(GetCluster()), config.patience_s)


def _ignore_names(view: View, names: list[ChangedName]) -> None:
    pass


def _ignore() -> None:
    pass
