"""Reading from other workers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import trio

from cachefs.model import (
    BlockCorruptError,
    BlockId,
    BlockMissingError,
    CachefsError,
    DeadlineError,
    Ino,
    TransportError,
)
from cachefs.net import Hello, Pool, Security, parse_address
from cachefs.wire.cluster import DoubtBlock, Effort, ReadBlock
from cachefs.wire.control import MeasureBlock
from cachefs.worker.counters import Counters
from cachefs.worker.members import Members

logger = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 5.0
"""Of one request: whoever has nothing yet says so within two seconds, and whoever says nothing is stuck."""
_AVOIDED_S = 10.0
"""How long nobody asks a worker again that did not answer, unless it was away since and is back."""


class PeerBytes(NamedTuple):
    """What another worker sent, not compared yet."""

    data: Data
    checksum: int


class Peers:
    """Connections to other workers, made when they are first needed. They end with `nursery`."""

    def __init__(
        self,
        members: Members,
        hello: Callable[[], Hello],
        counters: Counters,
        nursery: trio.Nursery,
        security: Security | None = None,
    ) -> None:
        self._members = members
        self._hello = hello
        self._counters = counters
        self._nursery = nursery
        self._security = security
        self._pools: dict[str, tuple[str, Hello, Pool]] = {}
        self._silent_s: dict[str, float] = {}
        """When each did not answer last."""

    def is_usable(self, name: str) -> bool:
        """It is alive, as far as is known, and answered when it was last asked."""
        if name not in self._members.others:
            return False
        silent_s = self._silent_s.get(name, -math.inf)
        return silent_s < self._members.joined_s[name] or silent_s + _AVOIDED_S <= trio.current_time()

    async def read(
        self, name: str, block: BlockId, offset: int, length: int, effort: Effort, ino: Ino
    ) -> PeerBytes | None:
        """Bytes of a block, within one page; None when they are being fetched there and take a while.

        Raises TransportError and DeadlineError when there is no answer (it is not asked again for a while), and what
        `ReadBlock` does. Cancelling tells the other side.
        """
        began = perf_counter()
        request = ReadBlock(block.key, block.block_index, offset, length, effort, ino)
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                answer = await self._pool(name).call(request)
        except trio.TooSlowError as error:
            self._avoid(name, "silent")
            raise DeadlineError(f"worker {name}: no answer within {ANSWER_TIMEOUT_S:g} s") from error
        except TransportError as error:
            self._avoid(name, str(error))
            raise
        if answer.message.pending:
            return None
        data = answer.payload
        assert not isinstance(data, tuple)
        if len(data) != length:
            raise BlockCorruptError(f"worker {name}: {len(data)} bytes of {block.filename} instead of {length}")
        self._counters.peer_times.observe(effort, perf_counter() - began)
        self._counters.peer_reads += 1
        self._counters.peer_bytes += length
        return PeerBytes(data, answer.message.checksum)

    async def length(self, names: Sequence[str], block: BlockId) -> int:
        """Of a block that one of these workers holds. Raises BlockMissingError."""
        for name in names:
            try:
                with trio.fail_after(ANSWER_TIMEOUT_S):
                    return (await self._pool(name).call(MeasureBlock(block.key, block.block_index))).message.length
            except (CachefsError, trio.TooSlowError) as error:
                logger.info("not measured name=%s block=%s error=%r", name, block.filename, error)
        raise BlockMissingError(f"{block.filename}: not to be had from {', '.join(names)}")

    async def doubt(self, name: str, block: BlockId) -> None:
        """Tell a worker that what it sent is damaged; not told if it cannot be reached."""
        self._counters.corrupt += 1
        logger.warning("damaged bytes from worker name=%s block=%s", name, block.filename)
        try:
            with trio.move_on_after(ANSWER_TIMEOUT_S):
                await self._pool(name).call(DoubtBlock(block.key, block.block_index))
        except CachefsError as error:
            logger.info("worker not told name=%s error=%s", name, error)

    def _avoid(self, name: str, reason: str) -> None:
        if self.is_usable(name):
            logger.warning("worker does not answer name=%s avoided_s=%g reason=%s", name, _AVOIDED_S, reason)
        self._counters.peer_failures += 1
        self._silent_s[name] = trio.current_time()

    def _pool(self, name: str) -> Pool:
        member = self._members.others.get(name)
        if member is None:
            raise TransportError(f"worker {name}: not alive")
        hello = self._hello()
        known = self._pools.get(name)
        if known is not None and known[0] == member.address and known[1] == hello:
            return known[2]
        if known is not None:
            known[2].retire()
        self._forget_who_left()
        pool = Pool(parse_address(member.address), hello, CONNECT_TIMEOUT_S, self._nursery, security=self._security)
        self._pools[name] = member.address, hello, pool
        return pool

    def _forget_who_left(self) -> None:
        for name in [name for name in self._pools if name not in self._members.others]:
            self._pools.pop(name)[2].retire()
