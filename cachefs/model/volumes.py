"""Names of volumes."""

from __future__ import annotations

import xxhash

VOLUMES_PATH = "/volumes"
"""Under-stores of volumes are attached in it, at their ids: a directory of the namespace alone."""


def volume_id(name: str) -> str:
    """Follows from the name alone, so that the same volume is found again by whoever forgot that it was made."""
    return f"vol-{xxhash.xxh3_128_hexdigest(name.encode())}"
