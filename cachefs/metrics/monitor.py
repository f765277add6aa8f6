"""What a process shows to whoever watches it: filled in by its service as it comes up."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from cachefs.metrics.declared import Metric
from cachefs.metrics.merged import Labelled, merged

P = TypeVar("P")

READY_TIMEOUT_S = 2.0
"""What is not found out in that time is answered with no."""
KEPT_S = 0.1
"""For how long a text is served again: however often somebody asks, making it takes a hundredth of the time."""
_TEXT = "text/plain; charset=utf-8"

WhyNotReady = Callable[[], Awaitable[str | None]]
"""One line on what is missing; None: nothing is."""


class Monitor:
    """Of one process. Its paths: /metrics, /healthz, /readyz."""

    def __init__(self, role: str) -> None:
        # Here, because a process that nobody watches has no use for it: 1.4 MB and 26 ms.
        from cachefs.metrics.exposition import CONTENT_TYPE, Exposition

        self._exposition = Exposition(role)
        self._content_type = CONTENT_TYPE
        self._why_not_ready: WhyNotReady = _starting
        self._degraded: Callable[[], list[str]] = list
        self._of_others: Callable[[], Awaitable[list[Labelled]]] | None = None
        self._kept = b""
        self._kept_until = -math.inf

    def watch(self, metrics: Sequence[Metric[P]], parts: P) -> None:
        """Show these from now on, read from `parts`."""
        self._exposition.add(metrics, parts)

    def ready_if(self, why_not_ready: WhyNotReady) -> None:
        """From now on the process is ready when this says so. May wait, `READY_TIMEOUT_S` at most."""
        self._why_not_ready = why_not_ready

    def degraded_by(self, degraded: Callable[[], list[str]]) -> None:
        """What does not work as it should though the process does what it can, a line each: told with /readyz, and no
        reason for not being ready.
        """
        self._degraded = degraded

    def answer_for(self, of_others: Callable[[], Awaitable[list[Labelled]]]) -> None:
        """Show what these say too, whenever somebody asks for /metrics. It takes a bounded time, and raises nothing."""
        self._of_others = of_others

    def text(self) -> bytes:
        """As Prometheus reads it, of this moment."""
        return self._exposition.text()

    async def _recent_text(self) -> bytes:
        if trio.current_time() >= self._kept_until:
            others = await self._of_others() if self._of_others is not None else []
            self._kept = merged(self.text(), others) if others else self.text()
            self._kept_until = trio.current_time() + KEPT_S
        return self._kept

    async def why_not_ready(self) -> str | None:
        with trio.move_on_after(READY_TIMEOUT_S):
            return await self._why_not_ready()
        return f"it was not found out within {READY_TIMEOUT_S:g} s whether it is ready"

    async def answer(self, path: str) -> tuple[int, str, bytes] | None:
        """(status, content type, body) of one of the paths; None for others."""
        if path == "/metrics":
            return 200, self._content_type, await self._recent_text()
        if path == "/healthz":
            # Whoever gets an answer knows that the event loop runs.
            return 200, _TEXT, b"ok\n"
        if path == "/readyz":
            reason = await self.why_not_ready()
            lines = [reason or "ready", *(f"degraded: {each}" for each in self._degraded())]
            return 200 if reason is None else 503, _TEXT, "".join(f"{each}\n" for each in lines).encode()
        return None


async def _starting() -> str | None:
    return "it is starting"
