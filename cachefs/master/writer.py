"""Group commit: writes that are asked for while one commits go into the next transaction together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import outcome
import trio

from cachefs.meta import MetaStore, is_of_the_disk
from cachefs.model import CachefsError, LogLimiter

logger = logging.getLogger(__name__)

T = TypeVar("T")

_WRITES_AT_ONCE = 64
"""In one transaction: whoever asks for little does not wait for all reports of a cluster that was restarted."""


class _Write:
    def __init__(
        self, function: Callable[[], Any], then: Callable[[Any], None] | None, otherwise: Callable[[], None] | None
    ) -> None:
        self.function = function
        self.then = then
        self.otherwise = otherwise
        self.done = trio.Event()
        self.result: outcome.Outcome[Any] | None = None


class Writer:
    """Runs writing methods of the store in a thread, one transaction at a time. `serve` does the work."""

    def __init__(self, store: MetaStore) -> None:
        self._store = store
        self._queue: list[_Write] = []
        self._wanted = trio.Event()
        self._limiter = trio.CapacityLimiter(1)
        self._log = LogLimiter(logger)

    @property
    def waiting(self) -> int:
        """Writes that the transaction in progress does not have."""
        return len(self._queue)

    async def run(
        self,
        function: Callable[[], T],
        then: Callable[[T], None] | None = None,
        otherwise: Callable[[], None] | None = None,
    ) -> T:
        """The result of `function`, committed. Cancelling does not undo what was asked: it may still be written.

        `then` is called with the result once that is committed, in the event loop's thread, whether anybody waits or
        not: what is in memory must not differ from the database because an asker left. `otherwise` is called so when it
        could not be written. They must not raise. What is asked for is queued without a checkpoint.

        Raises what `function` does; CachefsError when the disk is full or fails.
        """
        write = _Write(function, then, otherwise)
        self._queue.append(write)
        self._wanted.set()
        await write.done.wait()
        assert write.result is not None
        result: T = write.result.unwrap()
        return result

    async def serve(self) -> None:
        """Runs until cancelled; what is queued then is not written, and nobody was told that it was."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            await self._write_next()

    async def _write_next(self) -> None:
        # On its own, so that what was written last is not remembered here until something is written again: it may
        # have credentials of an under-store that is removed.
        writes, self._queue = self._queue[:_WRITES_AT_ONCE], self._queue[_WRITES_AT_ONCE:]
        if self._queue:
            self._wanted.set()
        await trio.to_thread.run_sync(self._commit, writes, limiter=self._limiter)
        for write in writes:
            try:
                if isinstance(write.result, outcome.Value):
                    if write.then is not None:
                        write.then(write.result.value)
                elif write.otherwise is not None:
                    write.otherwise()
            except Exception:
                logger.exception("what was written, or could not be, is not known in memory")
            write.done.set()

    def _commit(self, writes: list[_Write]) -> None:
        try:
            with self._store.batch():
                results = [write.function() for write in writes]
        except Exception as error:
            if len(writes) == 1:
                writes[0].result = outcome.Error(self._told(error))
            else:
                # One of them is at fault: alone, it fails alone.
                for write in writes:
                    self._commit([write])
            return
        for write, result in zip(writes, results, strict=True):
            write.result = outcome.Value(result)

    def _told(self, error: Exception) -> Exception:
        """What whoever asked gets: of a disk that is full or fails, nothing that looks like a mistake of ours."""
        if not is_of_the_disk(error):
            return error
        self._log.log(logging.WARNING, str(error), "the database cannot be written error=%s", error)
        told = CachefsError(f"the master's database cannot be written: {error}")
        told.__cause__ = error
        return told
