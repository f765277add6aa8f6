"""Decisions without side effects: what to evict, what to admit, what to fetch ahead. No I/O and no clock."""

from cachefs.policy.admission import Promote, admits
from cachefs.policy.file_order import FileOrder, FileOrderConfig, Run
from cachefs.policy.neighbours import Neighbours
from cachefs.policy.readahead import Readahead, ReadaheadConfig
from cachefs.policy.sieve import Sieve

__all__ = [
    "FileOrder",
    "FileOrderConfig",
    "Neighbours",
    "Promote",
    "Readahead",
    "ReadaheadConfig",
    "Run",
    "Sieve",
    "admits",
]
