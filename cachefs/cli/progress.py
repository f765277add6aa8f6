"""How far something is that takes a while: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LOOK_EVERY_S = 0.5
LINE_EVERY_S = 5.0


class HowFar(NamedTuple):
    text: str
    done: int = 0
    total: int | None = None
    """None: nobody knows yet."""


@asynccontextmanager
async def shown(console: Console, doing: str, look: Callable[[], HowFar]) -> AsyncGenerator[None, None]:
    """While the block lasts, tell what `look` says: whether or not anything happens in it."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", markup=False))
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(doing, total=None, text="")

            def draw() -> None:
                far = look()
                # A bar of nothing is full.
                total, done = (far.total, far.done) if far.total != 0 else (1, 1)
                progress.update(task, text=far.text, completed=done, total=total)

            try:
                async with _every(LOOK_EVERY_S, draw):
                    yield
            finally:
                draw()
    else:

        def line() -> None:
            console.print(f"{doing}: {look().text}", markup=False, highlight=False, soft_wrap=True)

        async with _every(LINE_EVERY_S, line):
            yield


@asynccontextmanager
async def _every(interval_s: float, do: Callable[[], None]) -> AsyncGenerator[None, None]:
    async def tell() -> None:
        while True:
            await trio.sleep(interval_s)
            do()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        yield
        nursery.cancel_scope.cancel()
