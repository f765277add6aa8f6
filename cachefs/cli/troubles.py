"""What does not work in a cluster, as its master and workers say: for `cachefs report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cachefs.model import format_duration
from cachefs.wire.messages import MasterStatus, WorkerInfo, WorkerStatus


@dataclass(frozen=True)
class Trouble:
    of: str
    """master, worker, tier or under-store."""
    name: str
    state: str
    for_s: float = 0.0
    """Seconds since it began; 0: not known."""
    error: str = ""

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        since = f" for {format_duration(max(1, round(self.for_s)))}" if self.for_s > 0 else ""
        return f"{self.of}{name}: {self.state}{since}{f': {self.error}' if self.error else ''}"


def troubles_of(status: MasterStatus, workers: Sequence[tuple[WorkerInfo, WorkerStatus | None]]) -> list[Trouble]:
    """`workers`: with what each said when it was asked, None if it did not answer."""
    found = [
        Trouble("under-store", mount.path, "fails", mount.failing_s, mount.last_error)
        for mount in status.mounts
        if mount.failing_s
    ]
    for info, details in workers:
        heard_s = max(0.0, info.heard_s)
        if info.silent:
            found.append(Trouble("worker", info.name, "connected, and silent", heard_s))
        elif not info.connected:
            found.append(Trouble("worker", info.name, "away", heard_s))
        else:
            if info.state != "active":
                found.append(Trouble("worker", info.name, info.state))
            found += worker_troubles(info.name, details)
    return found


def worker_troubles(name: str, details: WorkerStatus | None) -> list[Trouble]:
    """As the worker itself sees it; None: it does not answer."""
    if details is None:
        return [Trouble("worker", name, "does not answer")]
    found = []
    if details.master_away_s:
        found.append(Trouble("worker", name, "without a master", details.master_away_s))
    found += [
        Trouble(
            *("under-store", f"{store.origin} (worker {name})", "fails"),
            *(store.failing_s, store.last_error),
        )
        for store in details.stores
        if store.failing_s
    ]
    found += [
        Trouble("tier", f"{tier.kind}:{tier.path} (worker {name})", tier.state)
        for tier in details.tiers
        if tier.state != "healthy"
    ]
    return found
