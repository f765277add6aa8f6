"""`--keep-free`: a tier on a disk that others use as well leaves them their part of it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from cachefs.fuse import probe
from cachefs.model import KiB, MiB
from cachefs.testing.disks import small_disk
from cachefs.testing.processes import mountpoint_below, running

pytestmark = [
    pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse"),
    pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is missing (package e2fsprogs)"),
]

SIZE = 2 * MiB
FILES = {f"{number:02}": random.Random(number).randbytes(SIZE) for number in range(20)}


@pytest.mark.parametrize("promote", ["if-space", "always"])
def test_the_part_that_is_to_stay_free_does(tmp_path: Path, promote: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    for name, content in FILES.items():
        (tmp_path / "data" / name).write_bytes(content)
    with small_disk(tmp_path, 48 * MiB) as disk, mountpoint_below(tmp_path) as mountpoint:
        tier = f"ssd:{disk / 'tier'}:1G"  # much more than there is
        flags = ["--promote", promote, "--keep-free", "50%", "--page-size", str(256 * KiB), "--ufs-option", "settle=0"]
        where = ["--state-dir", tmp_path / "state", "--tier", tier, *flags]
        with running("up", (tmp_path / "data").as_uri(), mountpoint, *where):
            for name, content in FILES.items():
                assert (mountpoint / name).read_bytes() == content
            assert "a tier is larger than what its disk has for it" in capfd.readouterr().err
            status = os.statvfs(disk)
            kept = sum(path.stat().st_size for path in (disk / "tier/sealed").glob("??/*"))
            assert status.f_bavail >= status.f_blocks // 2
            # And no more than that is left unused.
            assert (
                kept
                >= status.f_blocks * status.f_frsize // 2
                - status.f_frsize * (status.f_bfree - status.f_bavail)
                - 4 * SIZE
            )
            assert 4 * SIZE <= kept < len(FILES) * SIZE
