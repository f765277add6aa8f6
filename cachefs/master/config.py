"""What a master can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from cachefs.model import DEFAULT_BLOCK_SIZE, DEFAULT_PAGE_SIZE, ConfigError, Geometry, check_page_size
from cachefs.net import Address, Security


@dataclass(frozen=True)
class MasterConfig:
    """Raises ConfigError for values out of range."""

    data_dir: str
    listen: Address
    mounts: tuple[tuple[str, str], ...]
    """(path of the namespace, URL of the under-store)."""
    ufs_options: dict[str, str] = field(default_factory=dict, repr=False)
    """For every mount. Holds credentials."""
    cluster_id: str = "cachefs"
    """Tiers belong to a cluster, and are refused by workers of another one; it outlives the loss of the database."""
    sync_interval_s: float = 60.0
    """How long names and attributes are believed: short enough to see new data, long enough for an epoch's look-ups."""
    security: Security | None = None
    """None: whoever connects may ask everything."""
    block_size: int | None = None
    page_size: int | None = None
    """None: what the database has, or else the defaults. They cannot be changed afterwards."""

    def __post_init__(self) -> None:
        if self.sync_interval_s < 0 and self.sync_interval_s != -1:
            raise ConfigError("--sync-interval", self.sync_interval_s, "a duration, 0 for always, or -1 for never")
        if self.page_size is not None:
            check_page_size(self.page_size)

    def settle_geometry(self, known: Geometry | None) -> Geometry:
        """The geometry of this namespace, given what its database has. Raises ConfigError for a change."""
        geometry = known or Geometry(self.block_size or DEFAULT_BLOCK_SIZE, self.page_size or DEFAULT_PAGE_SIZE)
        for key, wanted, has in (
            ("--block-size", self.block_size, geometry.block_size),
            ("--page-size", self.page_size, geometry.page_size),
        ):
            if wanted is not None and wanted != has:
                raise ConfigError(key, wanted, f"{has}, which this namespace was made with")
        if geometry.block_size % geometry.page_size:
            raise ConfigError("--block-size", geometry.block_size, f"a multiple of the page size {geometry.page_size}")
        return geometry
