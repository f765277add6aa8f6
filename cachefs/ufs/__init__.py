"""Under-stores: the object stores and file systems that own the data. The only importer of fsspec and its kin."""

from cachefs.ufs.base import UnderStore
from cachefs.ufs.health import StoreHealth
from cachefs.ufs.local import directory_of, likely_origin
from cachefs.ufs.open import open_under_store
from cachefs.ufs.retry import at_most

__all__ = ["StoreHealth", "UnderStore", "at_most", "directory_of", "likely_origin", "open_under_store"]
