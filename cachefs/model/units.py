"""Sizes and durations as people write them."""

from __future__ import annotations

import re

from cachefs.model.errors import ConfigError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SIZE_UNITS = {"": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|)", re.IGNORECASE)


def parse_size(key: str, text: str) -> int:
    """Bytes from "4096", "8M", "8MiB", "1.5G"; units are powers of 1024. `key` names the setting in the error.

    Raises ConfigError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(key, text, "a size such as 4096, 128K, 8M, 1.5G or 2TiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def format_size(size_bytes: float) -> str:
    """ "110.0 KiB"; whole bytes below 1 KiB."""
    if abs(size_bytes) < KiB:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def write_size(size_bytes: int) -> str:
    """What `parse_size` reads, exactly and as short as it gets: "8M", "1536K", "4097"."""
    for unit, factor in (("T", TiB), ("G", GiB), ("M", MiB), ("K", KiB)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def format_duration(seconds: float) -> str:
    """What `parse_duration` reads: "7200s", "0.25s"."""
    return f"{seconds:.6f}".rstrip("0").rstrip(".") + "s"


def parse_duration(key: str, text: str) -> float:
    """Seconds from "60", "500ms", "30s", "5m", "2h", "1d". `key` names the setting in the error.

    Raises ConfigError.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(key, text, "a duration such as 500ms, 30s, 5m, 2h or 1d")
    return float(match[1]) * _DURATION_UNITS[match[2].lower()]
