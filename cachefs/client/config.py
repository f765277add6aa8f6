"""What a client can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachefs.model import ConfigError, format_duration
from cachefs.net import Address, Security
from cachefs.wire.messages import PromoteMode

MAX_TIMEOUT_S = 365 * 24 * 3600.0


@dataclass(frozen=True)
class Timeouts:
    """For how many seconds answers are believed, by us and by the kernel. None: the cluster's sync interval."""

    attr_s: float | None = None
    entry_s: float | None = None
    negative_s: float | None = None

    def __post_init__(self) -> None:
        for key in ("attr_s", "entry_s", "negative_s"):
            seconds = getattr(self, key)
            if seconds is not None and not 0 <= seconds <= MAX_TIMEOUT_S:
                raise ConfigError(key.replace("_s", "_timeout"), format_duration(seconds), "0 to 365d")


@dataclass(frozen=True)
class ClientConfig:
    master: Address
    worker_socket: str | None = None
    """None: the socket of the worker that the master knows on this node."""
    security: Security | None = None
    """For TCP, presenting a role."""
    with_worker: bool = True
    """False: names and attributes only."""
    worker_address: Address | None = None
    """Of a worker that goes before all others as long as it is there, on whatever host."""
    anywhere: bool = False
    """Read through the nearest worker of another host where this one has none, or lost it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Where this client is; which worker is the nearest is told by them."""
    look_again_s: float = 30.0
    """How often a better worker is looked for, while the one in use is not that of this host."""
    metadata_cache_entries: int = 1_000_000
    """Names and attributes kept, some 300 bytes each."""
    timeouts: Timeouts = field(default_factory=Timeouts)
    promote: PromoteMode | None = None
    """Whether the worker keeps what is read by this client; None: as the worker was told."""
    patience_s: float = 30.0
    """How long a lost master or worker is waited for before the caller gets an error."""
    first_contact_s: float = 30.0
    """The same at the start, when it may still be starting itself."""
