"""A directory of very many names, from a server that makes them up."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.harness import Up, running_up
from bench.processes import memory_bytes, process_of
from bench.promises.place import Place, measure, sh
from bench.results import Measure
from cachefs.client import ClientConfig
from cachefs.testing.huge_s3 import DIRECTORY, running_huge_s3


@contextmanager
def huge_mount(place: Place, count: int) -> Iterator[tuple[Up, Path]]:
    """`cachefs up` of a bucket with one directory of so many keys; and the directory that has what belongs to it."""
    where = place.directory / "huge"
    where.mkdir()
    with (
        running_huge_s3(count) as store,
        running_up(store.url, where, f"ssd:{where / 'tier'}:1G", store.options) as up,
    ):
        yield up, where
    shutil.rmtree(where)


def listed_twice(place: Place) -> Iterator[Measure]:
    """Each round has a namespace, a mount and a kernel's cache of its own."""
    count = place.amounts.listed_files
    first: list[float] = []
    second: list[float] = []
    for _ in range(place.amounts.listings):
        with huge_mount(place, count) as (up, _):
            for spent in (first, second):
                begin = time.perf_counter()
                sh('test "$(ls -l "$1" | wc -l)" = "$2"', up.mountpoint / DIRECTORY, str(count + 1))
                spent.append(time.perf_counter() - begin)
    note = f"the first: {statistics.median(first):.1f} s, from a server that makes the names up"
    case = f"ls -l of {count:,} files, second time in a fresh process"
    yield measure(case, second, 1.0, metric="seconds", unit="s", better="less", note=note)


def remembered_names(place: Place) -> Iterator[Measure]:
    """One name more than is remembered by default: as many are held as may be."""
    held = ClientConfig.metadata_cache_entries
    grown: list[float] = []
    with huge_mount(place, held + 1) as (up, where):
        sh('ls "$1" > /dev/null', up.mountpoint)
        mount = process_of(where, "mount")
        before = memory_bytes(mount)
        for _ in range(2):
            sh('test "$(ls -U "$1" | wc -l)" = "$2"', up.mountpoint / DIRECTORY, str(held + 1))
            grown.append((memory_bytes(mount) - before) / held)
    note = f"all that it has grown by, / {held:,} entries; listed once, and twice"
    case = "mount server's memory for each of a million cached names"
    yield measure(case, grown, 350, metric="bytes", unit="B", better="less", note=note)
