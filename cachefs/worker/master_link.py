"""The worker's connection to the master: registered whenever it is up, and told what the worker holds."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from cachefs.model import BlockId, HandshakeError, TransportError
from cachefs.net import Address, Answer, Hello, Peer, Security, open_background, open_peer
from cachefs.wire import Request
from cachefs.wire.messages import HeldBlock, Registered, RegisterWorker, ReportBlocks

logger = logging.getLogger(__name__)

R = TypeVar("R")

_LONGEST_PAUSE_S = 2.0
_REPORT_EVERY_S = 1.0
_REPORT_BLOCKS = 10_000
"""Per message: some 300 KB."""


class MasterLink:
    """Keeps a registered connection. `serve` does the work; requests wait for it, up to `patience_s` seconds."""

    def __init__(
        self,
        address: Address,
        registration: RegisterWorker,
        patience_s: float = 30.0,
        security: Security | None = None,
    ) -> None:
        self._address = address
        self._registration = registration
        self._patience_s = patience_s
        self._security = security
        self._peer: Peer | None = None
        self._up = trio.Event()
        self._added: dict[BlockId, int] = {}
        self._removed: set[BlockId] = set()

    async def call(self, request: Request[R]) -> Answer[R]:
        """Raises what the master raises; TransportError when it stays away.

        Asked again when the master was lost before it answered: no request of a worker does harm by coming twice.
        """
        give_up = trio.current_time() + self._patience_s
        while True:
            peer = self._peer
            if peer is None or peer.closed.is_set():
                with trio.move_on_at(give_up):
                    while (peer := self._peer) is None or peer.closed.is_set():
                        await self._up.wait()
                if peer is None:
                    raise TransportError(f"{self._address}: the master does not answer")
            try:
                return await peer.call(request)
            except TransportError:
                if trio.current_time() >= give_up:
                    raise

    def sealed(self, block: BlockId, length: int) -> None:
        """To be reported soon."""
        self._added[block] = length
        self._removed.discard(block)

    def lost(self, block: BlockId) -> None:
        """To be reported soon. Callable from any thread: one dict and one set operation each."""
        self._added.pop(block, None)
        self._removed.add(block)

    async def serve(
        self,
        on_registered: Callable[[Registered], Awaitable[None]],
        held: Callable[[], list[tuple[BlockId, int]]],
        follow: Callable[[Peer], Awaitable[None]],
        task_status: trio.TaskStatus[Registered] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Connect, register, report, and again after every loss, until cancelled.

        Raises HandshakeError when the first connection fails because of tokens; later ones are waited out.

        Reports the first registration. `on_registered` is called with each one before requests go out; `follow` runs
        with each connection, for as long as that lasts.
        """
        hello = Hello(role="worker", name=self._registration.name)
        pause_s = 0.05
        first = True
        while True:
            try:
                async with open_peer(self._address, hello, security=self._security) as peer:
                    registered = (await peer.call(self._registration)).message
                    if first:
                        task_status.started(registered)
                        first = False
                    await on_registered(registered)
                    self._peer = peer
                    self._up.set()
                    logger.info("registered master=%s", self._address)
                    pause_s = 0.05
                    async with open_background() as following:
                        following.start_soon(follow, peer)
                        await self._report(peer, held())
            except TransportError as error:
                if first and isinstance(error, HandshakeError):
                    raise
                logger.log(logging.DEBUG if pause_s > 0.05 else logging.INFO, "master away error=%s", error)
            finally:
                self._peer = None
                self._up = trio.Event()
            await trio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def _report(self, peer: Peer, held: list[tuple[BlockId, int]]) -> None:
        """Everything once, and then what changes, until the connection is lost."""
        self._added.clear()
        self._removed.clear()
        for start in range(0, max(1, len(held)), _REPORT_BLOCKS):
            await self._send(peer, held[start : start + _REPORT_BLOCKS], [], whole=start == 0)
        while not peer.closed.is_set():
            with trio.move_on_after(_REPORT_EVERY_S):
                await peer.closed.wait()
            while self._added or self._removed:
                added = [self._added.popitem() for _ in range(min(_REPORT_BLOCKS, len(self._added)))]
                removed = [self._removed.pop() for _ in range(min(_REPORT_BLOCKS, len(self._removed)))]
                await self._send(peer, added, removed)

    async def _send(
        self, peer: Peer, added: list[tuple[BlockId, int]], removed: list[BlockId], whole: bool = False
    ) -> None:
        await peer.call(
            ReportBlocks(
                [HeldBlock(block.key, block.block_index, length) for block, length in added],
                [(block.key, block.block_index) for block in removed],
                whole,
            )
        )
