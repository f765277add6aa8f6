"""The S3 server that all systems read from: a real one, which counts itself what it sends; and what it can give.

SeaweedFS tells its counters at `/metrics` of a port of its own. `bucket_traffic_sent_bytes_total` has the bytes of the
bodies of GETs and nothing else: a range of a thousand bytes is a thousand, HEAD and LIST are none; of a body that its
reader gave up, what the network took.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.harness import random_bytes
from bench.results import Measure
from bench.workloads.base import Scale
from cachefs.testing.s3server import S3Server, running_s3_server

MIB = 1 << 20
CEILING_BUCKET = "ceiling"
SMALL_BYTES = 112_000
RANGE_BYTES = 8 * MIB
CONCURRENCIES = (4, 8, 16, 32)
BARE_LIMIT_S = 300.0
_TIMEOUT_S = 60.0
_COUNTED_LIMIT_S = 10.0
_CEILING = {
    Scale.SMOKE: (16 * MIB, 2, 32),
    Scale.STANDARD: (64 * MIB, 4, 500),
    Scale.FULL: (128 * MIB, 4, 1000),
}
"""Bytes of a large object, how many, and how many small ones."""
_SENT = re.compile(r'^SeaweedFS_s3_bucket_traffic_sent_bytes_total\{bucket="([^"]*)"\} (\S+)$', re.MULTILINE)
_GETS = re.compile(
    r'^SeaweedFS_s3_request_total\{bucket="([^"]*)",code="20[06]",type="GET"\} (\S+)$',
    re.MULTILINE,
)


class Traffic(msgspec.Struct, frozen=True):
    """What a server has sent since it started."""

    sent_bytes: int
    """Of objects: bodies of GETs."""
    reads: int
    """GETs and HEADs of objects that were answered with success."""

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.sent_bytes - before.sent_bytes, self.reads - before.reads)


def traffic(url: str, at_least: int = 0) -> Traffic:
    """Of all buckets. `url` is a `Source.traffic_url`. Takes some milliseconds. Raises OSError.

    `at_least`: bytes that have come from there. The server counts what it has sent a moment after whoever asked for it
    has it, and is given ten seconds for that.
    """
    give_up = time.monotonic() + _COUNTED_LIMIT_S
    while (found := _traffic(url)).sent_bytes < at_least and time.monotonic() < give_up:
        time.sleep(0.02)
    return found


def _traffic(url: str) -> Traffic:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        text = answer.read().decode()
    return Traffic(*(int(sum(float(value) for _, value in counted.findall(text))) for counted in (_SENT, _GETS)))


@contextmanager
def running_server(directory: Path) -> Iterator[S3Server]:
    """A server that keeps its objects in `directory`. Raises CachefsError when it is not installed."""
    # Volumes are given to buckets one by one, seven at first, and take no room before they are filled.
    with running_s3_server(directory, ["-volume.max=1000", "-master.volumeSizeLimitMB=1024"]) as s3:
        yield s3


def make_bucket(s3: S3Server, name: str) -> None:
    """See to it that there is one of this name."""
    client = s3.client()
    try:
        client.create_bucket(Bucket=name)
    except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        pass
    finally:
        client.close()


def remove_buckets(s3: S3Server, ending: str) -> None:
    """Those whose name ends so, with what is in them. SeaweedFS gives their room back at once."""
    client = s3.client()
    try:
        for bucket in client.list_buckets()["Buckets"]:
            if bucket["Name"].endswith(ending):
                client.delete_bucket(Bucket=bucket["Name"])
    finally:
        client.close()


class Ceiling:
    """What the fastest client there is for Python gets from the server when it throws everything away."""

    def __init__(self, s3: S3Server, scale: Scale) -> None:
        self._s3 = s3
        self._rounds = 1 if scale is Scale.SMOKE else 3
        self._large_bytes, self._larges, self._smalls = _CEILING[scale]
        self._speeds: dict[str, list[float]] = {"large": [], "small": []}
        self._concurrency: dict[str, int] = {}

    @staticmethod
    def bytes_at(scale: Scale) -> int:
        """Of its objects."""
        large, count, small = _CEILING[scale]
        return large * count + small * SMALL_BYTES

    def measure(self) -> None:
        """Once more; before the first workload, and after the last."""
        if not self._concurrency:
            make_bucket(self._s3, CEILING_BUCKET)
            for number in range(self._larges):
                key = f"large/{number}"
                self._s3.put_objects(CEILING_BUCKET, [(key, random_bytes(key, self._large_bytes))])
            keys = (f"small/{number:04}" for number in range(self._smalls))
            self._s3.put_objects(CEILING_BUCKET, ((key, random_bytes(key, SMALL_BYTES)) for key in keys))
            for kind in self._speeds:
                if self._rounds == 1:
                    self._concurrency[kind] = CONCURRENCIES[1]
                    continue
                found = {count: self._speed(kind, count) for count in CONCURRENCIES}
                self._concurrency[kind] = max(found, key=found.__getitem__)
        for _ in range(self._rounds):
            for kind, speeds in self._speeds.items():
                speeds.append(self._speed(kind, self._concurrency[kind]))

    def measures(self) -> Iterator[Measure]:
        cases = {
            "large": ("ranges of 8 MiB of large objects, a bare client", "bytes_per_s", "B/s"),
            "small": ("objects of 112 KB, a bare client", "files_per_s", "1/s"),
        }
        for kind, (case, metric, unit) in cases.items():
            yield Measure(
                workload="server",
                case=case,
                system="",
                metric=metric,
                unit=unit,
                better="more",
                values=self._speeds[kind],
                labels={"kind": kind, "concurrency": str(self._concurrency[kind])},
                note="half of it before the first workload, half after the last",
            )

    def _speed(self, kind: str, concurrency: int) -> float:
        """Bytes, or objects, per second."""
        if kind == "small":
            ranges = [(f"small/{number:04}", 0, SMALL_BYTES) for number in range(self._smalls)]
            return len(ranges) / bare_client(self._s3, CEILING_BUCKET, ranges, concurrency)
        keys = [f"large/{number}" for number in range(self._larges)]
        starts = range(0, self._large_bytes, RANGE_BYTES)
        ranges = [(key, start, start + RANGE_BYTES) for key in keys for start in starts]
        return len(ranges) * RANGE_BYTES / bare_client(self._s3, CEILING_BUCKET, ranges, concurrency)


def bare_client(s3: S3Server, bucket: str, ranges: Sequence[tuple[str, int, int]], concurrency: int) -> float:
    """Seconds that it takes to fetch the ranges (key, start, end) into memory, and throw them away."""
    job = {"endpoint": s3.endpoint, "key": s3.key, "secret": s3.secret, "bucket": bucket}
    given = json.dumps({**job, "ranges": ranges, "concurrency": concurrency})
    command = [sys.executable, "-m", "bench.bare_client"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=True, cwd=root, timeout=BARE_LIMIT_S
    )
    return float(done.stdout)


def version() -> str:
    """Of SeaweedFS."""
    program = Path(sys.executable).with_name("weed")
    done = subprocess.run([program if program.exists() else "weed", "version"], capture_output=True, text=True)
    # "version 8000GB 4.48 pypi linux amd64": first comes the size a volume may have.
    words = done.stdout.split()
    return words[2] if len(words) > 2 else "unknown"
