"""The under-stores this worker has open: those of the master's table, as it is told of them, until no mount uses them.

    told of (registration, or asked for)  -> opened, in a task of its own that holds it
    other options now                     -> opened anew; the one before is closed after the reads under way with it
    taken out of the master's table       -> nobody finds it here any more; who has it reads on, and it is closed when
                                             nobody has read from it for a while
    another namespace                     -> the same, of all of them

Opening and closing are the task's alone: a store that hangs in either holds up nobody.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from cachefs.model import CachefsError, LogLimiter, without_credentials
from cachefs.ufs import StoreHealth, UnderStore, open_under_store
from cachefs.wire.messages import StoreInfo, StoresInUse
from cachefs.worker.open_store import OpenStore

logger = logging.getLogger(__name__)
_limited = LogLimiter(logger)

_ASK_AGAIN_S = 5.0
"""Between two questions whether an under-store that refuses has other options now; also how long an answer may take."""

_OPEN_S = 10.0
"""How long a store that is just opened is waited for: a path of this machine may be on a file server that hangs."""


class _Begun(NamedTuple):
    """A store that is being opened, or is open."""

    info: StoreInfo
    done: trio.Event
    give_up: float
    scope: trio.CancelScope
    """Of the task that holds it: cancelled, it closes it, or ends to open it."""


class Stores:
    """`ask` is the master's list of all that are attached, asked for within so many seconds; it raises CachefsError.
    `nursery` holds the stores until the worker ends. One that was taken away stays open until nobody has read from it
    for `removed_idle_s` seconds.
    """

    def __init__(
        self, ask: Callable[[float], Awaitable[Sequence[StoreInfo]]], nursery: trio.Nursery, removed_idle_s: float
    ) -> None:
        self.opened = 0
        """How many are open, those among them that are being closed, or are to be."""
        self.health: dict[str, StoreHealth] = {}
        """By origin, of those that were ever read from and are open."""
        self._ask = ask
        self._nursery = nursery
        self._removed_idle_s = removed_idle_s
        self._open: dict[int, OpenStore] = {}
        self._begun: dict[int, _Begun] = {}
        """Those that are open, too, and what is opened in their place; but for what could not be opened."""
        self._leaving: set[OpenStore] = set()
        """Taken away, and open yet."""
        self._told: StoresInUse | None = None
        """By the master, since this worker registered last."""
        self._asking = trio.Lock()
        self._asked_at = -math.inf
        """When the master was last asked for options because a store refused or did not answer."""

    def find(self, store_id: int) -> OpenStore | None:
        """One that is open and in use by a mount, as far as is known."""
        return self._open.get(store_id)

    # ---- as the master tells ---------------------------------------------------------------------------------------

    def registered(self, stores: Sequence[StoreInfo]) -> None:
        """These are all that are attached now, by a master that this worker has just registered with."""
        self._told = None
        self._keep_only({each.store_id for each in stores})

    def in_use(self, told: StoresInUse) -> bool:
        """Those that are attached now, as the master tells when that changes. Returns whether some have got other
        options, which are to be asked for.
        """
        before, self._told = self._told, told
        self._keep_only({each for each in (*self._begun, *self._open) if not self._is_gone(each)})
        return before is not None and before.renewed != told.renewed

    def _is_gone(self, store_id: int) -> bool:
        """Whether it was taken out of the master's table: for good, as numbers are never used again."""
        return self._told is not None and store_id <= self._told.newest and store_id not in self._told.store_ids

    def forget(self) -> None:
        """Their numbers mean nothing any more."""
        self._told = None
        self._keep_only(set())

    def _keep_only(self, store_ids: set[int]) -> None:
        for store_id in (self._begun.keys() | self._open.keys()) - store_ids:
            begun, store = self._begun.pop(store_id, None), self._open.pop(store_id, None)
            if begun is not None and not begun.done.is_set():
                # It is being opened, maybe in the place of one that is open.
                begun.scope.cancel()
            if store is not None:
                self._leaving.add(store)
                self._nursery.start_soon(self._leave, store)

    async def _leave(self, store: OpenStore) -> None:
        logger.info("under-store is removed, it is closed when nobody reads from it origin=%s", store.origin)
        await store.close_when_unused(self._removed_idle_s)
        self._leaving.discard(store)
        if not any(each.origin == store.origin for each in (*self._open.values(), *self._leaving)):
            # What is wrong with it is nobody's business any more.
            self.health.pop(store.origin, None)

    # ---- opening ---------------------------------------------------------------------------------------------------

    async def add(self, stores: Sequence[StoreInfo], wanted: int | None = None) -> None:
        """Open those that are not open yet, and those that have other options now; and wait for them, or for that one
        alone; not for one that hangs.
        """
        for store, begun in self._begin(stores):
            if wanted not in (None, store.store_id):
                continue
            with trio.move_on_at(begun.give_up):
                await begun.done.wait()
            if not begun.done.is_set():
                url = without_credentials(store.url)
                _limited.log(logging.WARNING, url, "under-store is not opened yet, it hangs url=%s", url)

    def renew(self, stores: Sequence[StoreInfo]) -> None:
        """Some of these have other options now: of those that are open, they are put in place in the background."""
        self._begin([each for each in stores if each.store_id in self._begun])

    def _begin(self, stores: Sequence[StoreInfo]) -> list[tuple[StoreInfo, _Begun]]:
        found = []
        for store in stores:
            if self._is_gone(store.store_id):
                # This answer is older than what was told.
                continue
            begun = self._begun.get(store.store_id)
            if begun is None or begun.info != store:
                begun = _Begun(store, trio.Event(), trio.current_time() + _OPEN_S, trio.CancelScope())
                self._begun[store.store_id] = begun
                self._nursery.start_soon(self._hold, store, begun)
            found.append((store, begun))
        return found

    async def _hold(self, store: StoreInfo, begun: _Begun) -> None:
        url = without_credentials(store.url)
        opened = False
        try:
            with begun.scope:
                async with open_under_store(store.url, store.options) as ufs:
                    opened = True
                    self.opened += 1
                    if self._begun.get(store.store_id) is not begun or not self._take(store, ufs, begun.scope.cancel):
                        begun.scope.cancel()
                    begun.done.set()
                    await trio.sleep_forever()
        except CachefsError as error:
            # A package that is missing here must not take the other stores away.
            logger.warning("under-store cannot be opened url=%s error=%s", url, error)
            if self._begun.get(store.store_id) is begun:
                # Whoever wants it next tries again.
                del self._begun[store.store_id]
        finally:
            self.opened -= opened
            begun.done.set()

    def _take(self, info: StoreInfo, ufs: UnderStore, close: Callable[[], None]) -> bool:
        """Whether it is read from now on."""
        known = self._open.get(info.store_id)
        if known is None:
            self._open[info.store_id] = OpenStore(info, ufs, close, self._is_renewed)
        elif known.origin == ufs.origin:
            known.reopened(info, ufs, close)
            logger.info("under-store has other options origin=%s", ufs.origin)
        else:
            return False
        return True

    async def _is_renewed(self, ufs: OpenStore, before: StoreInfo) -> bool:
        """Whether the store has other options than those that were refused; the master is asked, but not all the time.
        An object may be refused for itself.
        """
        async with self._asking:  # those that are refused at the same time wait for the one answer
            if ufs.info == before and trio.current_time() >= self._asked_at + _ASK_AGAIN_S:
                self._asked_at = trio.current_time()
                with suppress(CachefsError):
                    await self.add(await self._ask(_ASK_AGAIN_S), before.store_id)
        return ufs.info != before

    # ---- health ----------------------------------------------------------------------------------------------------

    def health_of(self, ufs: UnderStore) -> StoreHealth:
        if isinstance(ufs, OpenStore) and ufs.is_closed:
            return StoreHealth()
        health = self.health.get(ufs.origin)
        if health is None:
            health = self.health[ufs.origin] = StoreHealth()
        return health
