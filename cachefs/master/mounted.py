"""An under-store that is attached to the namespace, from its opening until nobody looks at it any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from cachefs.meta import Mount
from cachefs.model import NotFoundError, StaleError
from cachefs.ufs import StoreHealth, UnderStore, open_under_store

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class MountedStore:
    """An under-store and where it is attached."""

    mount: Mount
    url: str
    options: dict[str, str] = field(repr=False)
    """May hold credentials."""
    ufs: UnderStore
    by_hand: bool = False
    """Attached by `cachefs ufs add`, not by what the master was told at its start."""
    close: Callable[[], None] = lambda: None
    """Called once, when it was removed and nobody looks at it any more."""
    serving_stale: int = 0
    """Looks at this store that failed, so that what was known before was served."""
    health: StoreHealth = field(default_factory=StoreHealth)
    """As looks at it went."""
    is_told: bool = False
    """Whether it is in the log that it fails: an outage is logged once."""
    _users: list[int] = field(default_factory=lambda: [0])
    """How many look at the store as it is open now; in a list, as those who look at the one before count for that."""
    _removed: bool = False
    _let_go: bool = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """It stays open for as long as the block lasts, also if it is removed meanwhile."""
        users, close = self._users, self.close
        users[0] += 1
        try:
            yield
        finally:
            users[0] -= 1
            if not users[0] and (self._let_go or self._users is not users):
                close()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """`in_use`, and how it went is noted."""
        with self.in_use(), self.health.watching():
            yield
        self.well()

    def well(self) -> None:
        """It answered."""
        self.health.answered()
        if self.is_told:
            self.is_told = False
            logger.info("under-store answers again mount=%s", self.mount.path)

    def serve_stale(self, error: Exception) -> None:
        """It failed, and what is known of it is served: counted, and logged once."""
        self.serving_stale += 1
        if isinstance(error, NotFoundError):
            # A root that is gone is no answer of a store that is well.
            self.health.failed(error)
        if not self.is_told:
            self.is_told = True
            logger.warning("under-store fails, serving what is known mount=%s error=%s", self.mount.path, error)

    def check_attached(self) -> None:
        """To be called, without a checkpoint, before what it was found to have is written: names of one that was
        removed would come back. Raises StaleError.
        """
        if self._removed:
            raise StaleError(f"nothing is attached at {self.mount.path} any more")

    def remove(self) -> None:
        """Nothing is to be written for it from now on, until `stay`."""
        self._removed = True

    def stay(self) -> None:
        """That it is removed could not be written: it is not."""
        self._removed = False

    @property
    def is_gone(self) -> bool:
        """It is removed for good."""
        return self._let_go

    def let_go(self) -> None:
        """It is removed for good, and closed as soon as nobody looks at it."""
        self._let_go = True
        if not self._users[0]:
            self.close()

    def reopened(self, url: str, options: dict[str, str], ufs: UnderStore, close: Callable[[], None]) -> None:
        """It is asked with these options from now on. The one before stays open for who looks at it."""
        users, close_before = self._users, self.close
        self.url, self.options, self.ufs, self.close, self._users = url, options, ufs, close, [0]
        if not users[0]:
            close_before()


class Holder:
    """Opens under-stores, and holds each in a task of `nursery` until it is let go of."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.opened = 0
        """How many are open, those among them that are being tried or closed."""
        self._nursery = nursery

    async def open(self, url: str, options: Mapping[str, str]) -> tuple[UnderStore, Callable[[], None]]:
        """The store, and what closes it. Raises ConfigError as `open_under_store`."""
        let_go = trio.Event()
        ufs: UnderStore = await self._nursery.start(self._hold, url, options, let_go)
        return ufs, let_go.set

    async def _hold(
        self, url: str, options: Mapping[str, str], let_go: trio.Event, task_status: trio.TaskStatus[UnderStore]
    ) -> None:
        opened = False
        try:
            async with open_under_store(url, options) as ufs:
                opened = True
                self.opened += 1
                task_status.started(ufs)
                await let_go.wait()
        finally:
            self.opened -= opened
