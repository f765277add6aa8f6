"""What a container may take of memory, and whether the tiers in memory fit in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cachefs.model import ConfigError, MiB, format_size
from cachefs.store import TierConfig

WORKER_BYTES = 512 * MiB
"""What a worker may take besides its tiers."""
_CGROUPS = Path("/sys/fs/cgroup")
_NONE_FROM = 1 << 60
"""Version 1 has no word for "no limit", but a number."""


def memory_limit(groups: str = "", root: Path = _CGROUPS) -> int | None:
    """Bytes that this process and those in its cgroup may take, page cache and tmpfs included; None: no limit.

    By the cgroup of either version, see cgroups(7); `groups` is what /proc/self/cgroup says.
    """
    limits = list[int]()
    for line in (groups or Path("/proc/self/cgroup").read_text()).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            limits += _limits(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "memory", path, "memory.limit_in_bytes")
    return min((limit for limit in limits if limit < _NONE_FROM), default=None)


def _limits(root: Path, path: str, name: str) -> list[int]:
    """Of a group and all above it. In a container its path may be one outside, and the root is its own group."""
    within = PurePosixPath(path.lstrip("/"))
    found = []
    for each in (within, *within.parents):
        try:
            text = (root / each / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return found


def check_memory_tiers(tiers: Sequence[TierConfig], limit: int | None) -> None:
    """What lies on tmpfs counts for the worker that wrote it, and cannot be reclaimed: with a lower limit the OOM
    killer would come when the tier fills up.

    Raises ConfigError.
    """
    in_memory = [tier for tier in tiers if tier.kind == "mem"]
    wanted = sum(tier.capacity_bytes for tier in in_memory)
    if limit is None or not wanted or wanted + WORKER_BYTES <= limit:
        return
    most = max(0, limit - WORKER_BYTES)
    value = " ".join(f"mem:{tier.path}:{format_size(tier.capacity_bytes)}" for tier in in_memory)
    accepted = (
        f"mem tiers of up to {format_size(most)} together: the memory limit of this container or service is"
        f" {format_size(limit)}, of which the worker needs {format_size(WORKER_BYTES)}"
    )
    raise ConfigError("--tier", value, accepted)
