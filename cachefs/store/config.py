"""What a tier is, as a person configures it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from cachefs.model import ConfigError, GiB, format_size, parse_size, write_size

TierKind = Literal["mem", "ssd"]

ACCEPTED = "KIND:PATH:CAPACITY with kind mem or ssd and an absolute path, such as ssd:/var/cache/cachefs:500G"

MOST_KEPT_FREE_PERCENT = 90

MIN_CAPACITY_PAGES = 4
"""Blocks larger than a quarter of a tier are not admitted, so a tier below four pages would never hold anything."""


@dataclass(frozen=True)
class TierConfig:
    """One directory on one medium."""

    kind: TierKind
    """`mem` must lie on tmpfs and is never synced; `ssd` is any other local file system."""
    path: str
    capacity_bytes: int
    """Allocated bytes the tier may hold, checksums included."""
    free_floor_bytes: int = 0
    """Bytes of the file system that stay free for others, whoever filled it. 0 switches the floor off."""
    idle_after_s: float = 1800.0
    """A block unread for so long counts as free: today's job is not starved by yesterday's."""


def default_free_floor(capacity_bytes: int) -> int:
    """1 GiB keeps a node's other users of the disk alive; a tenth of a small tier is plenty for a try-out."""
    return min(GiB, capacity_bytes // 10)


@dataclass(frozen=True)
class KeepFree:
    """What stays free for others on the file system of a tier: so many bytes, or such a part of it."""

    size_bytes: int = 0
    percent: int = 0

    def __str__(self) -> str:
        return f"{self.percent}%" if self.percent else write_size(self.size_bytes)

    def on_disk_of(self, path: str) -> int:
        """Bytes. Raises ConfigError as `disk_bytes`."""
        return disk_bytes(path) * self.percent // 100 if self.percent else self.size_bytes


def disk_bytes(path: str) -> int:
    """The size of the file system that a directory is on, or would be. Raises ConfigError when nothing is known."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise ConfigError("--tier", path, f"a directory that can be looked at ({error.strerror})") from error
    return status.f_blocks * status.f_frsize


def parse_keep_free(key: str, text: str) -> KeepFree:
    """`20G` or `15%`. Raises ConfigError."""
    accepted = "a size such as 20G, or a part of the file system from 1% to 90%"
    if text.endswith("%"):
        number = text.removesuffix("%")
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= MOST_KEPT_FREE_PERCENT):
            raise ConfigError(key, text, accepted)
        return KeepFree(percent=int(number))
    try:
        return KeepFree(parse_size(key, text))
    except ConfigError as error:
        raise ConfigError(key, text, accepted) from error


def parse_tier(text: str, key: str = "--tier", free_floor_bytes: int | None = None) -> TierConfig:
    """`ssd:/var/cache/x:10G` as a TierConfig. The path may contain colons: the first and the last one count.

    `key` names the setting in errors. Raises ConfigError.
    """
    kind, first_colon, rest = text.partition(":")
    path, last_colon, capacity = rest.rpartition(":")
    if not first_colon or not last_colon or kind not in get_args(TierKind) or not os.path.isabs(path):
        raise ConfigError(key, text, ACCEPTED)
    try:
        capacity_bytes = parse_size(key, capacity)
    except ConfigError as error:
        raise ConfigError(key, text, f"{ACCEPTED}; the capacity is {error.accepted}") from error
    if capacity_bytes <= 0:
        raise ConfigError(key, text, f"{ACCEPTED}; the capacity is above 0")
    floor = default_free_floor(capacity_bytes) if free_floor_bytes is None else free_floor_bytes
    return TierConfig("mem" if kind == "mem" else "ssd", os.path.normpath(path), capacity_bytes, floor)


def check_capacity(config: TierConfig, page_size: int, key: str = "--tier") -> None:
    """Raises ConfigError for a tier that could not hold a few pages of that size."""
    minimum = MIN_CAPACITY_PAGES * page_size
    if config.capacity_bytes < minimum:
        raise ConfigError(
            key,
            f"{config.kind}:{config.path}:{config.capacity_bytes}",
            f"a capacity of at least {format_size(minimum)}, {MIN_CAPACITY_PAGES} pages of {format_size(page_size)}",
        )


def check_medium(config: TierConfig, tier_fd: int, key: str = "--tier") -> None:
    """Raises ConfigError when a `mem` tier does not lie on tmpfs.

    What is not synced must not survive a reboot, and what survives one must be synced.
    """
    if config.kind == "mem" and filesystem_type(tier_fd) != "tmpfs":
        raise ConfigError(
            key,
            f"mem:{config.path}",
            "a directory on tmpfs for a mem tier; this one lies on another file system, configure it as ssd",
        )


def filesystem_type(fd: int) -> str | None:
    """The type of the file system a descriptor lies on, by /proc/self/mountinfo; None where it is not listed.

    Format: proc(5), "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw".
    """
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    # Lines end with a newline only: a carriage return may be part of a name.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as mounts:
        for line in mounts:
            mount, _, filesystem = line.partition(" - ")
            if mount.split(" ", 3)[2] == wanted:
                return filesystem.split(" ", 1)[0]
    return None
