"""What a worker can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachefs.model import MiB
from cachefs.net import Address, Security
from cachefs.policy import Promote, ReadaheadConfig
from cachefs.store import TierConfig


@dataclass(frozen=True)
class WorkerConfig:
    name: str
    """Unique in the cluster; the same after a restart."""
    master: Address
    listen: Address
    """For other workers and for tools."""
    socket: str
    """Path of the unix socket for mounts on this node."""
    tiers: tuple[TierConfig, ...]
    """The fastest first."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Where it is, such as {"rack": "r7", "zone": "a"}: nearer workers are read from first."""
    advertise: str = ""
    """HOST:PORT at which other workers reach it; empty: `listen`."""
    security: Security | None = None
    """For TCP, presenting the role of a worker. None: as if there were no others."""
    promote: Promote = Promote.IF_SPACE
    readahead: ReadaheadConfig = field(default_factory=ReadaheadConfig)
    demand_slots: int = 16
    """Reads of the under-store in flight that somebody waits for; each holds a page of memory, together no more than
    8 MiB each (see `Slots`)."""
    background_slots: int = 4
    """The same for what nobody waits for yet: read-ahead and filling. Its own, so that it never delays a reader."""
    load_slots: int = 8
    """The same for what `cachefs load` asks for."""
    peer_slots: int = 16
    """Reads of other workers in flight."""
    peer_bytes: int = 64 * MiB
    """Memory for those: small files need many at once, of whole pages a few fill any network."""
    ahead_slots: int = 16
    """The same for small files fetched ahead of whoever opens those of a directory in order."""
    files_ahead: int = 64
    """At most, of such files; 0 = none."""
    ahead_file_bytes: int = 2 * MiB
    """Larger files are not fetched ahead as a whole: round trips matter less to them."""
    ahead_bytes: int = 64 * MiB
    """At most, of files fetched ahead at a time."""
    read_through_bytes: int = 32 * MiB
    """Of pages kept in memory for content that is not admitted: enough for a few sequential readers."""
    scrub_bytes_per_s: int = 8 * MiB
    """At which all that is cached is read and compared again and again; 0 = never."""
    idle_partial_s: float = 60.0
    """A partial that nobody asked for so long is closed; what it has stays on disk."""
    removed_store_idle_s: float = 60.0
    """An under-store that was removed is closed when nobody has read from it for so long: what is open reads on."""
