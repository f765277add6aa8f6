"""Waiting out a restart of the master or of the worker.

The client owns the retry budget of its requests: nothing below it repeats one. All of them may be repeated, since none
changes anything but caches.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from cachefs.model import HandshakeError, TransportError

T = TypeVar("T")


def _may_get_better(error: BaseException) -> bool:
    return isinstance(error, TransportError) and not isinstance(error, HandshakeError)


async def patiently(call: Callable[[], Awaitable[T]], patience_s: float) -> T:
    """The result of `call`, tried again with growing pauses while it raises TransportError, for `patience_s` seconds.

    Raises the last TransportError then, and any other error at once, HandshakeError too: tokens do not get right by
    themselves. Cancelling is safe at any time.
    """
    began = time.monotonic()
    try:
        # Nearly always the only attempt: the machinery of retries costs as much as the request.
        return await call()
    except HandshakeError:
        raise
    except TransportError as error:
        first = error
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_get_better),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
        stop=tenacity.stop_after_delay(patience_s - (time.monotonic() - began)),
        reraise=True,
    ):
        with attempt:
            if attempt.retry_state.attempt_number == 1:
                raise first
            return await call()
    raise AssertionError("unreachable: the last attempt raises")
