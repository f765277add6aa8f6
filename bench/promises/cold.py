"""What is not in the cache yet, against what the S3 server can give at most; in turns of whole runs on empty caches."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from bench.harness import Up, random_bytes, run_readers, running_up
from bench.processes import busiest_of, memory_bytes, process_of
from bench.promises.place import BUCKET, MIB, SMALL_BYTES, Place, Profile, all_of, blocks_of, measure, sh, wait_for
from bench.results import Measure
from bench.server import bare_client, make_bucket
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.s3server import S3Server, running_s3_server

CONCURRENCIES = (4, 8, 16)
READERS = 8
DELAY_S = 0.02
"""Of each answer of the store that is far away."""
AHEAD = {"ahead": 64, "not ahead": 0}


@contextmanager
def bucket_below(directory: Path) -> Iterator[S3Server]:
    with running_s3_server(directory) as server:
        make_bucket(server, BUCKET)
        yield server
    shutil.rmtree(directory)


def cold_large(place: Place) -> Iterator[Measure]:
    count, size = place.amounts.objects, place.amounts.object_mib * MIB
    keys = [f"large/{number}" for number in range(count)]
    ranges = [(key, start, start + 8 * MIB) for key in keys for start in range(0, size, 8 * MIB)]
    ratios, speeds = [], []
    profile, alone = Profile(), Profile()
    with bucket_below(place.directory / "s3-large") as server:
        server.put_objects(BUCKET, ((key, random_bytes(key, size)) for key in keys))
        bare_client(server, BUCKET, ranges, 8)
        best = min(CONCURRENCIES, key=lambda concurrency: bare_client(server, BUCKET, ranges, concurrency))
        for round_ in range(place.amounts.rounds):
            with alone.on({"server for the bare client": busiest_of(server.pid)}):
                bare_s = bare_client(server, BUCKET, ranges, best)
            name = f"large-{round_}"
            with cold_mount(place, server, name, "large") as up, profile.on(all_of(server, place.directory / name)):
                begin = time.perf_counter()
                for key in keys:
                    sh('dd if="$1" of=/dev/null bs=1M 2>/dev/null', up.mountpoint / key)
                spent = time.perf_counter() - begin
            ratios.append(bare_s / spent)
            speeds.append(count * size / bare_s / 1e6)
    megabytes = place.amounts.rounds * count * size / 1e6
    note = f"bare: {statistics.median(speeds):.0f} MB/s with {best} requests at a time; "
    note += f"{profile.each(megabytes, 'MB')}; {alone.each(megabytes, 'MB')}"
    yield measure("cold sequential read of large objects / the fastest bare client", ratios, 0.8, note=note)


def cold_small(place: Place) -> Iterator[Measure]:
    files = place.amounts.small_files
    keys = [f"small/{number:04}" for number in range(files)]
    ranges = [(key, 0, SMALL_BYTES) for key in keys]
    ratios, speeds = [], []
    profile, alone = Profile(), Profile()
    with bucket_below(place.directory / "s3-small") as server:
        server.put_objects(BUCKET, ((key, random_bytes(key, SMALL_BYTES)) for key in keys))
        bare_client(server, BUCKET, ranges, READERS)
        for round_ in range(place.amounts.rounds):
            with alone.on({"server for the bare client": busiest_of(server.pid)}):
                bare_s = bare_client(server, BUCKET, ranges, READERS)
            name = f"small-{round_}"
            with cold_mount(place, server, name, "small") as up:
                share = [
                    {"job": "read_blindly", "files": [str(up.mountpoint / key) for key in keys[reader::READERS]]}
                    for reader in range(READERS)
                ]
                with profile.on(all_of(server, place.directory / name)):
                    spent = max(result["seconds"] for result in run_readers(share))
            ratios.append(bare_s / spent)
            speeds.append(files / bare_s)
    done = place.amounts.rounds * files
    note = f"bare: {statistics.median(speeds):,.0f} files/s with {READERS} requests at a time; "
    note += f"{profile.each(done, 'file')}; {alone.each(done, 'file')}"
    yield measure("cold 110 KB files, 8 readers in directory order / the bare client", ratios, 0.7, note=note)


@contextmanager
def cold_mount(place: Place, server: S3Server, name: str, directory: str) -> Iterator[Up]:
    where = place.directory / name
    where.mkdir()
    with running_up(f"s3://{BUCKET}", where, f"ssd:{where / 'tier'}:8G", server.ufs_options) as up:
        # Names are known; bytes are not.
        sh('ls -l "$1" > /dev/null', up.mountpoint / directory)
        yield up
    # It goes with everything else: ext4 does not use inodes again for a while, and looks for others at every new file.


def in_order(place: Place) -> Iterator[Measure]:
    """A first epoch over small files by one process, from a real server behind a proxy that holds each answer back:
    with and without fetching ahead, in turns on an empty cache. Raises ValueError when a byte is wrong.
    """
    rates: dict[str, list[float]] = {name: [] for name in AHEAD}
    contents = {f"{number:05}": random_bytes(str(number), 100_000) for number in range(place.amounts.in_order_files)}
    with bucket_below(place.directory / "s3-far") as server, running_faulty_s3(server.endpoint) as far:
        server.put_objects(BUCKET, contents.items())
        checksums = {key: xxhash.xxh3_64_hexdigest(content) for key, content in contents.items()}
        far.delay_s = DELAY_S
        options = server.ufs_options | {"endpoint_url": far.endpoint}
        for round_ in range(place.amounts.rounds):
            for name, ahead in sorted(AHEAD.items(), reverse=bool(round_ % 2)):
                where = place.directory / f"far-{round_}-{ahead}"
                where.mkdir()
                flags = ["--files-ahead", str(ahead)]
                with running_up(f"s3://{BUCKET}", where, f"ssd:{where / 'tier'}:4G", options, flags) as up:
                    sum(1 for _ in up.mountpoint.iterdir())
                    files = [[str(up.mountpoint / key), checksums[key]] for key in sorted(checksums)]
                    (result,) = run_readers([{"job": "read_files", "files": files}])
                if result["wrong"]:
                    raise ValueError(f"WRONG BYTES in {result['wrong'][0]}")
                rates[name].append(len(files) / result["seconds"])
                shutil.rmtree(where)
    ratios = [one / other for one, other in zip(rates["ahead"], rates["not ahead"], strict=True)]
    note = ", ".join(f"{name}: {statistics.median(each):,.0f} files/s" for name, each in rates.items())
    case = "first epoch of 100 KB files in directory order, a store 20 ms away / the same without fetching ahead"
    yield measure(case, ratios, None, note=note)


def memory(place: Place) -> Iterator[Measure]:
    where = place.directory / "memory"
    where.mkdir()
    with bucket_below(place.directory / "s3-much") as server:
        for number in range(16):
            # One by one: this process has no need of four gigabytes.
            server.put_objects(BUCKET, [(str(number), os.urandom(256 * MIB))])
        tier = f"ssd:{where / 'tier'}:16G"
        with running_up(f"s3://{BUCKET}", where, tier, server.ufs_options) as up:
            sh('ls "$1" | xargs -P 8 -I{} dd if="$1"/{} of=/dev/null bs=1M 2>/dev/null', up.mountpoint)
            wait_for(lambda: blocks_of(up) == 16)
            most = memory_bytes(process_of(where, "worker"), "VmHWM")
    shutil.rmtree(where)
    note = "peak, 16 S3 objects of 256 MiB read by 8 readers"
    case = "worker's memory while it fills 4 GB from S3"
    yield measure(case, [most], 300e6, metric="bytes", unit="B", better="less", note=note)
