"""cachefs as `cachefs up` starts it, with its defaults."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.harness import Up, running_up
from bench.machine import medium_of
from bench.systems.base import Missing, Mounted, Source, System
from bench.systems.serving import end_of_log
from cachefs import __version__
from cachefs.fuse import probe
from cachefs.model import CachefsError

SETTLE_LIMIT_S = 300.0
QUIET_S = 1.5
"""When nothing has been fetched or sealed for so long, what is not whole stays so: nobody has asked for the rest."""


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
            status = self._status(mounted)
            now = (status["counters"], [(tier["blocks"], tier["partials"]) for tier in status["tiers"]])
            if now != before:
                before, since = now, time.monotonic()
            elif not any(partials for _, partials in now[1]) or time.monotonic() - since > QUIET_S:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"not everything was sealed after {SETTLE_LIMIT_S:g} s")
            time.sleep(0.1)
        super().settle(mounted)

    def explain(self, mounted: Mounted) -> Iterator[tuple[str, float]]:
        status = self._status(mounted)
        for name, value in (*status["counters"].items(), *status["opens"].items()):
            yield name, float(value)

    def _status(self, mounted: Mounted) -> dict[str, Any]:
        try:
            report = Up(mounted.path, mounted.facts["master"]).report()
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"cachefs report failed: {error.stderr.decode(errors='replace')[-500:]}") from error
        status: dict[str, Any] = report["workers"][0]["status"]
        return status
