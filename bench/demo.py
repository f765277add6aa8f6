"""The main job on embedded defaults: a bucket, `cachefs up`, an epoch from the bucket, an epoch from the cache.

Starts a real S3 server on loopback, puts a small data set into it (2,000 files of 110 KB, four shards of 64 MB), mounts
the bucket, and reads everything in shuffled order by four processes, comparing every checksum: cold, then warm in turns
with a native copy on the same file system. Leaves nothing behind.

With `--cluster N`: N workers, each with a mount; see `bench.cluster.demo`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.table import Table

from bench.harness import random_bytes, run_readers, running_up, terminate_as_interrupt
from bench.machine import medium_of
from cachefs.fuse import probe
from cachefs.testing.s3server import S3Server, running_s3_server

BUCKET = "demo"
PROCESSES = 4
ROUNDS = 3

console = Console(width=100 if not sys.stdout.isatty() else None)


def objects(small: int, shards: int) -> Iterator[tuple[str, bytes]]:
    for number in range(small):
        yield f"images/{number % 20:02}/{number:05}.jpg", random_bytes(f"image {number}", 110_000)
    for number in range(shards):
        yield f"shards/{number:02}.tar", random_bytes(f"shard {number}", 64_000_000)


def fill_bucket(server: S3Server, copy: Path, small: int, shards: int) -> dict[str, str]:
    """Put the data set into the bucket and beside it, natively; returns key -> checksum."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    client.close()
    checksums = {}

    def copied() -> Iterator[tuple[str, bytes]]:
        for key, content in objects(small, shards):
            checksums[key] = xxhash.xxh3_64_hexdigest(content)
            path = copy / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            yield key, content

    server.put_objects(BUCKET, copied())
    return checksums


def read_everything(root: Path, checksums: dict[str, str], seed: int) -> dict[str, float]:
    """Small files and shards, each by four processes at once in shuffled order; returns rates.

    Raises SystemExit when a byte is wrong.
    """
    rates: dict[str, float] = {}
    total_bytes = total_seconds = 0.0
    for name, wanted in (("images", "images/"), ("shards", "shards/")):
        keys = [key for key in sorted(checksums) if key.startswith(wanted)]
        random.Random(seed).shuffle(keys)
        jobs = [
            {"job": "read_files", "files": [[str(root / key), checksums[key]] for key in keys[start::PROCESSES]]}
            for start in range(PROCESSES)
        ]
        results = run_readers(jobs)
        wrong = [path for result in results for path in result["wrong"]]
        if wrong:
            raise SystemExit(f"WRONG BYTES in {len(wrong)} files, the first is {wrong[0]}")
        seconds = max(result["seconds"] for result in results)
        size = sum(result["bytes"] for result in results)
        total_bytes += size
        total_seconds += seconds
        rates[f"{name} MB/s"] = size / seconds / 1e6
        rates[f"{name} files/s"] = len(keys) / seconds
    rates["MB/s"] = total_bytes / total_seconds / 1e6
    return rates


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def show(rates: dict[str, dict[str, float]], opens: dict[str, Any], checked: int, medium: str) -> None:
    table = Table(title="cachefs demo", caption=f"{PROCESSES} reading processes, cache and native copy on {medium}")
    table.add_column("")
    for column in ("images files/s", "images MB/s", "shards MB/s", "all MB/s"):
        table.add_column(column, justify="right")
    columns = ("images files/s", "images MB/s", "shards MB/s", "MB/s")
    for name, measured in rates.items():
        table.add_row(name, *(f"{measured[column]:,.0f}" for column in columns))
    names = list(rates)
    warm, native, cold = rates[names[1]], rates[names[2]], rates[names[0]]
    table.add_row("warm / native", *(f"{warm[column] / native[column]:.2f}" for column in columns))
    table.add_row("warm / cold", *(f"{warm[column] / cold[column]:.1f}" for column in columns))
    console.print(table)
    console.print(f"opens: {opens['passthrough']:,} by passthrough, {opens['cached']:,} in cached mode")
    console.print(f"checksums: {checked:,} files compared after each reading, every byte as it was put into the bucket")


def timed_steps() -> Callable[[str], None]:
    began = time.monotonic()

    def step(text: str) -> None:
        console.print(f"[{time.monotonic() - began:5.1f} s] {text}", markup=False, highlight=False)

    return step


def demo(directory: Path, small: int, shards: int) -> None:
    step = timed_steps()
    step("starting an S3 server on loopback")
    with running_s3_server(directory / "s3") as server:
        step(f"putting {small:,} files of 110 KB and {shards} shards of 64 MB into the bucket")
        copy = directory / "native"
        checksums = fill_bucket(server, copy, small, shards)
        found = probe()
        if not found.can_mount:
            reason = found.device_error or "mounting needs root (CAP_SYS_ADMIN)"
            step(f"no mount on this machine: {reason}")
            from bench.without_mount import read_through_client

            read_through_client(server, f"s3://{BUCKET}", directory, checksums, step)
            return
        tier = f"ssd:{directory / 'tier'}:4G"
        step(f"cachefs up s3://{BUCKET} MOUNTPOINT")
        with running_up(f"s3://{BUCKET}", directory, tier, server.ufs_options) as up:
            step("first epoch, cold: everything comes from the bucket")
            cold = read_everything(up.mountpoint, checksums, seed=0)
            step("second epoch, warm, in turns with the native copy")
            warm, native = [], []
            for seed in range(1, ROUNDS + 1):
                warm.append(read_everything(up.mountpoint, checksums, seed))
                native.append(read_everything(copy, checksums, seed))
            opens = up.report()["workers"][0]["status"]["opens"]
            rates = {"cold (bucket)": cold, "warm (cachefs)": median(warm), "native (same disk)": median(native)}
            show(rates, opens, len(checksums), medium_of(directory))
        step("ended; nothing is left behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="small files (default 2000)")
    parser.add_argument("--shards", type=int, default=4, help="shards of 64 MB (default 4)")
    parser.add_argument("--cluster", type=int, default=1, metavar="N", help="nodes, each with a mount (default 1)")
    arguments = parser.parse_args()
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-demo-"))
    try:
        if arguments.cluster > 1:
            from bench.cluster.demo import demo_cluster

            demo_cluster(directory, arguments.cluster, console, timed_steps())
        else:
            demo(directory, arguments.files, arguments.shards)
    except KeyboardInterrupt:
        console.print("interrupted; everything was taken away again")
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
