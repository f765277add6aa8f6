"""`make demo CLUSTER=3`: three workers with a mount each. A cold and a warm epoch on all of them at once, and the bytes
that the under-store sent, counted on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cluster.data import BUCKET, DataSet, cold_data
from bench.cluster.nodes import Nodes, running_nodes
from bench.machine import medium_of
from cachefs.fuse import probe
from cachefs.model import GiB
from cachefs.testing.s3server import running_s3_server

MOST = 1.02
"""Times the data set may come from the under-store."""


def demo_cluster(directory: Path, count: int, console: Console, step: Callable[[str], None]) -> None:
    """Raises SystemExit when a byte is wrong, or too many come from the under-store."""
    data = cold_data()
    step("starting an S3 server on loopback, and a proxy before it that counts")
    with running_s3_server(directory / "s3") as server:
        step(f"putting 400 files of 64 KiB and 8 of 16 MiB, {data.size_bytes / 1e6:,.0f} MB, into a bucket")
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        data.put(server)
        mounted = probe().can_mount
        through = "mounts" if mounted else "connections of the client library, as nothing can be mounted here"
        step(f"starting a master, {count} workers, each with a directory of its own, and {count} {through}")
        with running_nodes(directory / "cluster", server, [GiB] * count, mounted=mounted) as nodes:
            show(nodes, data, console, step, directory)
    step("ended; nothing is left behind")


def show(nodes: Nodes, data: DataSet, console: Console, step: Callable[[str], None], directory: Path) -> None:
    count = len(nodes.nodes)
    table = Table(
        title=f"cachefs demo, {count} nodes", caption=f"one reading process a node, caches on {medium_of(directory)}"
    )
    for column in ("", *(f"node{number}, MB/s" for number in range(1, count + 1)), "under-store, bytes", "/ data set"):
        table.add_column(column, justify="right" if column else "left")
    sent = []
    for number, name in enumerate(("cold epoch", "warm epoch")):
        step(f"{name}: every node reads everything, in an order of its own")
        sent.append(nodes.read(data, number))
        rates = (f"{result['bytes'] / result['seconds'] / 1e6:,.0f}" for result in nodes.results)
        table.add_row(name, *rates, f"{sent[-1]:,}", f"{sent[-1] / data.size_bytes:.3f}")
    console.print(table)
    files = len(data.paths)
    console.print(f"checksums: {files:,} files compared on each node in each epoch, every byte as put into the bucket")
    if sum(sent) > MOST * data.size_bytes:
        raise SystemExit(f"TOO MANY BYTES from the under-store: more than {MOST} x the data set")
