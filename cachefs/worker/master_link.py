"""The worker's connection to the master: registered whenever it is up, and told every second what the worker holds."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

import trio

from cachefs.model import BlockId, CachefsError, ConfigError, DeadlineError, HandshakeError, TransportError
from cachefs.net import Address, Answer, Hello, Peer, Security, open_background, open_peer
from cachefs.wire import Request
from cachefs.wire.cluster import (
    REPORTED_AT_ONCE,
    HeldBlock,
    Registered,
    RegisterWorker,
    ReportBlocks,
    ReportReply,
    Unsettled,
)
from cachefs.wire.messages import ClusterInfo, block_ids, block_names

logger = logging.getLogger(__name__)

R = TypeVar("R")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
REPORT_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 10.0
"""Of a report: a master that is stuck is as good as away."""
_FULL_TIMEOUT_S = 60.0
_FULL_BLOCKS = 2_000
"""Of one part of a full report: others want to write too."""
_NAME_TAKEN_S = 15.0
"""How long a worker tries to get a name that another one has: that may be its predecessor, not known to be dead."""


class Reporting(Protocol):
    """What there is to report, and who wants to hear the answers."""

    def held(self) -> list[tuple[BlockId, int]]:
        """All sealed blocks and the bytes they take."""

    def fetching(self) -> list[BlockId]:
        """Origin leases that are needed."""

    def take_released(self) -> list[BlockId]:
        """Origin leases that ended since the last call."""

    def room(self) -> tuple[int, int]:
        """(bytes it would take in, capacity in bytes)."""

    def unsettled(self) -> Unsettled | None:
        """What may be sealed yet; None: it takes new blocks."""

    def answered(self, shared: Iterable[BlockId], sole: Iterable[BlockId], moved: Iterable[BlockId]) -> None:
        """As of `ReportReply`."""

    def began(self) -> None:
        """A full report begins: what was answered before is void."""


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
        self.reporting: Reporting | None = None
        """Set once there is something to report; until then the worker is only known to be alive."""
        self._began = trio.Event()
        self._away_since: float | None = trio.current_time()
        self._pause_s = _FIRST_PAUSE_S

    def begin(self, reporting: Reporting) -> None:
        """From now on report."""
        self.reporting = reporting
        self._began.set()

    async def call_now(self, request: Request[R]) -> Answer[R]:
        """As `call`, without waiting for a master that is away. Raises TransportError at once then."""
        peer = self._peer
        if peer is None:
            raise TransportError(f"{self._address}: the master is away")
        return await peer.call(request)

    @property
    def is_registered(self) -> bool:
        return self._peer is not None and not self._peer.closed.is_set()

    @property
    def away_s(self) -> float:
        """Seconds without a master; 0 with one."""
        return trio.current_time() - self._away_since if self._away_since is not None else 0.0

    async def call(self, request: Request[R], patience_s: float | None = None) -> Answer[R]:
        """Raises what the master raises; TransportError when it stays away; DeadlineError when it has not answered
        within `patience_s`.

        Asked again when the master was lost before it answered: no request of a worker does harm by coming twice.
        """
        if patience_s is not None:
            with trio.move_on_after(patience_s):
                return await self.call(request)
            raise DeadlineError(f"{self._address}: the master has not answered the worker within {patience_s:g} s")
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
        follow: Callable[[Peer], Awaitable[None]],
        task_status: trio.TaskStatus[ClusterInfo] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Connect, register, report, and again after every loss, until cancelled.

        Raises HandshakeError when the first connection fails because of tokens; later ones are waited out.

        Reports the cluster, as of the first registration. `on_registered` is called with each one before requests go
        out; `follow` runs with each connection, for as long as that lasts. Raises ConfigError when another worker has
        this one's name.
        """
        hello = Hello(role="worker", name=self._registration.name)
        first = True
        give_up = trio.current_time() + _NAME_TAKEN_S
        while True:
            try:
                async with open_peer(self._address, hello, security=self._security) as peer:
                    registered = (await peer.call(self._registration)).message
                    if first:
                        task_status.started(registered.cluster)
                        first = False
                    epoch = registered.epoch
                    await on_registered(registered)
                    del registered  # with credentials of stores, which may be removed while this connection lasts
                    self._peer = peer
                    self._up.set()
                    self._away_since = None
                    logger.info("registered master=%s epoch=%d", self._address, epoch)
                    async with open_background() as following:
                        following.start_soon(follow, peer)
                        await self._report(peer, epoch)
            except ConfigError as error:
                if error.key != "--name" or trio.current_time() > give_up:
                    raise
                logger.warning("not registered yet error=%s", error)
                self._pause_s = 1.0
            except TransportError as error:
                if first and isinstance(error, HandshakeError):
                    raise
                level = logging.DEBUG if self._pause_s > _FIRST_PAUSE_S else logging.INFO
                logger.log(level, "master away error=%s", error)
            except CachefsError as error:
                # Of an older epoch, or the master has trouble of its own, such as a full disk.
                if first:
                    raise
                logger.warning("registering again error=%s", error)
            finally:
                self._peer = None
                if self._away_since is None:
                    self._away_since = trio.current_time()
                if self._up.is_set():
                    # Not otherwise: whoever waits has this one.
                    self._up = trio.Event()
            await trio.sleep(self._pause_s)
            self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)

    async def _report(self, peer: Peer, epoch: int) -> None:
        """Everything once, and then what changes, every second, until the connection is lost."""
        while not self._began.is_set() and not peer.closed.is_set():
            await self._send(peer, ReportBlocks(epoch, [], []))
            self._pause_s = _FIRST_PAUSE_S
            with trio.move_on_after(REPORT_EVERY_S):
                await self._began.wait()
        reporting = self.reporting
        if reporting is None:
            return
        self._added.clear()
        self._removed.clear()
        reporting.began()
        held = reporting.held()
        for start in range(0, max(1, len(held)), _FULL_BLOCKS):
            part = held[start : start + _FULL_BLOCKS]
            more = start + _FULL_BLOCKS < len(held)
            await self._tell(peer, epoch, reporting, dict(part), [], full=True, more=more)
        # Not before: one that takes registrations and no reports, with a disk that is full, must not be asked for more
        # and more of them.
        self._pause_s = _FIRST_PAUSE_S
        while not peer.closed.is_set():
            with trio.move_on_after(REPORT_EVERY_S):
                await peer.closed.wait()
                break
            told = False
            while self._added or self._removed or not told:
                added = dict(self._added.popitem() for _ in range(min(REPORTED_AT_ONCE, len(self._added))))
                removed = [self._removed.pop() for _ in range(min(REPORTED_AT_ONCE, len(self._removed)))]
                await self._tell(peer, epoch, reporting, added, removed)
                told = True

    async def _tell(
        self,
        peer: Peer,
        epoch: int,
        reporting: Reporting,
        added: dict[BlockId, int],
        removed: list[BlockId],
        *,
        full: bool = False,
        more: bool = False,
    ) -> None:
        room_bytes, capacity_bytes = reporting.room()
        complete = not more and not self._added
        answer = await self._send(
            peer,
            ReportBlocks(
                epoch,
                [HeldBlock(block.key, block.block_index, length) for block, length in added.items()],
                block_names(removed),
                full,
                more,
                block_names(reporting.fetching()),
                block_names(reporting.take_released()),
                max(0, room_bytes),
                capacity_bytes,
                reporting.unsettled() if complete else None,
            ),
        )
        reporting.answered(block_ids(answer.shared), block_ids(answer.sole), block_ids(answer.moved))

    async def _send(self, peer: Peer, report: ReportBlocks) -> ReportReply:
        # After its restart a master has all of every worker to write.
        timeout_s = _FULL_TIMEOUT_S if report.full else _ANSWER_TIMEOUT_S
        try:
            with trio.fail_after(timeout_s):
                return (await peer.call(report)).message
        except trio.TooSlowError as error:
            raise TransportError(f"{self._address}: no answer within {timeout_s:g} s") from error
