"""Whether the other side does anything at all, however long its answers take.

A process that hangs (stopped, in an endless loop, waiting for a disk with its event loop) answers no `Ping`; one that
is only slow, because its store is or because it has much to do, does. So does one whose answers keep coming: a ping may
have to wait behind large ones.
"""

from __future__ import annotations

import outcome
import trio

from cachefs.model import CachefsError, TransportError
from cachefs.net.background import open_background
from cachefs.net.peer import Pool
from cachefs.net.service import Session
from cachefs.wire.messages import Done, Ping

_TICK_S = 0.25


def answer_ping(request: Ping, session: Session) -> Done:
    return Done()


async def is_silent(pool: Pool, within_s: float) -> bool:
    """True when nothing comes from there, by a connection that is there or is being made, for `within_s`, although a
    ping was sent. Cancelling is safe.

    Raises TransportError when the connection is lost or refused: who asked by it is told that, too.

    Time is counted in turns of our own event loop: when we were stopped as well, or the whole machine, none has passed.
    """
    answered = trio.Event()
    result: outcome.Maybe[object] = outcome.Value(None)

    async def ask() -> None:
        nonlocal result
        try:
            await (await pool.peer()).call(Ping(), out_of_turn=True)
        except TransportError as error:
            result = outcome.Error(error)
        except CachefsError:
            pass  # it says no, but says it
        answered.set()

    before = pool.arrivals
    async with open_background() as nursery:
        nursery.start_soon(ask)
        for _ in range(max(1, round(within_s / _TICK_S))):
            with trio.move_on_after(_TICK_S):
                await answered.wait()
            if answered.is_set():
                result.unwrap()
                return False
            if pool.arrivals != before:
                return False
    return True
