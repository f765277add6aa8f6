"""What a mount counts while it answers the kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OperationCounts:
    """Since the mount began."""

    passthrough_opens: int = 0
    cached_opens: int = 0
    read_bytes: int = 0
    """Of answers to READs: what the kernel did not read by itself."""
    changed_names: int = 0
    changed_everything: int = 0
