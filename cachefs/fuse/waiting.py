"""Requests that could not be answered from memory: a bounded number in tasks, the rest in a queue.

One request, by its `unique`:

                     WouldBlock          task free, or later
    read from device ----------> queued --------------------> running ---> answered
                                   |                             |
                                   +---- INTERRUPT: EINTR <------+ (scope cancelled)

INTERRUPT names a request that the kernel has handed out before, so with one reader of the device it never comes early;
one that comes late finds nothing and changes nothing. A request of an application that was killed still has to be
answered: the dying process waits for it.

The queue is bounded by the kernel: one request for each waiting caller, plus `max_background` for read-ahead.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from cachefs.fusewire import UNIQUE_RESEND

Work = Callable[[], Awaitable[None]]
Fail = Callable[[Exception], None]


class WaitingRequest:
    """`work` does the operation and answers; `fail` answers with an error. Exactly one of them answers."""

    __slots__ = ("fail", "scope", "work")

    def __init__(self, work: Work, fail: Fail) -> None:
        self.work = work
        self.fail = fail
        self.scope: trio.CancelScope | None = None
        """None while queued."""


class WaitingRequests:
    """Everything runs in `nursery`. If that is cancelled, requests in progress stay unanswered: the mount is gone, or
    a successor has them sent again."""

    def __init__(self, nursery: trio.Nursery, max_tasks: int) -> None:
        self._nursery = nursery
        self._max_tasks = max_tasks
        self._tasks = 0
        self._queue: deque[int] = deque()
        self._requests: dict[int, WaitingRequest] = {}

    def __len__(self) -> int:
        """Requests running and queued."""
        return len(self._requests)

    def add(self, unique: int, work: Work, fail: Fail) -> None:
        """Never blocks. `fail` gets what `work` raised, or an InterruptedError."""
        key = unique & ~UNIQUE_RESEND
        self._requests[key] = WaitingRequest(work, fail)  # one sent again takes the place of its first copy
        if self._tasks < self._max_tasks:
            self._tasks += 1
            self._nursery.start_soon(partial(self._run_from, key), name="fuse request")
        else:
            self._queue.append(key)

    def interrupt(self, unique: int) -> None:
        """The caller no longer wants to wait."""
        key = unique & ~UNIQUE_RESEND
        request = self._requests.get(key)
        if request is None:
            return  # answered already
        if request.scope is not None:
            request.scope.cancel()
        else:
            del self._requests[key]  # whoever finds its key in the queue skips it
            request.fail(interrupted())

    async def _run_from(self, key: int | None) -> None:
        """Run this request, then queued ones until there are none."""
        try:
            while key is not None:
                request = self._requests.get(key)
                if request is not None:
                    await self._run(key, request)
                key = self._queue.popleft() if self._queue else None
        finally:
            self._tasks -= 1

    async def _run(self, key: int, request: WaitingRequest) -> None:
        # The scope is inside the try: what is left of an exception group once the scope took its Cancelled out is an
        # ordinary error of the operation.
        try:
            with trio.CancelScope() as request.scope:
                await request.work()
            if request.scope.cancelled_caught:
                request.fail(interrupted())
        except Exception as error:
            request.fail(error)
        finally:
            if self._requests.get(key) is request:
                del self._requests[key]


def interrupted() -> InterruptedError:
    return InterruptedError(errno.EINTR, "the caller got a signal")
