"""Which worker a client reads through: that of its own host, or else the nearest that is alive.

The worker of the host is reached by its unix socket, and passes descriptors; its tiers are at hand. Any other one sends
bytes, over TCP. Who is alive and where is asked of the master: at the start, when the worker in use is lost, and now
and then while it is not the one that comes first.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import trio

from cachefs.client.config import ClientConfig
from cachefs.client.patience import patiently
from cachefs.client.reach import MasterReach
from cachefs.model import CachefsError, ConfigError, TransportError, UnavailableError
from cachefs.net import Address, Hello, Pool, TcpAddress, UnixAddress, is_silent, open_peer, parse_address
from cachefs.policy import FARTHEST, LEVELS, Place, distance, nearest
from cachefs.store import SealedReader, running_boot_id
from cachefs.wire.messages import GetWorkerStatus, ListWorkers, WorkerInfo

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0
"""Of a worker that is asked whether it is there."""
_AVOIDED_S = 10.0
"""How long a worker that was lost is not chosen again."""
_RESTART_S = 10.0
"""How long the worker of the own host may be away before another one is read through: it is worth waiting for."""
_SLOW_S = 1.0
"""A request that takes longer makes us ask the worker for a sign of life: it may only be busy, or its store slow."""
_SILENT_S = 3.0
"""One that gives none for so long hangs. A process that has to share two cores with eight others is not as slow."""
_STUCK_S = 5.0
"""A request that takes longer makes us ask the master as well: a worker that it misses waits for it, as we would."""
_LONGEST_PAUSE_S = 1.0
_LEAST_PAUSE_S = 0.5
"""Between two looks for a worker where there is none, however many wait for one."""


class Candidate(NamedTuple):
    """A worker that could be read through."""

    name: str
    """Empty: not known yet."""
    address: Address
    distance: int
    """As of `policy.distance`."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.address, UnixAddress)

    def __str__(self) -> str:
        if self.is_local:
            return f"worker {self.name} of this host"
        where = f"in the same {LEVELS[self.distance]}" if 0 < self.distance < FARTHEST else "of another host"
        return f"worker {self.name} at {self.address}, {'of this host' if self.distance == 0 else where}"


class ChosenWorker:
    """The worker in use."""

    def __init__(self, candidate: Candidate, tiers: tuple[str, ...]) -> None:
        self.candidate = candidate
        self.tiers = tiers
        """Paths on this host; none of a worker reached by TCP."""
        self.failing_since: float | None = None
        self.is_silent = False
        """It fails since it was asked for a sign of life and gave none."""
        self.is_told = False
        """The log has it that there is no other."""
        self._calls: dict[trio.CancelScope, _Waiting] = {}

    @property
    def is_local(self) -> bool:
        return self.candidate.is_local

    @contextmanager
    def calling(self, pool: Pool, limit_s: float = math.inf) -> Iterator[None]:
        """A request to it, by `pool`. TransportError when it is found to be away and another worker is there; when
        there is none, once it has lasted for `limit_s`, or without a limit at once.
        """
        now = trio.current_time()
        with trio.CancelScope() as scope:
            if self.failing_since is not None:
                scope.deadline = now + limit_s
            self._calls[scope] = _Waiting(now, limit_s, pool)
            try:
                yield
                self.answered()
            finally:
                del self._calls[scope]
        if scope.cancelled_caught:
            raise TransportError(f"{self.candidate} does not answer")

    def answered(self) -> None:
        """It is there."""
        if self.failing_since is not None:
            self.failing_since, self.is_silent, self.is_told = None, False, False
            for scope in self._calls:
                scope.deadline = math.inf

    def asked_for(self, seconds: float) -> list[Pool]:
        """By which its answers are waited for as long as that, or longer."""
        until = trio.current_time() - seconds
        return list(dict.fromkeys(each.pool for each in self._calls.values() if each.began <= until))

    def limit_waiting(self) -> None:
        """It is away, and there is no other: nobody waits for longer than he wanted to."""
        now = trio.current_time()
        for scope, waiting in self._calls.items():
            scope.deadline = now if waiting.limit_s == math.inf else max(now, waiting.began + waiting.limit_s)

    def give_up(self) -> None:
        """End its requests: whoever made them asks another."""
        for scope in self._calls:
            scope.cancel()


