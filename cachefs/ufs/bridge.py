"""asyncio libraries from trio: one thread with an event loop, and coroutines run there on behalf of trio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")

_THREADS = 4


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

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: Executor) -> None:
        self._loop = loop
        self._threads = threads

    def start(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Running[T]:
        """Begin a coroutine without waiting for it; the caller waits for its result or abandons it."""
        return Running(self._loop, make)

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """As `Running.result`, of a coroutine begun now."""
        return await self.start(make).result()

    async def in_thread(self, function: Callable[[], T]) -> T:
        """For coroutines: the result of what may block. Cancelled, it raises once the function has returned."""
        running = asyncio.ensure_future(self._loop.run_in_executor(self._threads, function))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise


@contextmanager
def open_bridge(name: str) -> Iterator[Bridge]:
    loop = asyncio.new_event_loop()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix=name) as threads:
            yield Bridge(loop, threads)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
