"""What the worker did since it started."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachefs.metrics import Times


@dataclass
class Counters:
    under_store_bytes: int = 0
    under_store_reads: int = 0
    pages_fetched: int = 0
    blocks_sealed: int = 0
    changed: int = 0
    corrupt: int = 0
    not_admitted: int = 0
    quota_refused: int = 0
    """Of these, because a quota was used up."""
    files_ahead: int = 0
    peer_bytes: int = 0
    peer_reads: int = 0
    peer_failures: int = 0
    served_bytes: int = 0
    served_reads: int = 0
    leases: int = 0
    drops: int = 0
    hits: int = 0
    """Requests of readers for what was here already, and `misses`: for what was not, or not all of it."""
    misses: int = 0
    local_bytes: int = 0
    """Asked for by hits."""
    under_store_times: Times[str] = field(default_factory=Times)
    """By kind of read: a "range" of an object, or a small "file" as a whole."""
    peer_times: Times[str] = field(default_factory=Times)
    """By how: a block that is "held", or one that is still fetched ("origin", "home")."""

    def asked(self, length: int, *, is_here: bool) -> None:
        """A reader wants so many bytes."""
        if is_here:
            self.hits += 1
            self.local_bytes += length
        else:
            self.misses += 1
