"""Waiting for a system's cache, from a process that knows of it only what `Mounted` says."""

from __future__ import annotations

from bench.systems.base import Mounted
from bench.systems.registry import SYSTEMS


def settle(mounted: Mounted) -> None:
    """See `System.settle`. Raises TimeoutError."""
    SYSTEMS[mounted.system]().settle(mounted)
