"""s3fs-fuse with its cache of whole files (`use_cache`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.systems.base import Mounted, Source
from bench.systems.serving import Peer, program, serving, version_of

HOW = "apt-get install s3fs"
DIRECTORIES_BY_OPTION = (1, 91)
"""Since this version it shows directories that have no object of their own only if it is told to."""


class S3fs(Peer):
    name = "s3fs"
    title = "s3fs-fuse"

    def check(self) -> str:
        return version_of([program("s3fs", HOW), "--version"], r"V?(\d+\.\d+)")

    def flags(self) -> list[str]:
        flags = ["-o", "use_path_request_style", "-o", "use_cache=DIR", "-o", "enable_noobj_cache"]
        flags += ["-o", "kernel_cache", "-o", "ro"]
        # By default the kernel asks for them again after a second.
        flags += ["-o", "attr_timeout=3600", "-o", "entry_timeout=3600"]
        if tuple(map(int, self.check().split("."))) >= DIRECTORIES_BY_OPTION:
            flags += ["-o", "compat_dir"]
        return flags

    @contextmanager
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> Iterator[Mounted]:
        passwords = place / "passwords"
        passwords.touch(mode=0o600)
        passwords.write_text(f"{source.key}:{source.secret}\n")
        mountpoint = place / "mnt"
        (place / "cache").mkdir()
        command = [program("s3fs", HOW), f"{source.bucket}:/{source.prefix}", str(mountpoint), "-f"]
        command += ["-o", f"url={source.endpoint}", "-o", f"passwd_file={passwords}"]
        command += [each.replace("=DIR", f"={place / 'cache'}") for each in self.flags()]
        with serving(command, mountpoint, place) as pids:
            yield Mounted(system=self.name, path=mountpoint, source=source, place=place, facts={}, pids=pids)
