"""What the numbers were measured on."""

from __future__ import annotations

import os
from pathlib import Path


def medium_of(path: Path) -> str:
    """The type of the file system a directory lies on."""
    device = os.stat(path).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return filesystem.split()[0]
    return "an unknown file system"
