"""Decisions without side effects: what to evict, what to admit, what to fetch ahead. No I/O and no clock."""

from cachefs.policy.admission import Promote, admits
from cachefs.policy.file_order import FileOrder, FileOrderConfig, Run
from cachefs.policy.idle import IdleGroups
from cachefs.policy.neighbours import Neighbours
from cachefs.policy.placement import HomeCandidate, rank_homes, spread_pages
from cachefs.policy.quota import Shares, fits_quota
from cachefs.policy.rate import Rate
from cachefs.policy.readahead import Readahead, ReadaheadConfig
from cachefs.policy.sieve import Sieve
from cachefs.policy.topology import FARTHEST, LEVELS, Place, distance, equally_near, nearest, parse_labels

__all__ = [
    "FARTHEST",
    "LEVELS",
    "FileOrder",
    "FileOrderConfig",
    "HomeCandidate",
    "IdleGroups",
    "Neighbours",
    "Place",
    "Promote",
    "Rate",
    "Readahead",
    "ReadaheadConfig",
    "Run",
    "Shares",
    "Sieve",
    "admits",
    "distance",
    "equally_near",
    "fits_quota",
    "nearest",
    "parse_labels",
    "rank_homes",
    "spread_pages",
]
