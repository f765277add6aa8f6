"""A first epoch over small files, opened by one process in the order of their directory, from a store that is far away.

With and without fetching ahead, in turns on an empty cache; the ratio is what counts. The store is a real S3 server
behind a proxy that holds every answer back for a while.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import xxhash

from bench.harness import random_bytes, run_readers, running_up, terminate_as_interrupt
from cachefs.testing.faulty_s3 import running_faulty_s3
from cachefs.testing.s3server import running_s3_server

BUCKET = "in-order"
ROUNDS = 3
SETTINGS = {"ahead": 64, "not ahead": 0}


def measure(directory: Path, files: int, size: int, delay_s: float) -> dict[str, list[float]]:
    """Setting -> files per second, one number per round. Raises SystemExit when a byte is wrong."""
    measured: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with running_s3_server(directory / "s3") as server, running_faulty_s3(server.endpoint) as far:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        contents = {f"{number:05}": random_bytes(str(number), size) for number in range(files)}
        server.put_objects(BUCKET, contents.items())
        checksums = {key: xxhash.xxh3_64_hexdigest(content) for key, content in contents.items()}
        far.delay_s = delay_s
        options = server.ufs_options | {"endpoint_url": far.endpoint}
        for round_ in range(ROUNDS):
            for name, ahead in sorted(SETTINGS.items(), reverse=bool(round_ % 2)):
                place = directory / f"{round_}-{ahead}"
                place.mkdir()
                flags = ["--files-ahead", str(ahead)]
                with running_up(f"s3://{BUCKET}", place, f"ssd:{place / 'tier'}:4G", options, flags) as up:
                    sum(1 for _ in up.mountpoint.iterdir())
                    job = [[str(up.mountpoint / key), checksums[key]] for key in sorted(checksums)]
                    (result,) = run_readers([{"job": "read_files", "files": job}])
                if result["wrong"]:
                    raise SystemExit(f"WRONG BYTES in {result['wrong'][0]}")
                measured[name].append(files / result["seconds"])
                shutil.rmtree(place)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=500, help="default 500")
    parser.add_argument("--size", type=int, default=100_000, help="bytes of each (default 100000)")
    parser.add_argument("--delay", type=float, default=20.0, help="ms before each answer of the store (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-"))
    try:
        measured = measure(directory, arguments.files, arguments.size, arguments.delay / 1000)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps({"delay_ms": arguments.delay, "files_per_s": measured}))
        return
    for name, rates in measured.items():
        print(f"{name:10} {statistics.median(rates):8.0f} files/s   ({min(rates):.0f} to {max(rates):.0f})")
    ratios = [one / other for one, other in zip(measured["ahead"], measured["not ahead"], strict=True)]
    print(f"ratio      {statistics.median(ratios):8.1f}           ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
