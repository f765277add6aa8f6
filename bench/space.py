"""Whether a run has room, before it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.machine import medium_of, memory
from bench.server import Ceiling
from bench.workloads.base import Alone, Scale, Workload

SHARED_MEMORY = Path("/dev/shm")
OVERHEAD = 1.05
"""File systems' blocks, and what caches keep beside the data."""
SPARE_BYTES = 256 << 20
"""Logs, databases, and what others write meanwhile."""
PROCESSES_BYTES: Mapping[Scale, int] = {Scale.SMOKE: 512 << 20, Scale.STANDARD: 1 << 30, Scale.FULL: 2 << 30}
"""Memory of the processes that serve and read."""


class TooLittle(Exception):
    """Says what is needed, what is there, and what would fit."""


class Needs(NamedTuple):
    disk: int
    """In the run's directory: data natively, in the bucket, and in the cache of one system at a time."""
    bucket: int
    """Of that, what the server keeps."""


def needs(workloads: Sequence[Workload | Alone], systems: Iterable[str]) -> Needs:
    """At most at a time, when they are measured in this order, in which one can come again: a data set is there from
    the first workload that wants it to the last one.
    """
    copies = 1 + ("juicefs" in systems)
    data = [each.data() if isinstance(each, Workload) else None for each in workloads]
    names = [each.name if each is not None else None for each in data]
    most = most_of_server = 0
    for number, workload in enumerate(workloads):
        there = {
            each.name: each.size_bytes
            for each in data
            if each is not None and names.index(each.name) <= number <= _last(names, each.name)
        }
        of_server = copies * sum(there.values())
        own = workload.needs_bytes() if isinstance(workload, Alone) else _cached(workload)
        most = max(most, sum(there.values()) + of_server + own)
        most_of_server = max(most_of_server, of_server)
    ceiling = max((Ceiling.bytes_at(each.scale) for each in workloads if isinstance(each, Workload)), default=0)
    return Needs(int((most + ceiling) * OVERHEAD) + SPARE_BYTES, int((most_of_server + ceiling) * OVERHEAD))


def _last(names: Sequence[str | None], name: str) -> int:
    return len(names) - 1 - list(reversed(names)).index(name)


def _cached(workload: Workload) -> int:
    return min(workload.data().size_bytes, workload.cache_bytes())


def free(directory: Path) -> int:
    found = os.statvfs(directory)
    room = found.f_bavail * found.f_frsize
    return min(room, memory("MemAvailable")) if medium_of(directory) == "tmpfs" else room


def server_fits_memory(bucket: int, scale: Scale) -> bool:
    """Whether the server's objects may lie in shared memory: dropping the page cache, which measuring readers do, then
    does not make the server read a disk. They may take a third of the memory that is free.
    """
    try:
        if medium_of(SHARED_MEMORY) != "tmpfs" or not os.access(SHARED_MEMORY, os.W_OK):
            return False
        return bucket < min(free(SHARED_MEMORY) - PROCESSES_BYTES[scale], memory("MemAvailable") // 3)
    except OSError:
        return False


def check(directory: Path, scale: Scale, workloads: Sequence[Workload | Alone], systems: Sequence[str]) -> None:
    """Raises TooLittle."""
    available = memory("MemAvailable")
    if available < PROCESSES_BYTES[scale]:
        raise TooLittle(
            f"{human(PROCESSES_BYTES[scale])} of memory are needed at scale {scale}, and {human(available)} are there"
            + _smaller(scale, lambda each: PROCESSES_BYTES[each] <= available)
        )
    room = free(directory)
    wanted = needs(workloads, systems).disk
    if wanted <= room:
        return
    single = {each.name: needs([each], systems).disk for each in workloads}
    fitting = [f"{name} ({human(size)})" for name, size in single.items() if size <= room]
    what = f"{human(wanted)} are needed in {directory}, and {human(room)} are there"
    if len(single) > 1 and fitting:
        what += f". By itself would fit: {', '.join(fitting)}"

    def fits(each: Scale) -> bool:
        return needs([type(one)(each, one.chosen) for one in workloads], systems).disk <= room

    raise TooLittle(what + _smaller(scale, fits))


def _smaller(scale: Scale, fits: Callable[[Scale], bool]) -> str:
    order = list(Scale)
    for each in reversed(order[: order.index(scale)]):
        if fits(each):
            return f". --scale {each} would fit"
    return ". Nothing smaller would fit"


def human(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
