"""The speed and memory that were promised, line by line: required and measured, as ratios within one run.

Warm reads are taken in turns of milliseconds by one process, cold ones in turns of whole runs on empty caches. The
machine does other things too: medians of several rounds, and their spread.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench.promises import cold, names, peers, warm
from bench.promises.place import AMOUNTS, WORKLOAD, Place
from bench.results import Gap, Measure
from bench.workloads.base import Alone, Scale
from cachefs.fuse import probe
from cachefs.model import CachefsError

Group = Callable[[Place], Iterator[Measure | Gap]]
GROUPS: Mapping[str, Group] = {
    "warm": warm.warm_reads,
    "no_open": warm.no_open,
    "cold_large": cold.cold_large,
    "cold_small": cold.cold_small,
    "in_order": cold.in_order,
    "listed_twice": names.listed_twice,
    "peers": peers.peers,
    "remembered_names": names.remembered_names,
    "memory": cold.memory,
}
SLOW = ("in_order", "peers", "remembered_names", "memory")
"""Minutes, or gigabytes: in the full scale, and where they are asked for."""
NEEDS_BYTES = {Scale.SMOKE: 1 << 30, Scale.STANDARD: 6 << 30, Scale.FULL: 16 << 30}


class Promises(Alone):
    name = WORKLOAD
    what = "what the README promises of speed and memory: ratios to native and to a bare client, required and measured"
    options: Mapping[str, str] = {"lines": f"some of {', '.join(GROUPS)}, with + between them; all that fit the scale"}

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for lines that are not known."""
        super().__init__(scale, options)
        fitting = [name for name in GROUPS if scale is Scale.FULL or name not in SLOW]
        wanted = self.chosen["lines"].split("+") if "lines" in self.chosen else fitting
        for name in wanted:
            if name not in GROUPS:
                raise ValueError(f"promises.lines: {name!r} is none of {', '.join(GROUPS)}")
        self.groups = [name for name in GROUPS if name in wanted]

    def needs_bytes(self) -> int:
        return NEEDS_BYTES[self.scale]

    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        if (why := probe().why_no_mount) is not None:
            yield Gap(workload=self.name, system="", kind="skipped", why=why)
            return
        place = Place(directory, AMOUNTS[self.scale])
        for name in self.groups:
            try:
                yield from GROUPS[name](place)
            except (SystemExit, CachefsError, ValueError, OSError, subprocess.CalledProcessError) as error:
                yield Gap(workload=self.name, system="", kind="failed", why=f"{name}: {error}")
