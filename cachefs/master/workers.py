"""The workers the master knows: those connected now, and the names of those that were."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cachefs.model import AuthenticationError
from cachefs.net import Session
from cachefs.wire.messages import RegisterWorker, WorkerInfo

logger = logging.getLogger(__name__)


@dataclass
class _Worker:
    registration: RegisterWorker
    session: Session


class Workers:
    def __init__(self) -> None:
        self._by_name: dict[str, _Worker] = {}
        self._names: dict[int, str] = {}

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

    def infos(self, totals: dict[str, tuple[int, int]]) -> list[WorkerInfo]:
        """`totals`: per worker, (blocks, bytes)."""
        return [
            WorkerInfo(
                name=name,
                address=worker.registration.address,
                socket=worker.registration.socket,
                host_boot_id=worker.registration.host_boot_id,
                connected=not worker.session.closed.is_set(),
                blocks=totals.get(name, (0, 0))[0],
                block_bytes=totals.get(name, (0, 0))[1],
            )
            for name, worker in sorted(self._by_name.items())
        ]
