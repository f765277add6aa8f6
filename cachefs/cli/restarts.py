"""Processes that `cachefs up` starts again: told from those that are only slow, and counted.

A process that died is noticed at once. One that hangs (stopped, in an endless loop, waiting for a disk with its event
loop) is asked for a sign of life, and killed when it gives none for long: whoever reads waits for it otherwise, or does
without it, until somebody looks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import click
import trio

from cachefs.cli.children import Child
from cachefs.metrics import Metric, counter
from cachefs.model import TransportError
from cachefs.net import Hello, is_silent, open_pool, parse_address

logger = logging.getLogger(__name__)

_MOST_PAUSE_S, _MOST_ANSWER_S = 1.0, 2.0
_DIES_WITHIN_S = 10.0


class Restarts(NamedTuple):
    """How often a process was started again."""

    ended: int = 0
    hung: int = 0

    def arguments(self) -> list[str]:
        """By which the next one is told."""
        return ["--started-again", str(self.ended), str(self.hung)]


restarts_option = click.option("restarts", "--started-again", nargs=2, type=int, default=(0, 0), hidden=True)


def _by_reason(restarts: Restarts) -> Mapping[tuple[str, ...], float]:
    return {("ended",): restarts.ended, ("hung",): restarts.hung}


RESTART_METRICS: Sequence[Metric[Restarts]] = [
    counter(
        "cachefs_restarts_total",
        "Times that `cachefs up` started this process again, since it ended or hung. It does not begin at 0 with each.",
        _by_reason,
        "reason",
    )
]


async def kill_if_it_hangs(child: Child, after_s: float) -> None:
    """Kill it (SIGKILL) once it has not answered a ping for `after_s`, however slow its other answers are. Runs until
    cancelled.

    Asked anew all the while. Time is counted in turns of our own event loop: a machine that was suspended, or a cgroup
    that was frozen with us in it, makes nobody hang.
    """
    pause_s, answer_s = min(_MOST_PAUSE_S, after_s / 6), min(_MOST_ANSWER_S, after_s / 3)
    silent_s = 0.0
    async with open_pool(parse_address(child.facts["listen"]), Hello(role="client")) as pool:
        while silent_s < after_s:
            await trio.sleep(pause_s)
            try:
                if await is_silent(pool, answer_s):
                    silent_s += answer_s + (pause_s if silent_s else 0.0)
                else:
                    silent_s = 0.0
            except TransportError:
                # It is just ending, or takes no connections any more.
                silent_s += pause_s
    logger.error("the %s hangs, killed pid=%d silent_s=%g", child.role, child.pid, silent_s)
    child.kill()
    await trio.sleep(_DIES_WITHIN_S)
    logger.error(
        "the %s cannot be killed, and is started again once it is gone: it waits in the kernel, perhaps for a disk"
        " pid=%d",
        *(child.role, child.pid),
    )
    await trio.sleep_forever()
