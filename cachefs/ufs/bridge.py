"""asyncio libraries from trio: one thread with an event loop, and coroutines run there on behalf of trio tasks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import trio

logger = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS = 4
CLOSE_S = 5.0
"""How long closing may take, of connections and of threads, before it is left alone: nobody waits for what hangs."""


class Running(Generic[T]):
    """A coroutine under way in the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._loop = loop
        self._make = make
        self._token = trio.lowlevel.current_trio_token()
        self._done = trio.Event()
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._start)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._make())
        self._task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            # Looked at, so that asyncio does not complain about errors nobody waited for.
            task.exception()
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._done.set)

    async def result(self) -> T:
        """What the coroutine returned or raised. Cancelling cancels it, and waits until it has ended."""
        try:
            await self._done.wait()
        except trio.Cancelled:
            await self.abandon()
            raise
        assert self._task is not None
        return self._task.result()

    async def ended(self) -> None:
        """Cancelled, it leaves the coroutine alone."""
        await self._done.wait()

    async def abandon(self) -> None:
        """Cancel it, and return when it has ended. Does nothing to one that has."""
        if not self._done.is_set():
            self._loop.call_soon_threadsafe(self._cancel)
            with trio.CancelScope(shield=True):
                await self._done.wait()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Bridge:
    """A running event loop in a thread of its own, and a few threads for what blocks. Made by `open_bridge`; used from
    any trio task.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, calls: SimpleQueue[_Call | None]) -> None:
        self._loop = loop
        self._calls = calls

    def start(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Running[T]:
        """Begin a coroutine without waiting for it; the caller waits for its result or abandons it."""
        return Running(self._loop, make)

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """As `Running.result`, of a coroutine begun now."""
        return await self.start(make).result()

    async def close(self, make: Callable[[], Coroutine[Any, Any, object]], name: str) -> None:
        """Run a coroutine that gives up connections, at the end. One that fails or hangs is told in the log, with
        `name`, and left alone. Not to be cancelled.
        """

        async def close() -> None:
            async with asyncio.timeout(CLOSE_S):
                await make()

        running = self.start(close)
        # A little longer: it may hang where it cannot be told to end.
        with trio.move_on_after(CLOSE_S + 1.0, shield=True):
            await running.ended()
            try:
                await running.result()
            except Exception as error:
                logger.warning("connections are not closed store=%s error=%r", name, error)
            return
        logger.warning("connections are not closed, that hangs store=%s", name)

    async def in_thread(self, function: Callable[[], None]) -> None:
        """For coroutines: run what may block. Raises what it raises; cancelled, it raises once that has returned.

        A third of the cost of asyncio's executor.
        """
        call = _Call(self._loop, function)
        self._calls.put(call)
        await call.result()


class _Call:
    def __init__(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        self._loop = loop
        self._function = function
        self._done: asyncio.Future[None] = loop.create_future()
        self._error: Exception | None = None
        self._ended = False

    def run(self) -> None:
        try:
            self._function()
        except Exception as error:
            self._error = error
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ended = True
        if not self._done.done():
            self._done.set_result(None)

    async def result(self) -> None:
        try:
            await self._done
        except asyncio.CancelledError:
            while not self._ended:
                self._done = self._loop.create_future()
                with suppress(asyncio.CancelledError):
                    await self._done
            raise
        if self._error is not None:
            raise self._error


@asynccontextmanager
async def open_bridge(name: str) -> AsyncGenerator[Bridge, None]:
    """Its threads have ended when the block has, but for those that hang."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    def work() -> None:
        while (call := calls.get()) is not None:
            call.run()
            del call

    calls: SimpleQueue[_Call | None] = SimpleQueue()
    # Daemons: one that hangs must not keep the process from ending.
    threads = [threading.Thread(target=work, name=f"{name}-{number}", daemon=True) for number in range(_THREADS)]
    thread = threading.Thread(target=run, name=name, daemon=True)
    for each in (thread, *threads):
        each.start()
    try:
        yield Bridge(loop, calls)
    finally:
        for _ in threads:
            calls.put(None)

        def join() -> bool:
            """Whether all have ended."""
            give_up = time.monotonic() + CLOSE_S
            for each in threads:
                each.join(max(0.0, give_up - time.monotonic()))
            # After those, which call back into the loop.
            loop.call_soon_threadsafe(loop.stop)
            thread.join(max(0.1, give_up - time.monotonic()))
            return not any(each.is_alive() for each in (thread, *threads))

        with trio.CancelScope(shield=True):
            # In a thread, with a place of its own: others are served meanwhile.
            if not await trio.to_thread.run_sync(join, limiter=trio.CapacityLimiter(1)):
                logger.warning("threads of an under-store hang, and are left alone name=%s", name)
