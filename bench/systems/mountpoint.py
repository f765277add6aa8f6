"""Mountpoint for Amazon S3, with its cache on the local disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.systems.base import Mounted, Source
from bench.systems.serving import Peer, program, serving, version_of

HOW = (
    "install https://s3.amazonaws.com/mountpoint-s3-release/latest/x86_64/mount-s3.deb (or arm64), "
    "see https://github.com/awslabs/mountpoint-s3"
)


class MountpointS3(Peer):
    name = "mountpoint-s3"
    title = "Mountpoint for S3"

    def check(self) -> str:
        return version_of([program("mount-s3", HOW), "--version"], r"(\d+\.\d+\S*)")

    def flags(self) -> list[str]:
        return ["--read-only", "--force-path-style", "--region", "us-east-1", "--metadata-ttl", "indefinite"]

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        mountpoint = place / "mnt"
        (place / "cache").mkdir()
        command = [program("mount-s3", HOW), source.bucket, str(mountpoint), "--foreground", *self.flags()]
        command += ["--prefix", f"{source.prefix}/", "--endpoint-url", source.endpoint]
        command += ["--cache", str(place / "cache"), "--max-cache-size", str(max(1, cache_bytes >> 20))]
        environment = {"AWS_ACCESS_KEY_ID": source.key, "AWS_SECRET_ACCESS_KEY": source.secret}
        with serving(command, mountpoint, place, environment) as pids:
            yield Mounted(system=self.name, path=mountpoint, source=source, place=place, facts={}, pids=pids)
