"""Blocks on local media: partial and sealed files, their checksums, capacity and eviction. Knows no network."""

from cachefs.store.config import KeepFree, TierConfig, disk_bytes, parse_keep_free, parse_tier
from cachefs.store.health import HealthConfig, TierState
from cachefs.store.layout import running_boot_id
from cachefs.store.partial import NotCompleteError, Partial
from cachefs.store.pieces import PageAt, PieceSums
from cachefs.store.pinned import PinnedKeys
from cachefs.store.quota_keys import QuotaKeys
from cachefs.store.quotas import Quotas, Rule, Use
from cachefs.store.reader import SealedReader, a_file_of_tier
from cachefs.store.store import Store, open_store
from cachefs.store.sums import page_checksum
from cachefs.store.tier import Tier, TierStatus

__all__ = [
    "HealthConfig",
    "KeepFree",
    "NotCompleteError",
    "PageAt",
    "Partial",
    "PieceSums",
    "PinnedKeys",
    "QuotaKeys",
    "Quotas",
    "Rule",
    "SealedReader",
    "Store",
    "Tier",
    "TierConfig",
    "TierState",
    "TierStatus",
    "Use",
    "a_file_of_tier",
    "disk_bytes",
    "open_store",
    "page_checksum",
    "parse_keep_free",
    "parse_tier",
    "running_boot_id",
]
