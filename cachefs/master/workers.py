"""The workers the master knows: which are alive, where they are, and what each has yet to be told."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field

import trio

from cachefs.meta import KnownWorker, Standing
from cachefs.model import AuthenticationError, BlockId, ConfigError, NotFoundError, StaleError
from cachefs.net import Session
from cachefs.wire.cluster import Member, Members, RegisterWorker, Unsettled, WorkerState
from cachefs.wire.messages import WorkerInfo

logger = logging.getLogger(__name__)

DEAD_AFTER_S = 10.0
"""Without a report; they come every second."""
_LOOK_EVERY_S = 0.5
_ROOM_TOLD_EVERY_S = 1.0


@dataclass
class _Worker:
    known: KnownWorker
    registration: RegisterWorker | None = None
    """None: not since this master started."""
    session: Session | None = None
    heard_s: float = 0.0
    counts: bool = False
    """It is alive and has said all that it holds: it counts as a holder of that."""
    room_bytes: int = 0
    capacity_bytes: int = 0
    pins_serial: int = 0
    """Of the pins that are in force there."""
    quotas_serial: int = 0
    """The same, of quotas."""
    unsettled: Unsettled | None = None
    """As it reported last, and all that it sealed before is written."""
    standings: dict[BlockId, bool] = field(default_factory=dict)
    """Which of its blocks are shared with others, or no longer are, and it was not told yet."""

    @property
    def left(self) -> bool:
        """Its connection ended."""
        return self.session is None or self.session.closed.is_set()

    @property
    def alive(self) -> bool:
        """The connection of one that died with its node may look open for long."""
        return not self.left and trio.current_time() - self.heard_s <= DEAD_AFTER_S


class Workers:
    """`on_dead` is called with each worker that was alive and is not any more. `run` notices that."""

    def __init__(self, known: Iterable[KnownWorker] = (), on_dead: Callable[[str], None] = lambda name: None) -> None:
        self._by_name = {each.name: _Worker(each) for each in known}
        self._names: dict[int, str] = {}
        self._heard = trio.Event()
        self._changed = trio.Event()
        self._told_alive: set[str] = set()
        self._on_dead = on_dead

    # ---- joining and leaving ---------------------------------------------------------------------------------------

    def check_free(self, request: RegisterWorker) -> None:
        """Raises ConfigError when another worker of that name is alive; the one that comes back is not another."""
        other = self._by_name.get(request.name)
        if (
            other is not None
            and other.alive
            and other.registration is not None
            and other.registration.instance != request.instance
        ):
            address = other.registration.address
            raise ConfigError("--name", request.name, f"a name that no other worker has; the one at {address} is alive")

    def register(self, request: RegisterWorker, known: KnownWorker, session: Session) -> None:
        """The newest registration of a name counts: a worker that was restarted is faster than its old connection."""
        self._by_name[request.name] = _Worker(
            known, request, session, trio.current_time(), capacity_bytes=request.capacity_bytes
        )
        self._names = {number: name for number, name in self._names.items() if name != request.name}
        self._names[session.id] = request.name
        self._told_alive.add(request.name)
        self._tell_members()
        logger.info("worker registered name=%s address=%s epoch=%d", request.name, request.address, known.epoch)

    def name_of(self, session: Session) -> str:
        """Raises AuthenticationError for a connection that has not registered, or whose name another one took."""
        name = self._names.get(session.id, "")
        worker = self._by_name.get(name)
        if worker is None or worker.session is not session:
            raise AuthenticationError("only a registered worker may report")
        return name

    def heard(self, name: str, epoch: int, room_bytes: int, capacity_bytes: int) -> None:
        """A report came. Raises StaleError for an epoch that is over."""
        worker = self._by_name[name]
        if epoch != worker.known.epoch:
            raise StaleError(f"worker {name} is in epoch {worker.known.epoch}, this report is of {epoch}")
        worker.heard_s = trio.current_time()
        worker.room_bytes, worker.capacity_bytes = room_bytes, capacity_bytes
        if name not in self._told_alive:
            # It was only slow: stopped, or cut off for a while.
            logger.info("worker is back name=%s", name)
            self._told_alive.add(name)
            self._tell_members()

    def count(self, name: str, epoch: int) -> None:
        """It has said all that it holds, if that is its registration still."""
        worker = self._by_name.get(name)
        if worker is not None and worker.known.epoch == epoch:
            worker.counts = worker.alive

    def settles(self, name: str, unsettled: Unsettled | None) -> None:
        """It reported that, and the rest of its report is written."""
        self._by_name[name].unsettled = unsettled

    def unsettled(self, name: str) -> Unsettled | None:
        """What a worker that takes no new blocks may seal yet, as it said last; None: not known, in this epoch."""
        worker = self._by_name.get(name)
        return worker.unsettled if worker is not None and not worker.left else None

    def has_left(self, name: str) -> bool:
        """It has no connection; one that is only silent has."""
        worker = self._by_name.get(name)
        return worker is None or worker.left

    async def run(self) -> None:
        """Notice who died. Runs until cancelled."""
        before = trio.current_time()
        while True:
            await trio.sleep(_LOOK_EVERY_S)
            now = trio.current_time()
            late_s = now - before - _LOOK_EVERY_S
            if late_s > 1.0:
                # We were stopped ourselves: what they sent meanwhile is still to be read.
                for worker in self._by_name.values():
                    worker.heard_s += late_s
            before = now
            for name in [name for name in self._told_alive if not self.is_alive(name)]:
                self._told_alive.discard(name)
                self._by_name[name].counts = False
                silent = not self._by_name[name].left
                logger.log(
                    logging.WARNING if silent else logging.INFO, "worker is away name=%s silent=%s", name, silent
                )
                self._tell_members()
                self._on_dead(name)

    def set_state(self, name: str, state: WorkerState) -> None:
        worker = self._by_name.get(name)
        if worker is None:
            # Forgotten while it was written.
            return
        worker.known = worker.known._replace(state=state)
        self._tell_members()

    def forget(self, name: str) -> None:
        """Raises NotFoundError; ConfigError for one that is alive."""
        if name not in self._by_name:
            raise NotFoundError(f"no worker {name}")
        if self.is_alive(name):
            raise ConfigError("NAME", name, "a worker that is away: stop it first")
        self._told_alive.discard(name)
        del self._by_name[name]
        self._tell_members()
        self._on_dead(name)

    # ---- who is there ----------------------------------------------------------------------------------------------

    def is_alive(self, name: str) -> bool:
        worker = self._by_name.get(name)
        return worker is not None and worker.alive

    def counting(self) -> frozenset[str]:
        """Those that are alive, are to stay, and have said all that they hold."""
        return frozenset(
            name for name, each in self._by_name.items() if each.counts and each.alive and each.known.state == "active"
        )

    def names(self) -> list[str]:
        """All that ever registered."""
        return sorted(self._by_name)

    def state(self, name: str) -> str:
        """Raises NotFoundError."""
        if name not in self._by_name:
            raise NotFoundError(f"no worker {name}; there are {', '.join(sorted(self._by_name)) or 'none'}")
        return self._by_name[name].known.state

    def members(self) -> list[Member]:
        """All that are alive."""
        return [
            Member(
                name,
                each.known.address,
                each.known.labels,
                each.capacity_bytes,
                each.room_bytes,
                each.known.state,  # type: ignore[arg-type]
            )
            for name, each in sorted(self._by_name.items())
            if each.alive
        ]

    def _tell_members(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def watch(self) -> AsyncGenerator[Members, None]:
        """Who is alive: at once, and whenever that or their room changes."""
        told: list[Member] | None = None
        while True:
            members = self.members()
            if members != told:
                told = members
                yield Members(members)
            else:
                with trio.move_on_after(_ROOM_TOLD_EVERY_S):
                    await self._changed.wait()

    @property
    def connected(self) -> int:
        """How many are alive."""
        return sum(each.alive for each in self._by_name.values())

    def capacity_bytes(self) -> int:
        """Of all tiers of the workers that are alive."""
        return sum(each.capacity_bytes for each in self._by_name.values() if each.alive)

    # ---- what they are to be told ----------------------------------------------------------------------------------

    def note(self, standings: Iterable[Standing]) -> None:
        """To be told with the answer to their next report."""
        for worker, block, shared in standings:
            known = self._by_name.get(worker)
            if known is not None:
                known.standings[block] = shared

    def take_standings(self, name: str, most: int) -> tuple[list[BlockId], list[BlockId]]:
        """(shared, sole): what it has not been told yet, at most so many."""
        waiting = self._by_name[name].standings
        shared: list[BlockId] = []
        sole: list[BlockId] = []
        while waiting and len(shared) + len(sole) < most:
            block, is_shared = waiting.popitem()
            (shared if is_shared else sole).append(block)
        return shared, sole

    # ---- pins ------------------------------------------------------------------------------------------------------

    def pins_applied(self, name: str, serial: int) -> None:
        self._by_name[name].pins_serial = serial
        self._heard.set()
        self._heard = trio.Event()

    def without_pins(self, serial: int) -> list[str]:
        """Names of workers that are alive on which the pins of that serial are not in force yet."""
        return [name for name, each in self._by_name.items() if each.alive and each.pins_serial < serial]

    async def wait_for_pins(self, serial: int) -> None:
        """Returns when they are in force on every worker that is alive."""
        while self.without_pins(serial):
            # One that went away says nothing.
            with trio.move_on_after(_LOOK_EVERY_S):
                await self._heard.wait()

    # ---- quotas ----------------------------------------------------------------------------------------------------

    def quotas_applied(self, name: str, serial: int) -> None:
        self._by_name[name].quotas_serial = serial
        self._heard.set()
        self._heard = trio.Event()

    def without_quotas(self, serial: int) -> list[str]:
        """As `without_pins`."""
        return [name for name, each in self._by_name.items() if each.alive and each.quotas_serial < serial]

    async def wait_for_quotas(self, serial: int) -> None:
        """As `wait_for_pins`."""
        while self.without_quotas(serial):
            with trio.move_on_after(_LOOK_EVERY_S):
                await self._heard.wait()

    def by_state(self) -> dict[str, int]:
        """How many are active, draining, drained, silent, away."""
        found = dict.fromkeys(("active", "draining", "drained", "silent", "away"), 0)
        for each in self.infos({}):
            found[each.state if each.connected else "silent" if each.silent else "away"] += 1
        return found

    # ---- telling people --------------------------------------------------------------------------------------------

    def infos(self, totals: dict[str, tuple[int, int]]) -> list[WorkerInfo]:
        """`totals`: per worker, (blocks, bytes)."""
        now = trio.current_time()
        return [
            WorkerInfo(
                name=name,
                address=worker.known.address,
                socket=worker.registration.socket if worker.registration else "",
                host_boot_id=worker.registration.host_boot_id if worker.registration else "",
                connected=worker.alive,
                blocks=totals.get(name, (0, 0))[0],
                block_bytes=totals.get(name, (0, 0))[1],
                state=worker.known.state,
                labels=worker.known.labels,
                capacity_bytes=worker.capacity_bytes or worker.known.capacity_bytes,
                room_bytes=worker.room_bytes,
                epoch=worker.known.epoch,
                silent=worker.session is not None and not worker.alive and not worker.left,
                heard_s=now - worker.heard_s if worker.session is not None else -1.0,
            )
            for name, worker in sorted(self._by_name.items())
        ]
