"""What memory our processes take at most under four times the load that a mount lets the kernel put on it.

A real S3 server, two nodes, the load of `cachefs.testing.ceilings`. Exit status 1 when a ceiling does not hold, or a
reader got an error or wrong bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import terminate_as_interrupt
from cachefs.model import MiB
from cachefs.testing.ceilings import CEILINGS, CONNECTIONS, NAMES, READERS, Found, measure
from cachefs.testing.pressure import make_files
from cachefs.testing.s3server import running_s3_server

LARGE, LARGE_BYTES = 8, 256 * MiB


def run(directory: Path, seconds: float, readers: int) -> Found:
    data = directory / "data"
    make_files(data, LARGE, LARGE_BYTES, NAMES)
    (directory / "s3").mkdir()
    with running_s3_server(directory / "s3") as server:
        server.client().create_bucket(Bucket="memory")
        files = (path for path in data.rglob("*") if path.is_file())
        server.put_objects("memory", ((str(path.relative_to(data)), path.read_bytes()) for path in files))
        tier = f"{LARGE * LARGE_BYTES * 2 // 3 // MiB}M"
        stderr = None if os.environ.get("CACHEFS_BENCH_LOGS") else subprocess.DEVNULL
        return measure(
            directory, "s3://memory", server.ufs_options, LARGE, tier, seconds, readers=readers, stderr=stderr
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of load (default 60)")
    parser.add_argument("--readers", type=int, default=READERS, help=f"of each mount (default {READERS})")
    parser.add_argument("--dir", default=None, help="where to measure; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("mounts need root")
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-memory-", dir=arguments.dir))
    try:
        found = run(directory, arguments.seconds, arguments.readers)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    over = [name for name, memory in found.memory.items() if memory.peak > CEILINGS[name.split()[0]]]
    errors = [error for each in found.pressed for error in each.errors]
    if arguments.json:
        memory = {name: each._asdict() for name, each in found.memory.items()}
        print(json.dumps({"memory": memory, "done": [each.done for each in found.pressed], "asked": found.asked}))
    else:
        _show(found, arguments.readers)
    for error in errors[:5]:
        print(error)
    if over or errors:
        sys.exit(1)


def _show(found: Found, readers: int) -> None:
    title = f"{readers} readers on each of two mounts, {readers} askers over {CONNECTIONS} connections"
    table = Table(title=title)
    for column in ("process", "peak, MB", "of it not of files, MB", "may be, MB", "descriptors"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, memory in found.memory.items():
        numbers = (memory.peak, memory.anonymous, CEILINGS[name.split()[0]])
        table.add_row(name, *(f"{each / 1e6:.0f}" for each in numbers), str(memory.descriptors))
    Console(width=120).print(table)
    for each in found.pressed:
        print(", ".join(f"{kind}: {count}" for kind, count in each.done.items()))
    print(", ".join(f"{kind}: {count}" for kind, count in found.asked.items()))


if __name__ == "__main__":
    main()
