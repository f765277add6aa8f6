"""What an adapter of a file system has to do."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec


class Missing(Exception):
    """The system cannot be had here; the message says how to install it."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A data set: the same files as objects and natively."""

    endpoint: str
    key: str
    secret: str
    bucket: str
    prefix: str
    """No slash at its ends; objects are PREFIX/PATH."""
    native: Path
    """PATH below it, on the medium that the caches lie on."""
    size_bytes: int
    files: int
    traffic_url: str
    """Where the server tells what it has sent (see `bench.server`)."""


class Mounted(msgspec.Struct, frozen=True, kw_only=True):
    """A mounted data set. Goes to the measuring process as JSON."""

    system: str
    path: Path
    """The data set's files are at and below it."""
    source: Source
    place: Path
    """Directory of this mount: cache, log, state."""
    facts: dict[str, str]
    """What the adapter needs to find its processes again, such as {"master": ADDRESS}."""
    pids: list[int]
    """Processes that serve it, for what they use of the processor and memory."""


class System(ABC):
    """A kind of file system. Made without arguments; knows nothing of a mount but what `Mounted` says."""

    name: str
    title: str
    """For tables and plots."""

    @abstractmethod
    def check(self) -> str:
        """Its version. Raises Missing."""

    @abstractmethod
    def flags(self) -> list[str]:
        """How it is started, without paths, for the report."""

    @abstractmethod
    def mounted(self, source: Source, place: Path, cache_bytes: int) -> AbstractContextManager[Mounted]:
        """Mount with an empty cache in `place`, which is empty and on the medium of the run; ready when entered.

        Ends all of its processes and takes the mount away, whatever happened, in bounded time. Raises Missing, or
        RuntimeError with the end of the log when it does not come up.
        """

    def settle(self, mounted: Mounted) -> None:
        """Return when all that was read so far is in the cache on the medium, as far as the system can tell. Raises
        TimeoutError.
        """
        os.sync()

    def explain(self, mounted: Mounted) -> Iterator[tuple[str, float]]:
        """Counters of its own that explain figures: name, value."""
        return iter(())
