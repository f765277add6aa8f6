"""cachefs as `cachefs up` starts it, with its defaults."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from bench.harness import running_up
from bench.machine import medium_of
from bench.systems.base import Missing, Mounted, Source, System
from bench.systems.serving import end_of_log
from cachefs import __version__
from cachefs.fuse import probe
from cachefs.model import CachefsError
from cachefs.net import Hello, UnixAddress, open_peer, parse_address
from cachefs.wire.messages import GetWorkerStatus, ListWorkers, WorkerStatus

SETTLE_LIMIT_S = 300.0
SEALED_S = 0.3
QUIET_S = 1.5
"""When nothing has been fetched or sealed for so long, what is not whole stays so: nobody has asked for the rest."""
ASK_LIMIT_S = 20.0


class Cachefs(System):
    name = "cachefs"
    title = "cachefs"
    _flags: Sequence[str] = ()

    def check(self) -> str:
        if (why := probe().why_no_mount) is not None:
            raise Missing(why)
        return __version__

    def flags(self) -> list[str]:
        return list(self._flags)

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        kind = "mem" if medium_of(place) == "tmpfs" else "ssd"
        options = {"endpoint_url": source.endpoint, "key": source.key, "secret": source.secret}
        url = f"s3://{source.bucket}/{source.prefix}"
        tier = f"{kind}:{place / 'tier'}:{cache_bytes}"
        entered = False
        try:
            with running_up(url, place, tier, options, self._flags, place / "log") as up:
                entered = True
                yield Mounted(
                    system=self.name,
                    path=up.mountpoint,
                    source=source,
                    place=place,
                    facts={"master": up.master},
                    pids=up.pids,
                )
        except CachefsError as error:
            if entered:
                raise
            raise RuntimeError(f"{error}\n{end_of_log(place)}".strip()) from error

    def settle(self, mounted: Mounted) -> None:
        deadline = time.monotonic() + SETTLE_LIMIT_S
        before, since = None, time.monotonic()
        while True:
            status = worker_status(mounted)
            now = (status.counters, [(tier.blocks, tier.partials) for tier in status.tiers])
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > (QUIET_S if any(tier.partials for tier in status.tiers) else SEALED_S):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"not everything was sealed after {SETTLE_LIMIT_S:g} s")
            time.sleep(0.1)
        super().settle(mounted)

    def explain(self, mounted: Mounted) -> Iterator[tuple[str, float]]:
        status = worker_status(mounted)
        for each in (status.counters, status.opens):
            for name, value in msgspec.to_builtins(each).items():
                yield name, float(value)


def worker_status(mounted: Mounted) -> WorkerStatus:
    """What the only worker of this `cachefs up` says of itself. Raises RuntimeError."""
    hello = Hello(role="client")

    async def ask() -> WorkerStatus:
        async with open_peer(parse_address(mounted.facts["master"]), hello, timeout_s=ASK_LIMIT_S) as master:
            (worker,) = (await master.call(ListWorkers())).message.workers
        async with open_peer(UnixAddress(worker.socket), hello, timeout_s=ASK_LIMIT_S) as peer:
            return (await peer.call(GetWorkerStatus())).message

    try:
        return trio.run(ask)
    except CachefsError as error:
        raise RuntimeError(f"cachefs does not answer: {error}") from error
    except ExceptionGroup as group:
        raise RuntimeError(f"cachefs does not answer: {group.exceptions}") from group
