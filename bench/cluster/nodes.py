"""A cluster of real processes on this machine, each worker with its own directory, in front of a counted bucket."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cluster.data import BUCKET, DataSet
from bench.harness import run_readers
from cachefs.testing.counting_s3 import CountingS3, running_counting_s3
from cachefs.testing.processes import Running, mountpoint_below, running
from cachefs.testing.s3server import S3Server

LOOPBACK = ["--insecure", "--listen", "127.0.0.1:0", "--log-level", "WARNING"]
QUIET_S = 1.5
"""No byte for so long: longer than workers wait before they report."""
LIMIT_S = 120.0


@dataclass
class Node:
    """A worker, with the mount of its node if there is one."""

    socket: str
    worker: Running
    mountpoint: Path | None = None


class Nodes:
    """A running cluster."""

    def __init__(self, master: Running, counting: CountingS3) -> None:
        self.master = master
        self.counting = counting
        self.nodes: list[Node] = []
        self.results: list[dict[str, Any]] = []
        """Of the last epoch, what each node's reader measured."""

    @property
    def address(self) -> str:
        address: str = self.master.facts["listen"]
        return address

    def read(self, data: DataSet, seed: int, *, pace_s: float = 0.0) -> int:
        """Everything, on all nodes at once, each in an order of its own; returns the bytes that the under-store sent.

        `pace_s`: seconds between files. Raises SystemExit when a byte is wrong.
        """
        before = self.counting.object_bytes
        jobs = []
        for number, node in enumerate(self.nodes):
            paths = data.paths
            random.Random(f"{seed} {number}").shuffle(paths)
            root = node.mountpoint or Path("/")
            files = [[f"{root}{path}" if node.mountpoint else path, data.checksums[path]] for path in paths]
            job = {"job": "read_files", "files": files}
            if not node.mountpoint:
                job |= {"master": self.address, "socket": node.socket, "pace_s": pace_s}
            jobs.append(job)
        mounted = self.nodes[0].mountpoint is not None
        self.results = run_readers(jobs, "bench.reader" if mounted else "bench.cluster.reading")
        wrong = [path for result in self.results for path in result["wrong"]]
        if wrong:
            raise SystemExit(f"WRONG BYTES in {len(wrong)} files, the first is {wrong[0]}")
        self.wait_quiet()
        return self.counting.object_bytes - before

    def wait_quiet(self) -> None:
        """Until nothing has come from the under-store for a while."""
        give_up = time.monotonic() + LIMIT_S
        count, since = -1, time.monotonic()
        while time.monotonic() < give_up:
            if self.counting.under_way or self.counting.object_bytes != count:
                count, since = self.counting.object_bytes, time.monotonic()
            elif time.monotonic() - since > QUIET_S:
                return
            time.sleep(0.05)
        raise SystemExit("the under-store is read without an end")


@contextmanager
def running_nodes(
    directory: Path,
    server: S3Server,
    capacities: Sequence[int],
    *,
    mounted: bool = False,
    worker_flags: Sequence[str] = (),
) -> Iterator[Nodes]:
    """One worker for each of `capacities`, in bytes; with a FUSE mount each if `mounted`."""
    directory.mkdir()
    with ExitStack() as stack:
        counting = stack.enter_context(running_counting_s3(server.endpoint))
        environment = {"CACHEFS_UFS_OPTIONS": json.dumps({**server.ufs_options, "endpoint_url": counting.endpoint})}
        namespace = ["--data-dir", directory / "master", "--mount", f"/=s3://{BUCKET}", "--sync-interval", "-1"]
        master = stack.enter_context(running("master", *namespace, *LOOPBACK, environment=environment))
        nodes = Nodes(master, counting)
        for number, capacity in enumerate(capacities, 1):
            place = directory / f"node{number}"
            place.mkdir()
            socket = place / "worker.sock"
            worker = stack.enter_context(
                running(
                    "worker",
                    *("--name", f"node{number}", "--master", nodes.address, "--socket", socket),
                    *("--tier", f"ssd:{place / 'tier'}:{capacity}", *worker_flags, *LOOPBACK),
                )
            )
            node = Node(str(socket), worker)
            if mounted:
                node.mountpoint = stack.enter_context(mountpoint_below(place))
                flags = ["--master", nodes.address, "--worker-socket", socket, "--insecure", "--log-level", "WARNING"]
                stack.enter_context(running("mount", node.mountpoint, *flags))
            nodes.nodes.append(node)
        yield nodes
