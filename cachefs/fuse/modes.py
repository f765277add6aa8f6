"""How files are opened on one mount: what was asked for, what this kernel and these tiers can do, and why."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cachefs.fuse.backing import BackingRegistry, PassthroughUnavailable
from cachefs.fusewire import Negotiated
from cachefs.model import ConfigError
from cachefs.store import a_file_of_tier

logger = logging.getLogger(__name__)

NO_PASSTHROUGH = "the kernel does not offer passthrough: it is older than 6.9, or built without it"
PASSTHROUGH_NEEDS_ROOT = "passthrough needs root (CAP_SYS_ADMIN)"


class OpenMode(enum.Enum):
    AUTO = "auto"
    """Passthrough where the kernel and the tier can do it, cached elsewhere."""
    PASSTHROUGH = "passthrough"
    """The same, and an error at the start if a tier or the kernel cannot."""
    CACHED = "cached"
    """The kernel caches pages and asks us for what it has not got."""
    NO_OPEN = "no-open"
    """The kernel opens files without asking us, and keeps their pages. For data that never changes: a file whose
    object changed is an error (ESTALE) for whoever had looked its name up before, until that has expired."""


class Driver(enum.Enum):
    """What speaks to the kernel."""

    KERNEL = "kernel"
    """A session of our own on /dev/fuse."""
    PYFUSE3 = "pyfuse3"
    """libfuse, by the package pyfuse3: cached mode only, and every READ comes to us."""


@dataclass(frozen=True)
class ChosenMode:
    mode: OpenMode
    """Never AUTO."""
    why: str
    """One sentence, for the person who starts the mount."""
    tiers: tuple[str, ...] = ()
    """Paths of those whose files the kernel reads by itself."""
    notes: tuple[str, ...] = ()
    """What else is not as it would be elsewhere: a sentence each."""

    def __str__(self) -> str:
        return f"{self.mode.value} ({self.why})"


def choose_mode(
    wanted: OpenMode,
    agreed: Negotiated | None,
    backings: BackingRegistry,
    tiers: Sequence[str],
    *,
    sys_admin: bool,
    why_no_tiers: str = "there is no worker on this node",
) -> ChosenMode:
    """Decide, after INIT. `agreed`: None if the driver knows of nothing but cached mode.

    Raises ConfigError if passthrough or no-open was insisted on and cannot be had.
    """
    if wanted is OpenMode.CACHED:
        return ChosenMode(OpenMode.CACHED, "as asked for")
    if agreed is None:
        return ChosenMode(OpenMode.CACHED, "pyfuse3 cannot hand files to the kernel: every READ comes to us")
    if wanted is OpenMode.NO_OPEN:
        if not agreed.no_open:
            raise ConfigError("open_mode", wanted.value, "another mode: this kernel does not open files by itself")
        return ChosenMode(OpenMode.NO_OPEN, "as asked for; for data that does not change")
    able: list[str] = []
    reasons: list[str] = []
    if not agreed.passthrough:
        reasons.append(NO_PASSTHROUGH)
    elif not sys_admin:
        reasons.append(PASSTHROUGH_NEEDS_ROOT)
    elif not tiers:
        reasons.append(why_no_tiers)
    else:
        for tier in tiers:
            reason = _why_not(backings, tier)
            if reason is None:
                able.append(tier)
            else:
                reasons.append(f"{tier}: {reason}")
    if wanted is OpenMode.PASSTHROUGH and (reasons or not able):
        raise ConfigError("open_mode", wanted.value, f"auto or cached here: {'; '.join(reasons)}")
    if not able:
        return ChosenMode(OpenMode.CACHED, "; ".join(reasons))
    why = "the kernel reads cached files by itself"
    if reasons:
        why += f", except of {'; '.join(reasons)}"
    return ChosenMode(OpenMode.PASSTHROUGH, why, tuple(able))


def _why_not(backings: BackingRegistry, tier: str) -> str | None:
    """Tries it, with a file of the tier that is always there."""
    try:
        fd = os.open(a_file_of_tier(tier), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    try:
        backings.release(backings.register(fd))
    except PassthroughUnavailable as error:
        return error.reason
    finally:
        os.close(fd)
    return None
