"""The workers the master knows: those connected now, and the names of those that were."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from cachefs.model import AuthenticationError
from cachefs.net import Session
from cachefs.wire.messages import RegisterWorker, WorkerInfo

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


@dataclass
class _Worker:
    registration: RegisterWorker
    session: Session
    pins_serial: int = 0
    """Of the pins that are in force there."""

    @property
    def connected(self) -> bool:
        return not self.session.closed.is_set()


class Workers:
    def __init__(self) -> None:
        self._by_name: dict[str, _Worker] = {}
        self._names: dict[int, str] = {}
        self._heard = trio.Event()

    def register(self, request: RegisterWorker, session: Session) -> None:
        """The newest registration of a name counts: a worker that was restarted is faster than its old connection."""
        self._by_name[request.name] = _Worker(request, session)
        self._names[session.id] = request.name
        logger.info("worker registered name=%s address=%s", request.name, request.address)

    def name_of(self, session: Session) -> str:
        """Raises AuthenticationError for a connection that has not registered, or whose name another one took."""
        name = self._names.get(session.id)
        if name is None or self._by_name[name].session is not session:
            raise AuthenticationError("only a registered worker may report")
        return name

    @property
    def connected(self) -> int:
        return sum(each.connected for each in self._by_name.values())

    def capacity_bytes(self) -> int:
        """Of all tiers of the workers that are connected."""
        return sum(each.registration.capacity_bytes for each in self._by_name.values() if each.connected)

    def pins_applied(self, name: str, serial: int) -> None:
        self._by_name[name].pins_serial = serial
        self._heard.set()
        self._heard = trio.Event()

    def without_pins(self, serial: int) -> list[str]:
        """Names of connected workers on which the pins of that serial are not in force yet."""
        return [name for name, each in self._by_name.items() if each.connected and each.pins_serial < serial]

    async def wait_for_pins(self, serial: int) -> None:
        """Returns when they are in force on every worker that is connected."""
        while self.without_pins(serial):
            # One that went away says nothing.
            with trio.move_on_after(_LOOK_EVERY_S):
                await self._heard.wait()

    def infos(self, totals: dict[str, tuple[int, int]]) -> list[WorkerInfo]:
        """`totals`: per worker, (blocks, bytes)."""
        return [
            WorkerInfo(
                name=name,
                address=worker.registration.address,
                socket=worker.registration.socket,
                host_boot_id=worker.registration.host_boot_id,
                connected=worker.connected,
                blocks=totals.get(name, (0, 0))[0],
                block_bytes=totals.get(name, (0, 0))[1],
            )
            for name, worker in sorted(self._by_name.items())
        ]
