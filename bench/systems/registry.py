"""Which file systems there are."""

from __future__ import annotations

from collections.abc import Mapping

from bench.systems.base import System
from bench.systems.cachefs import Cachefs
from bench.systems.cachefs_pyfuse3 import CachefsPyfuse3
from bench.systems.juicefs import JuiceFS
from bench.systems.mountpoint import MountpointS3
from bench.systems.native import Native
from bench.systems.rclone import Rclone
from bench.systems.s3fs import S3fs

SYSTEMS: Mapping[str, type[System]] = {
    each.name: each for each in (Native, Cachefs, CachefsPyfuse3, Rclone, S3fs, JuiceFS, MountpointS3)
}
"""In the order in which reports show them."""
