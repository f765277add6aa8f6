"""What a cluster promises, line by line: required and measured, with real processes on this machine.

    python -m bench.cluster                                 all of it, some minutes
    python -m bench.cluster --rows cold_start,peer_read     some of it

Under-store bytes are those of GET bodies, counted by a proxy between the workers and a real S3 server, in binary
comparison with the data; every byte that is read is compared too. The other rows are ratios and rates in one run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cluster.master_rate import master_rate
from bench.cluster.peer_read import peer_read
from bench.cluster.row import Row
from bench.cluster.under_store import Bucket, cold_start, four_30, fractions, second_job
from bench.harness import terminate_as_interrupt
from cachefs.testing.s3server import running_s3_server

WITH_BUCKET: dict[str, Callable[[Path, Bucket], Iterator[Row]]] = {
    each.__name__: each for each in (cold_start, fractions, four_30, second_job)
}
WITHOUT: dict[str, Callable[[Path], Iterator[Row]]] = {each.__name__: each for each in (peer_read, master_rate)}


def measure(names: list[str], directory: Path, told: Callable[[Row], None]) -> list[Row]:
    rows = []
    wanted = [name for name in WITH_BUCKET if name in names]
    if wanted:
        with running_s3_server(directory / "s3") as server:
            bucket = Bucket(server)
            for name in wanted:
                for row in WITH_BUCKET[name](directory, bucket):
                    rows.append(row)
                    told(row)
    for name in WITHOUT:
        if name in names:
            for row in WITHOUT[name](directory):
                rows.append(row)
                told(row)
    return rows


def rows_of(text: str) -> list[str]:
    known = [*WITH_BUCKET, *WITHOUT]
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


def main() -> None:
    known = [*WITH_BUCKET, *WITHOUT]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=rows_of, default=known, help=f"of {','.join(known)}; all by default")
    parser.add_argument("--dir", default=None, help="where caches are; default: the directory for temporary files")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    terminate_as_interrupt()
    directory = Path(tempfile.mkdtemp(prefix="cachefs-cluster-", dir=arguments.dir))
    began = time.monotonic()

    def told(row: Row) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {row.what}: {row.measured:,.4g} {row.note}", file=sys.stderr)

    try:
        rows = measure(arguments.rows, directory, told)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps([{**asdict(row), "reached": row.reached} for row in rows]))
    else:
        show(rows)
    sys.exit(0 if all(row.reached for row in rows) else 1)


def show(rows: list[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="a cluster of real processes on one machine")
    for column in ("what", "must", "measured", "ok", ""):
        table.add_column(column, justify="right" if column in ("must", "measured") else "left")
    for row in rows:
        table.add_row(row.what, row.must, f"{row.measured:,.4g}", "yes" if row.reached else "NO", row.note)
    console.print(table)


if __name__ == "__main__":
    main()
