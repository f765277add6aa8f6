"""Everything a front end needs, in one place: names and attributes, sealed files, and reading what is not sealed."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from cachefs.client.config import ClientConfig
from cachefs.client.files import ContentReader, Data
from cachefs.client.metadata import Metadata
from cachefs.client.patience import patiently
from cachefs.model import Attr, BlockId, Ino, IsADirectory, TransportError, UnavailableError
from cachefs.net import Answer, Hello, Pool, UnixAddress, open_background, open_pool
from cachefs.store import SealedReader, running_boot_id
from cachefs.wire.messages import (
    ClusterInfo,
    Fetch,
    FetchReply,
    GetCluster,
    GetMasterStatus,
    GetWorkerStatus,
    Locate,
    MasterStatus,
    OpenCounts,
    Opened,
    Promote,
)

logger = logging.getLogger(__name__)

_OPENED_BATCH = 512
_OPENED_EVERY_S = 1.0


class Client:
    """Made by `open_client`; called from one trio thread."""

    def __init__(
        self,
        cluster: ClusterInfo,
        metadata: Metadata,
        master: Pool,
        worker: Pool | None,
        sealed: SealedReader,
        patience_s: float,
    ) -> None:
        self.cluster = cluster
        self.metadata = metadata
        self._master = master
        self._worker = worker
        self._sealed = sealed
        self._patience_s = patience_s
        self._opened: set[BlockId] = set()
        self._opens = {"passthrough": 0, "cached": 0}

    @property
    def worker(self) -> Pool:
        """Raises UnavailableError when this client was made without one."""
        if self._worker is None:
            raise UnavailableError("no worker on this node: start one, or name its socket")
        return self._worker

    def open_sealed(self, attr: Attr) -> int | None:
        """A read-only descriptor of the sealed file of this content, holding its shared lock; None if there is none.

        The caller closes it. A few system calls: called inline.
        """
        size = attr.size_bytes
        if not attr.key or size == 0 or self.cluster.geometry.block_count(size) > 1:
            return None
        block = BlockId(attr.key, 0)
        return self._sealed.open(block, size)

    def count_open(self, attr: Attr, *, passthrough: bool) -> None:
        """A file was opened: the worker is told soon, so that it evicts others, and counts."""
        self._opens["passthrough" if passthrough else "cached"] += 1
        if passthrough:
            self._opened.add(BlockId(attr.key, 0))

    async def promote(self, ino: Ino) -> bool:
        """Have the worker make a content local; False if it has no room for it.

        Raises StaleError, UnderStoreError and its kinds, TransportError.
        """
        return (await patiently(lambda: self.worker.call(Promote(ino)), self._patience_s)).message.sealed

    def open_content(self, attr: Attr) -> ContentReader:
        """For reading through the worker. Close it when it is not used any more."""
        return ContentReader(attr, self.cluster.geometry, self._fetch)

    async def _fetch(self, request: Fetch) -> Answer[FetchReply]:
        return await patiently(lambda: self.worker.call(request), self._patience_s)

    async def read_file(self, path: str, chunk_bytes: int) -> AsyncGenerator[Data, None]:
        """The whole content at a path of the namespace, in chunks. For tools; training jobs read a mount.

        Raises as `Metadata.lookup` and `ContentReader.read`.
        """
        attr = await self.metadata.resolve(path)
        if attr.is_dir:
            raise IsADirectory(f"{path} is a directory")
        reader = self.open_content(attr)
        try:
            for offset in range(0, attr.size_bytes, chunk_bytes):
                yield await reader.read(offset, chunk_bytes)
        finally:
            reader.close()

    async def holders(self, attr: Attr, block_index: int) -> list[str]:
        """Names of the workers that said they hold a block of this content. Raises TransportError."""
        request = Locate(attr.key, block_index)
        return (await patiently(lambda: self._master.call(request), self._patience_s)).message.workers

    async def master_status(self) -> MasterStatus:
        """Raises TransportError."""
        return (await patiently(lambda: self._master.call(GetMasterStatus()), self._patience_s)).message

    async def report_opens(self) -> None:
        """Tell the worker now and then what was opened. Runs until cancelled."""
        while True:
            await trio.sleep(_OPENED_EVERY_S)
            while self._worker is not None and (self._opened or any(self._opens.values())):
                batch = [self._opened.pop() for _ in range(min(_OPENED_BATCH, len(self._opened)))]
                counts, self._opens = OpenCounts(**self._opens), dict.fromkeys(self._opens, 0)
                try:
                    await self._worker.call(Opened([(block.key, block.block_index) for block in batch], counts))
                except TransportError:
                    # Hints, not worth keeping for a worker that is away.
                    self._opened.clear()


@asynccontextmanager
async def open_client(config: ClientConfig) -> AsyncGenerator[Client, None]:
    """Connect to the master, and to the worker if there is one.

    Raises TransportError when the master, or a worker that was named, cannot be reached.
    """
    hello = Hello(role="client")
    async with open_background() as nursery, open_pool(config.master, hello) as master:
        cluster = (await patiently(lambda: master.call(GetCluster()), config.first_contact_s)).message
        socket = None
        if config.with_worker:
            socket = config.worker_socket or await _socket_of_this_node(master)
        metadata = Metadata(
            master,
            sync_interval_s=cluster.sync_interval_s,
            max_names=config.max_names,
            patience_s=config.patience_s,
            nursery=nursery,
        )
        if socket is None:
            yield Client(cluster, metadata, master, None, SealedReader([]), config.patience_s)
        else:
            async with open_pool(UnixAddress(socket), hello) as worker:
                status = (await patiently(lambda: worker.call(GetWorkerStatus()), config.first_contact_s)).message
                sealed = SealedReader([tier.path for tier in status.tiers])
                client = Client(cluster, metadata, master, worker, sealed, config.patience_s)
                nursery.start_soon(client.report_opens)
                yield client


async def _socket_of_this_node(master: Pool) -> str | None:
    boot_id = running_boot_id()
    status = (await master.call(GetMasterStatus())).message
    for worker in status.workers:
        if worker.connected and worker.host_boot_id == boot_id:
            return worker.socket
    return None
