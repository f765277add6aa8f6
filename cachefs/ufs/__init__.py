"""Under-stores: the object stores and file systems that own the data. The only importer of fsspec and its kin."""

from cachefs.ufs.base import UnderStore
from cachefs.ufs.open import open_under_store

__all__ = ["UnderStore", "open_under_store"]
