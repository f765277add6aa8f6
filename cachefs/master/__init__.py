"""The master service: the namespace over the under-stores, the block map, and what workers report."""

from cachefs.master.config import MasterConfig
from cachefs.master.master import run_master

__all__ = ["MasterConfig", "run_master"]
