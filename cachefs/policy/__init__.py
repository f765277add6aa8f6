"""Decisions without side effects: what to evict, what to admit, what to fetch ahead. No I/O and no clock."""

from cachefs.policy.admission import Promote, admits
from cachefs.policy.readahead import Readahead, ReadaheadConfig
from cachefs.policy.sieve import Sieve

__all__ = ["Promote", "Readahead", "ReadaheadConfig", "Sieve", "admits"]
