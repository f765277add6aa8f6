"""Single-flight: of many who ask for the same thing at once, one does the work and all get its outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import trio

from cachefs.model import TransportError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Flight(Generic[V]):
    def __init__(self, kept: bool) -> None:
        self.kept = kept
        self.waiters = 0
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.values: list[V] = []
        """The one result, once it is there."""
        self.error: Exception | None = None

    @property
    def ended(self) -> bool:
        return bool(self.values) or self.error is not None


class Flights(Generic[K, V]):
    """Runs in progress, by key. The tasks live in the nursery given; their errors go to those who wait, never there."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._flights: dict[K, _Flight[V]] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: K, make: Callable[[], Awaitable[V]]) -> V:
        """The outcome of the run for `key`; starts one with `make` if there is none.

        Raises what the run raised; TransportError when the service ended before it did. Cancellation leaves the run to
        the others who wait; the last one to leave cancels it, unless `start` wants it kept.
        """
        flight = self._flights.get(key) or self._launch(key, make, kept=False)
        flight.waiters += 1
        try:
            await flight.done.wait()
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.kept and not flight.ended:
                flight.scope.cancel()
                # Whoever asks next starts anew instead of joining one that is being cancelled.
                if self._flights.get(key) is flight:
                    del self._flights[key]
        if flight.error is not None:
            raise flight.error
        if not flight.values:
            raise TransportError("the service is ending")
        return flight.values[0]

    def start(self, key: K, make: Callable[[], Awaitable[V]]) -> bool:
        """Have it run whether anybody waits or not; False when it was running already. Errors go to waiters only."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.kept = True
            return False
        self._launch(key, make, kept=True)
        return True

    def _launch(self, key: K, make: Callable[[], Awaitable[V]], *, kept: bool) -> _Flight[V]:
        flight: _Flight[V] = _Flight(kept)
        self._flights[key] = flight
        self._nursery.start_soon(self._run, key, flight, make)
        return flight

    async def _run(self, key: K, flight: _Flight[V], make: Callable[[], Awaitable[V]]) -> None:
        try:
            with flight.scope:
                try:
                    flight.values.append(await make())
                except Exception as error:
                    flight.error = error
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.done.set()
