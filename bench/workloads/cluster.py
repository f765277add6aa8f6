"""What a cluster promises, line by line: required and measured, with real processes on this machine.

Under-store bytes are those of GET bodies, counted by a proxy between the workers and a real S3 server, in binary
comparison with the data; every byte that is read is compared too. The other rows are ratios and rates in one run.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from bench.cluster.data import DataSet
from bench.cluster.master_rate import master_rate
from bench.cluster.peer_read import peer_read
from bench.cluster.row import WORKLOAD
from bench.cluster.under_store import Bucket, cold_start, four_30, fractions, second_job
from bench.results import Gap, Measure
from bench.workloads.base import Alone, Scale
from cachefs.model import CachefsError, KiB
from cachefs.testing.s3server import running_s3_server

WITH_BUCKET: Mapping[str, Callable[[Path, Bucket], Iterator[Measure]]] = {
    each.__name__: each for each in (cold_start, fractions, four_30, second_job)
}
WITHOUT: Mapping[str, Callable[[Path], Iterator[Measure]]] = {each.__name__: each for each in (peer_read, master_rate)}
ROWS = (*WITH_BUCKET, *WITHOUT)
FITTING = {Scale.SMOKE: ("cold_start",), Scale.STANDARD: ("cold_start", "peer_read"), Scale.FULL: ROWS}
STANDARD_NODES = (1, 2)
NEEDS_BYTES = {Scale.SMOKE: 1 << 30, Scale.STANDARD: 2 << 30, Scale.FULL: 6 << 30}


class Cluster(Alone):
    name = WORKLOAD
    what = "what the README promises of a cluster: under-store bytes, reading from a peer, rates of the master"
    options: Mapping[str, str] = {"rows": f"some of {', '.join(ROWS)}, with + between them; all that fit the scale"}

    def __init__(self, scale: Scale, options: Mapping[str, str] | None = None) -> None:
        """Raises ValueError for rows that are not known."""
        super().__init__(scale, options)
        wanted = self.chosen["rows"].split("+") if "rows" in self.chosen else FITTING[scale]
        for name in wanted:
            if name not in ROWS:
                raise ValueError(f"cluster.rows: {name!r} is none of {', '.join(ROWS)}")
        self.rows = [name for name in ROWS if name in wanted]

    def needs_bytes(self) -> int:
        return NEEDS_BYTES[self.scale]

    def run(self, directory: Path) -> Iterator[Measure | Gap]:
        with ExitStack() as stack:
            bucket = None
            for name in self.rows:
                try:
                    if name in WITHOUT:
                        yield from WITHOUT[name](directory)
                        continue
                    if bucket is None:
                        bucket = Bucket(stack.enter_context(running_s3_server(directory / "s3")))
                    yield from self._with_bucket(name, directory, bucket)
                except (SystemExit, CachefsError, OSError, subprocess.CalledProcessError) as error:
                    yield Gap(workload=self.name, system="", kind="failed", why=f"{name}: {error}")

    def _with_bucket(self, name: str, directory: Path, bucket: Bucket) -> Iterator[Measure]:
        if name == cold_start.__name__ and self.scale is Scale.SMOKE:
            return cold_start(directory, bucket, (2,), DataSet("cold", 2, {64 * KiB: 40}), mounts=False)
        if name == cold_start.__name__ and self.scale is Scale.STANDARD:
            return cold_start(directory, bucket, STANDARD_NODES)
        return WITH_BUCKET[name](directory, bucket)
