"""What a client can be told."""

from __future__ import annotations

from dataclasses import dataclass

from cachefs.net import Address


@dataclass(frozen=True)
class ClientConfig:
    master: Address
    worker_socket: str | None = None
    """None: the socket of the worker that the master knows on this node."""
    with_worker: bool = True
    """False: names and attributes only."""
    max_names: int = 500_000
    """Names and attributes kept, about 1000 bytes each."""
    patience_s: float = 30.0
    """How long a lost master or worker is waited for before the caller gets an error."""
    first_contact_s: float = 30.0
    """The same at the start, when it may still be starting itself."""
