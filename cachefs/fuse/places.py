"""Which directories a mount must not touch: whoever serves it would wait for itself, for ever."""

from __future__ import annotations

import os
from collections.abc import Iterable

from cachefs.model import ConfigError


def check_apart(mountpoint: str, needed: Iterable[tuple[str, str]], key: str = "mountpoint") -> None:
    """`needed`: (what it is, its directory) of what is used by the processes behind the mount. Symbolic links are
    resolved; the mountpoint must be none whose server hangs.

    Raises ConfigError if the mountpoint is one of them, hides one, or lies in one.
    """
    resolved = os.path.realpath(mountpoint)
    for what, directory in needed:
        other = os.path.realpath(directory)
        if other == resolved:
            how = "is"
        elif _lies_in(other, resolved):
            how = "would hide"
        elif _lies_in(resolved, other):
            how = "lies in"
        else:
            continue
        accepted = (
            f"a directory apart from {what}: it {how} {other}, and whoever reads it through the mount would wait for "
            "the mount itself, for ever"
        )
        raise ConfigError(key, mountpoint, accepted)


def _lies_in(path: str, directory: str) -> bool:
    return os.path.commonpath((path, directory)) == directory
