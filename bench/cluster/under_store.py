"""How many bytes the under-store sends, counted on the wire, as a share of the data set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cluster.data import BUCKET, DataSet, cold_data, epoch_data
from bench.cluster.nodes import Nodes, running_nodes
from bench.cluster.row import row
from bench.results import Measure
from cachefs.fuse import probe
from cachefs.model import GiB
from cachefs.testing.s3server import S3Server

COLD_NODES = (1, 2, 4, 8)
MOST_MOUNTS = 3
"""More nodes than these are read through the client library: each mount is a process more on the same processors."""
PINNED_SHARE = 0.9
"""Of the capacity: no more can be pinned."""
FRACTIONS = (0.25, 0.5, 0.75)


class Bucket:
    """A server with the data sets that were asked for so far."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self._made: dict[str, DataSet] = {}
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()

    def holding(self, data: DataSet) -> DataSet:
        if data.prefix not in self._made:
            data.put(self.server)
            self._made[data.prefix] = data
        return self._made[data.prefix]


def cold_start(
    directory: Path,
    bucket: Bucket,
    counts: Sequence[int] = COLD_NODES,
    data: DataSet | None = None,
    *,
    mounts: bool = True,
) -> Iterator[Measure]:
    """Without `mounts` all nodes are read through the client library."""
    data = bucket.holding(data or cold_data())
    can_mount = mounts and probe().can_mount
    for count in counts:
        mounted = can_mount and count <= MOST_MOUNTS
        place = directory / f"cold-{count}"
        with running_nodes(place, bucket.server, [GiB] * count, mounted=mounted) as nodes:
            sent = nodes.read(data, seed=0)
            note = f"through {'mounts' if mounted else 'clients'}; {_again(nodes, data)}"
        yield row(
            f"{count} cold nodes read everything at once: under-store / data", 1.02, sent / data.size_bytes, note=note
        )


def _again(nodes: Nodes, data: DataSet) -> str:
    counts = nodes.counting.bytes_by_object()
    sizes = {path: counts[f"{BUCKET}{path}"] for path in data.paths}
    often = sum(size > data.sizes[path] for path, size in sizes.items())
    return f"{nodes.counting.object_reads:,} GETs of {len(sizes):,} objects, more than once of {often}"


def fractions(directory: Path, bucket: Bucket) -> Iterator[Measure]:
    data = bucket.holding(epoch_data("epochs"))
    for pinned in (True, False):
        for share in FRACTIONS:
            name = "pinned" if pinned else "if-space"
            capacity = int(share * data.allocated_bytes)
            with running_nodes(directory / f"{name}-{share:g}", bucket.server, [capacity]) as nodes:
                if pinned:
                    _pin(nodes, data, share)
                epochs = [nodes.read(data, seed) / data.size_bytes for seed in range(3)]
            yield row(
                f"one node, cache for {share:.0%} of the data, {name}: under-store / data in an epoch",
                1 - share + (0.05 if pinned else 0.1),
                max(epochs[1:]),
                note=f"epochs {_shares(epochs)}",
            )


def _pin(nodes: Nodes, data: DataSet, share: float) -> None:
    """As many directories as may be, and load them."""
    directories = [data.directory(number) for number in range(int(PINNED_SHARE * share * data.directories))]
    command = [sys.executable, "-m", "cachefs", "pin", "--master", nodes.address, *directories]
    subprocess.run(command, check=True, capture_output=True)


def four_30(directory: Path, bucket: Bucket) -> Iterator[Measure]:
    data = bucket.holding(epoch_data("epochs"))
    capacity = int(0.3 * data.allocated_bytes)
    with running_nodes(directory / "four", bucket.server, [capacity] * 4) as nodes:
        epochs = [nodes.read(data, seed) / data.size_bytes for seed in range(4)]
    what = "four nodes with cache for 30 % each, each reads everything: under-store / data from the second epoch on"
    yield row(what, 0.02, max(epochs[1:]), note=f"epochs {_shares(epochs)}")


def second_job(directory: Path, bucket: Bucket) -> Iterator[Measure]:
    first, second = bucket.holding(epoch_data("epochs")), bucket.holding(epoch_data("second"))
    share, epoch_s = 0.5, 24.0
    capacity, pace_s = int(share * first.allocated_bytes), epoch_s / len(first.paths)
    flags = ["--idle-after", f"{epoch_s / 4:g}s"]
    with running_nodes(directory / "jobs", bucket.server, [capacity], worker_flags=flags) as nodes:
        before = [nodes.read(first, seed, pace_s=pace_s) / first.size_bytes for seed in range(2)]
        after = [nodes.read(second, seed, pace_s=pace_s) / second.size_bytes for seed in range(2)]
    yield row(
        "a second job with other data, cache for 50 % of it: under-store / data in its second epoch",
        1 - share + 0.1,
        after[1],
        note=f"epochs of the first job {_shares(before)}, of the second {_shares(after)}; idle after 1/4 of an epoch",
    )


def _shares(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
