"""What the master has this worker do: make copies of blocks, and give them up."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from cachefs.model import (
    NO_INO,
    Attr,
    BlockId,
    BlockMissingError,
    CachefsError,
    ContentChangedError,
    Geometry,
    Kind,
    NotFoundError,
    ObjectInfo,
    StaleError,
)
from cachefs.net import Peer
from cachefs.policy import Promote
from cachefs.ufs.files import Claim, Data, Keep
from cachefs.wire.control import BlockTask, TaskEnd, TaskOutcome, TasksDone, WatchTasks
from cachefs.worker.blocks import Blocks
from cachefs.worker.peers import Peers
from cachefs.worker.sources import Source, Sources

logger = logging.getLogger(__name__)

_TOLD_AT_ONCE = 1000


class OnlyWorkers:
    """The under-store of a content that is known by its key alone: what no worker has is not to be had."""

    origin = ""
    hidden_keys = 0

    async def stat(self, path: str) -> ObjectInfo:
        raise NotFoundError(path)

    def list_dir(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[list[ObjectInfo]]]:
        raise NotFoundError(path)

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> Data:
        raise BlockMissingError(f"{info.path}: no worker that can be reached has it")

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        return [BlockMissingError(f"{info.path}: no worker that can be reached has it") for info in infos]


class _Parts:
    """What tasks are done with."""

    def __init__(self, geometry: Geometry, sources: Sources, blocks: Blocks, peers: Peers) -> None:
        self.geometry = geometry
        self.sources = sources
        self.blocks = blocks
        self.peers = peers


class Tasks:
    """Of each connection to the master: what it gives is done within it, and given again by the next one else."""

    def __init__(self) -> None:
        self._parts: _Parts | None = None
        self._ready = trio.Event()
        self._only_workers = OnlyWorkers()
        self._ended: list[TaskOutcome] = []
        self._news = trio.Event()
        self._following: trio.Nursery | None = None
        self._idle = trio.Event()
        """Nothing is under way."""
        self._idle.set()

    def begin(self, geometry: Geometry, sources: Sources, blocks: Blocks, peers: Peers) -> None:
        """From now on there is something to do them with."""
        self._parts = _Parts(geometry, sources, blocks, peers)
        self._ready.set()

    async def end(self) -> None:
        """Nothing is under way any more when it returns, nor begun afterwards: what does it may be closed then."""
        self._ready = trio.Event()
        if self._following is not None:
            self._following.cancel_scope.cancel()
        with trio.CancelScope(shield=True):  # as long as a disk takes for what it is at
            await self._idle.wait()

    async def follow(self, peer: Peer) -> None:
        """Do what comes until the connection is lost, or cancelled."""
        await self._ready.wait()
        self._ended.clear()
        self._idle = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                self._following = nursery
                nursery.start_soon(self._tell, peer)
                async with peer.stream(WatchTasks()) as batches:
                    async for batch in batches:
                        for task in batch.tasks:
                            nursery.start_soon(self._do, task)
                nursery.cancel_scope.cancel()
        except* CachefsError as group:
            logger.debug("tasks not heard of error=%r", group.exceptions)
        finally:
            self._following = None
            self._idle.set()

    async def _tell(self, peer: Peer) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._ended:
                part, self._ended = self._ended[:_TOLD_AT_ONCE], self._ended[_TOLD_AT_ONCE:]
                await peer.call(TasksDone(part))

    async def _do(self, task: BlockTask) -> None:
        end: TaskEnd
        size_bytes, reason = 0, ""
        try:
            end, size_bytes, reason = await self._done(task)
        except (NotFoundError, StaleError) as error:
            end, reason = "changed", str(error)
        except CachefsError as error:
            end, reason = "failed", str(error)
        except Exception as error:
            logger.exception("task failed kind=%s block=%s", task.kind, BlockId(task.key, task.block_index).filename)
            end, reason = "failed", repr(error)
        self._ended.append(TaskOutcome(task.task_id, end, size_bytes, reason))
        self._news.set()

    async def _done(self, task: BlockTask) -> tuple[TaskEnd, int, str]:
        """How it ended, the bytes made or dropped, and why it was not done, where there is more to say."""
        assert self._parts is not None
        block = BlockId(task.key, task.block_index)
        blocks = self._parts.blocks
        if task.kind == "drop":
            freed = await blocks.free([block])
            if freed.freed_blocks:
                return "done", freed.freed_bytes, ""
            return "in-use" if freed.in_use else "pinned" if freed.pinned else "absent", 0, ""
        if await blocks.is_sealed(block):
            return "held", 0, ""
        if not blocks.keeps:
            return "full", 0, ""
        source = await self._source(task, block)
        if not await blocks.keep(block, source, Promote(task.promote), background=True, patient=True):
            return "full", 0, blocks.why_not(block)
        return "done", self._parts.geometry.block_length(source.attr.size_bytes, block.block_index), ""

    async def _source(self, task: BlockTask, block: BlockId) -> Source:
        assert self._parts is not None
        if task.kind == "load":
            source = await self._parts.sources.resolve(task.ino)
            if source.attr.key != block.key:
                raise ContentChangedError(f"inode {task.ino} is another content")
            return source
        length = await self._parts.peers.length(task.holders, block)
        # Of a content that ends with this block: of others nothing is asked.
        size = block.block_index * self._parts.geometry.block_size + length
        attr = Attr(NO_INO, Kind.FILE, size, 0, 0, 0, 0, block.key)
        return Source(attr, ObjectInfo(block.filename, Kind.FILE, size, 0, ""), self._only_workers)
