"""One namespace as a client knows it: everything that inode numbers are good for.

A master whose database was lost and made anew has another namespace, in which the same numbers mean other things. The
client makes another `View` then. What belongs to the earlier one keeps asking in its name, by connections that said so
in their hello, and is refused wherever its numbers mean nothing any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import trio

from cachefs.client.files import ContentReader
from cachefs.client.metadata import Metadata
from cachefs.client.passed import PassedFiles
from cachefs.client.patience import patiently
from cachefs.client.workers import ChosenWorker, Workers
from cachefs.model import Attr, BlockId, DeadlineError, Ino, NamespaceChangedError, TransportError, UnavailableError
from cachefs.net import Address, Answer, Pool
from cachefs.store import SealedReader
from cachefs.wire import Request
from cachefs.wire.messages import (
    BlockStatus,
    ClusterInfo,
    Fetch,
    FetchReply,
    GetBlockStatus,
    Promote,
    PromoteMode,
    PromoteReply,
)

R = TypeVar("R")

_PAUSE_S = 0.1
_CUTS = 2
"""Connections lost one after the other while the same bytes were waited for."""


class _CutOffError(TransportError):
    """The connection was lost while the answer was waited for."""


class View:
    """Made by `Client`; called from one trio thread."""

    def __init__(
        self,
        epoch: int,
        cluster: ClusterInfo,
        metadata: Metadata,
        workers: Workers,
        connect: Callable[[Address], Pool],
        sealed: SealedReader,
        passed: PassedFiles,
        *,
        promote: PromoteMode | None,
        patience_s: float,
        is_current: Callable[[View], Awaitable[bool]],
        on_promoted: Callable[[], None],
    ) -> None:
        self.epoch = epoch
        """How many namespaces this client has seen before."""
        self.cluster = cluster
        self.metadata = metadata
        self._workers = workers
        self._connect = connect
        self._pools: dict[Address, Pool] = {}
        self._sealed = sealed
        self._passed = passed
        self._block_size = cluster.geometry.block_size
        self._promote = promote
        self._patience_s = patience_s
        self._is_current = is_current
        self._on_promoted = on_promoted

    @property
    def worker(self) -> Pool:
        """The one that is read through now. Raises UnavailableError when there is none."""
        if self._workers.chosen is None:
            raise UnavailableError("no worker on this node: start one, or name its socket")
        return self._pool(self._workers.chosen)

    def _pool(self, chosen: ChosenWorker) -> Pool:
        address = chosen.candidate.address
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = self._connect(address)
        return pool

    def open_sealed(self, attr: Attr) -> int | None:
        """A read-only descriptor of the sealed file of this content, holding its shared lock; None if there is none.

        The caller closes it. A few system calls: called inline.
        """
        key, size = attr.key, attr.size_bytes
        if not key or not 0 < size <= self._block_size:
            return None
        return self._sealed.open(BlockId(key, 0), size)

    async def promote(self, ino: Ino, *, background: bool = False, reader: int = 0) -> bool:
        """Have the worker make a content local; False if it has no room for it, or is that of another host: it makes it
        local there. `background`: nobody waits to read it; True then, once it is local to the worker. `reader`: a
        number for whoever wants it, of whom the worker looks in which order he opens files.

        Raises StaleError, UnderStoreError and its kinds, TransportError.
        """
        return (await self.ask_to_promote(ino, background=background, reader=reader)).sealed

    async def ask_to_promote(self, ino: Ino, *, background: bool = False, reader: int = 0) -> PromoteReply:
        """As `promote`, with the reason why it was not kept, where there is more to say."""
        self._on_promoted()
        return (await self._ask_worker(Promote(ino, self._promote, background, reader))).message

    async def block_status(self, block: BlockId) -> BlockStatus:
        """What this node's worker has of a block. Raises TransportError."""
        return (await self._ask_worker(GetBlockStatus(block.key, block.block_index))).message

    def open_content(self, attr: Attr) -> ContentReader:
        """For reading through the worker. Close it when it is not used any more."""
        return ContentReader(attr, self.cluster.geometry, self._fetch, self._promote, self._passed)

    async def _fetch(self, request: Fetch) -> Answer[FetchReply]:
        cuts = 0

        async def fetch() -> Answer[FetchReply]:
            nonlocal cuts
            # Whose disk fails while it sends can do no more than end the connection.
            is_doubted = cuts >= _CUTS
            asked = msgspec.structs.replace(request, unreadable=True) if is_doubted else request
            try:
                return await self._call_worker(asked)
            except _CutOffError:
                cuts += 1
                raise

        return await self._with_patience(fetch)

    async def _ask_worker(self, request: Request[R]) -> Answer[R]:
        return await self._with_patience(lambda: self._call_worker(request))

    async def _call_worker(self, request: Request[R]) -> Answer[R]:
        """By the worker that is chosen, or those that are chosen in its place. Raises TransportError when there is none
        left, _CutOffError of the kind.
        """
        while True:
            chosen = await self._workers.get()
            pool, peer = self._pool(chosen), None
            try:
                with chosen.calling(pool, self._patience_s):
                    peer = await pool.peer()
                    return await peer.call(request)
            except TransportError as error:
                if peer is not None and not peer.closed.is_set() and self._workers.chosen is chosen:
                    # It answered; what it lacks, others may lack as well.
                    raise
                if not await self._workers.lost(chosen, error):
                    if peer is None:
                        raise
                    raise _CutOffError(str(error)) from error

    async def _with_patience(self, call: Callable[[], Awaitable[Answer[R]]]) -> Answer[R]:
        give_up = trio.current_time() + self._patience_s
        while True:
            try:
                return await patiently(call, self._patience_s)
            except NamespaceChangedError:
                # The worker may be the one that has not heard of the new namespace yet.
                if not await self._is_current(self) or trio.current_time() >= give_up:
                    raise
            except DeadlineError:
                # The worker is there, and waits for the master as we would.
                if trio.current_time() >= give_up:
                    raise
            await trio.sleep(_PAUSE_S)