class _Waiting(NamedTuple):
    """A request under way."""

    began: float
    limit_s: float
    pool: Pool


def ranked(
    workers: Iterable[WorkerInfo], labels: Mapping[str, str], boot_id: str, *, anywhere: bool
) -> list[Candidate]:
    """Those that are alive, the best first: of this host, by their sockets; then (`anywhere`) by their labels, over
    TCP. One that is being drained comes last, as it keeps nothing new.
    """
    alive = [each for each in workers if each.connected]
    found = [Candidate(each.name, UnixAddress(each.socket), 0) for each in alive if each.host_boot_id == boot_id]
    if not anywhere:
        return found
    reachable: dict[str, tuple[TcpAddress, WorkerInfo]] = {}
    for each in alive:
        try:
            address = parse_address(each.address)
        except ConfigError:
            continue
        if isinstance(address, TcpAddress) and address.port:
            reachable[each.name] = address, each
    asker = Place(labels.get("host") or platform.node(), labels)
    places = nearest(asker, [Place(name, info.labels) for name, (_, info) in reachable.items()])
    places.sort(key=lambda place: reachable[place.name][1].state != "active")
    return found + [Candidate(each.name, reachable[each.name][0], distance(labels, each.labels)) for each in places]


class Workers:
    """Called from one trio thread."""

    def __init__(self, config: ClientConfig, master: Pool, reach: MasterReach, sealed: SealedReader) -> None:
        self.chosen: ChosenWorker | None = None
        self.on_chosen: Callable[[], None] = lambda: None
        """Called when another one was chosen than before."""
        self._config = config
        self._master = master
        self._reach = reach
        self._sealed = sealed
        self._boot_id = running_boot_id()
        self._choosing = trio.Lock()
        self._avoided_until: dict[Address, float] = {}
        self._look_again_at = 0.0
        self._none_since: float | None = None
        self.outages = 0
        """How often the worker in use was found to be away."""

    @property
    def away_s(self) -> float:
        """For how many seconds nobody has answered who could be read through; 0: somebody does, or nobody asked."""
        since = self.chosen.failing_since if self.chosen is not None else self._none_since
        return trio.current_time() - since if since is not None else 0.0

    @property
    def place(self) -> str:
        """Where the worker in use is: on the "own" host, on an "other" one; "none"."""
        if self.chosen is None:
            return "none"
        return "own" if self.chosen.candidate.distance == 0 else "other"

    def why_no_tiers(self) -> str:
        """Why no file can be opened here."""
        if self.chosen is None:
            return "there is no worker on this node"
        return "the worker is on another host" if not self.chosen.is_local else "the worker has no tier"

    async def begin(self) -> None:
        """Choose the first one. Raises TransportError when one that was named, or every one there is, does not answer;
        none at all is no error.
        """
        if not self._config.with_worker:
            return
        named = self._named()

        async def meet() -> ChosenWorker | None:
            return await self._meet(named) if named is not None else await self._best()

        self._avoided_until.clear()
        found = await patiently(meet, self._config.first_contact_s)
        if found is not None:
            self._take(found)

    async def begin_again(self) -> None:
        """As `begin`, but those who are away are not waited for: they are looked for when they are needed."""
        if self._config.with_worker:
            named = self._named()
            found = await self._meet(named) if named is not None else await self._best()
            if found is not None:
                self._take(found)

    def _named(self) -> Candidate | None:
        if self._config.worker_socket is not None:
            return Candidate("", UnixAddress(self._config.worker_socket), 0)
        if self._config.worker_address is not None:
            return Candidate("", self._config.worker_address, FARTHEST)
        return None

    async def get(self) -> ChosenWorker:
        """The one to ask. Raises UnavailableError when this client was made without one, TransportError when none is
        alive.
        """
        if self.chosen is None:
            if not self._config.anywhere:
                raise UnavailableError("no worker on this node: start one, or name its socket")
            await self._look()
            if self.chosen is None:
                if self._none_since is None:
                    self._none_since = trio.current_time()
                raise TransportError("no worker is alive")
        return self.chosen

    async def lost(self, chosen: ChosenWorker, error: TransportError) -> bool:
        """It does not answer. Returns whether there is another one now."""
        if self.chosen is not chosen:
            return True
        now = trio.current_time()
        failing_since = self._note_failure(chosen)
        if not self._config.anywhere:
            return False
        grace_s = min(_RESTART_S, self._config.patience_s / 3) if chosen.is_local else 0.0
        if now < failing_since + grace_s:
            return False
        self._avoid(chosen.candidate.address)
        await self._look(instead_of=chosen)
        if self.chosen is chosen:
            return False
        logger.warning("worker lost, reading through another name=%s error=%s", chosen.candidate.name, error)
        return True

    def _note_failure(self, chosen: ChosenWorker) -> float:
        """Since when it fails."""
        if chosen.failing_since is None:
            chosen.failing_since = trio.current_time()
            self.outages += 1
        return chosen.failing_since

    async def follow(self) -> None:
        """See whether one that says nothing is alive, and look for a better one now and then if it may be anywhere.

        Runs until cancelled.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_silence)
            nursery.start_soon(self._follow_choice)

    async def _follow_silence(self) -> None:
        """Whether the one in use gives signs of life while answers are waited for."""
        while True:
            await trio.sleep(_SLOW_S / 2)
            chosen = self.chosen
            for pool in chosen.asked_for(_SLOW_S) if chosen is not None else ():
                assert chosen is not None
                try:
                    silent = await is_silent(pool, _SILENT_S)
                except TransportError as error:
                    # Whoever waits is told by the connection.
                    logger.debug("%s: no sign of life error=%s", chosen.candidate, error)
                    continue
                if silent and chosen.asked_for(_SILENT_S):
                    chosen.is_silent = True
                    await self._leave(chosen)
                    break
                if not silent and chosen.is_silent:
                    chosen.answered()

    async def _follow_choice(self) -> None:
        asked = trio.current_time()
        again_s = self._config.look_again_s
        while True:
            await trio.sleep(min(_LONGEST_PAUSE_S, again_s))
            chosen, now = self.chosen, trio.current_time()
            may_improve = self._config.anywhere and (chosen is None or not self._is_first(chosen))
            is_due = may_improve and now >= asked + again_s
            is_stuck = chosen is not None and chosen.asked_for(_STUCK_S) and now >= asked + _LONGEST_PAUSE_S
            failing_since = chosen.failing_since if chosen is not None else None
            if chosen is not None and failing_since is not None and failing_since < now - _RESTART_S and not is_stuck:
                # Not before: one that answers this and nothing else is to be left for another.
                await self._see_whether_it_is_back(chosen)
            if not is_due and not is_stuck:
                continue
            asked = now
            try:
                if chosen is not None and is_stuck and not await self._is_alive(chosen):
                    await self._leave(chosen)
                elif is_due:
                    await self._improve(chosen)
            except CachefsError as error:
                logger.debug("no other worker error=%s", error)

    async def _see_whether_it_is_back(self, chosen: ChosenWorker) -> None:
        """Nobody may ask it anything for hours, and those who watch us want to know."""
        try:
            await self._meet(chosen.candidate)
        except TransportError as error:
            logger.debug("%s is still away error=%s", chosen.candidate, error)
        else:
            chosen.answered()

    def _is_first(self, chosen: ChosenWorker) -> bool:
        """Nothing could come before it."""
        named = self._named()
        return chosen.is_local if named is None else chosen.candidate.address == named.address

    async def _is_alive(self, chosen: ChosenWorker) -> bool:
        try:
            workers = await self._list()
        except TransportError:
            # Nobody is left to ask but itself.
            try:
                await self._meet(chosen.candidate)
            except TransportError:
                return False
            return True
        return any(each.connected and each.name == chosen.candidate.name for each in workers)

    async def _leave(self, chosen: ChosenWorker) -> None:
        """It hangs, or the master misses it."""
        if self.chosen is chosen:
            self._note_failure(chosen)
            if self._config.anywhere:
                self._avoid(chosen.candidate.address)
                await self._look(instead_of=chosen)
            if self.chosen is chosen:
                chosen.limit_waiting()
                if not chosen.is_told:
                    chosen.is_told = True
                    logger.info("worker does not answer, and there is no other name=%s", chosen.candidate.name)
                return
            logger.warning("worker does not answer, reading through another name=%s", chosen.candidate.name)
        chosen.give_up()

    async def _improve(self, chosen: ChosenWorker | None) -> None:
        async with self._choosing:
            if self.chosen is chosen:
                found = await self._best(before=chosen)
                if found is not None:
                    self._take(found)

    async def _look(self, instead_of: ChosenWorker | None = None) -> None:
        """Choose anew, unless somebody else did, or has just tried."""
        async with self._choosing:
            if self.chosen is not instead_of or trio.current_time() < self._look_again_at:
                return
            try:
                found = await self._best()
            except CachefsError as error:
                logger.debug("no worker found error=%s", error)
                found = None
            if found is None:
                self._look_again_at = trio.current_time() + _LEAST_PAUSE_S
            else:
                self._take(found)

    async def _best(self, before: ChosenWorker | None = None) -> ChosenWorker | None:
        """The first that answers, of those that come before that one; None when there are none to ask. Raises
        TransportError when none of them answers, or the master does not.
        """
        failed: TransportError | None = None
        for candidate in await self._candidates():
            if before is not None and candidate.address == before.candidate.address:
                return None
            if self._avoided_until.get(candidate.address, 0.0) > trio.current_time():
                continue
            try:
                return await self._meet(candidate)
            except TransportError as error:
                logger.debug("%s does not answer error=%s", candidate, error)
                self._avoid(candidate.address)
                failed = error
        if failed is not None and before is None:
            # Nothing was lost yet: whoever asks may come back for any of them.
            self._avoided_until.clear()
            raise failed
        return None

    async def _list(self) -> list[WorkerInfo]:
        """Raises TransportError, as soon as the master is known to be away."""
        return (await self._reach.ask(lambda: self._master.call(ListWorkers()), 0.0)).message.workers

    async def _candidates(self) -> list[Candidate]:
        workers = await self._list()
        config, named = self._config, self._named()
        found = ranked(workers, config.labels, self._boot_id, anywhere=config.anywhere)
        if named is None:
            return found
        return [named, *(each for each in found if each.address != named.address)]

    async def _meet(self, candidate: Candidate) -> ChosenWorker:
        """Raises TransportError."""
        hello = Hello(role="client")
        timeout_s, security = _ANSWER_TIMEOUT_S, self._config.security
        with trio.move_on_after(timeout_s):
            async with open_peer(candidate.address, hello, timeout_s=timeout_s, security=security) as peer:
                status = (await peer.call(GetWorkerStatus())).message
            tiers = tuple(tier.path for tier in status.tiers) if candidate.is_local else ()
            return ChosenWorker(candidate._replace(name=status.name), tiers)
        who = candidate if candidate.name else candidate.address
        raise TransportError(f"{who}: no answer within {timeout_s:g} s")

    def _avoid(self, address: Address) -> None:
        self._avoided_until[address] = trio.current_time() + _AVOIDED_S

    def _take(self, found: ChosenWorker) -> None:
        self.chosen = found
        self._none_since = None
        if found.is_local:
            # Those of one that was lost stay: what is sealed there can be read without it.
            self._sealed.look_into(found.tiers)
        logger.info("reading through %s", found.candidate)
        self.on_chosen()
