"""Where under-stores are attached."""

from __future__ import annotations

from typing import NamedTuple

from cachefs.model import ConfigError, Ino


class Mount(NamedTuple):
    mount_id: int
    path: str
    """Absolute in the namespace, normalised; "/" is the root."""
    origin: str
    """Of the under-store; part of every content key below this mount."""
    root_ino: Ino


def normalise_mount_path(path: str) -> str:
    """ "/a//b/" -> "/a/b". Raises ConfigError for a relative path, "." and ".."."""
    parts = [part for part in path.split("/") if part]
    if not path.startswith("/") or "." in parts or ".." in parts:
        raise ConfigError("--mount", path, "an absolute path of the namespace, such as / or /datasets/imagenet")
    return "/" + "/".join(parts)


def check_mounts(paths: list[str]) -> None:
    """Raises ConfigError when one mount lies inside another: names of the outer one would be hidden by it."""
    for path in paths:
        for other in paths:
            if path is not other and (path + "/").startswith(other.rstrip("/") + "/"):
                raise ConfigError("--mount", path, f"a path outside of the other mounts; {other} is mounted above it")
