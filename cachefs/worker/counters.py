"""What the worker did since it started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    under_store_bytes: int = 0
    under_store_reads: int = 0
    pages_fetched: int = 0
    blocks_sealed: int = 0
    changed: int = 0
    corrupt: int = 0
    not_admitted: int = 0
    files_ahead: int = 0
    peer_bytes: int = 0
    peer_reads: int = 0
    peer_failures: int = 0
    served_bytes: int = 0
    served_reads: int = 0
    leases: int = 0
    drops: int = 0
