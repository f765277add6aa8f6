"""Making contents local, as `cachefs load` and `cachefs pin` do: many at a time, interruptible, told as it goes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cachefs.cli.params import reason_of
from cachefs.cli.walk import File, Totals, Walk
from cachefs.client import Client
from cachefs.model import CachefsError, format_size

_LINE_EVERY_S = 5.0
_NOT_KEPT = "not kept: larger than a block or a quarter of the cache, or there is no room for it"
CONCURRENCY = 32
EXIT_INTERRUPTED = 130


@dataclass
class Result:
    cached_files: int = 0
    """Were here already."""
    cached_bytes: int = 0
    loaded_files: int = 0
    loaded_bytes: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def done_bytes(self) -> int:
        return self.cached_bytes + self.loaded_bytes

    @property
    def done_files(self) -> int:
        return self.cached_files + self.loaded_files


async def load_all(client: Client, walk: Walk, result: Result, concurrency: int, dry_run: bool, show: Shown) -> None:
    send, receive = trio.open_memory_channel[File](concurrency)

    async def work() -> None:
        async for file in receive:
            await _one(client, file, result, dry_run)
            show.update()

    async with trio.open_nursery() as nursery:
        for _ in range(concurrency):
            nursery.start_soon(work)
        async with send:
            await walk.each(send.send)


async def _one(client: Client, file: File, result: Result, dry_run: bool) -> None:
    attr = file.attr
    if attr.size_bytes == 0 or _is_here(client, file):
        result.cached_files += 1
        result.cached_bytes += attr.size_bytes
    elif not dry_run:
        try:
            if await client.view.promote(attr.ino, background=True):
                result.loaded_files += 1
                result.loaded_bytes += attr.size_bytes
            else:
                result.failed.append((file.path, _NOT_KEPT))
        except CachefsError as error:
            result.failed.append((file.path, reason_of(file.path, error)))


def _is_here(client: Client, file: File) -> bool:
    fd = client.open_sealed(file.attr)
    if fd is None:
        return False
    os.close(fd)
    return True


@asynccontextmanager
async def interruptible(result: Result) -> AsyncIterator[None]:
    """Ctrl-C ends what runs, and what was done is told."""
    async with trio.open_nursery() as nursery:

        async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    result.interrupted = True
                    nursery.cancel_scope.cancel()

        await nursery.start(watch)
        yield
        nursery.cancel_scope.cancel()


class Shown:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, totals: Totals, result: Result) -> None:
        self._console = console
        self._totals = totals
        self._result = result
        self._began = self._told = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("loading"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("", total=max(1, totals.bytes), text="")

    def __enter__(self) -> Shown:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self) -> None:
        now = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._result.done_bytes, text=self._text(now))
        elif now >= self._told + _LINE_EVERY_S:
            self._told = now
            self._console.print(self._text(now), highlight=False, soft_wrap=True)

    def _text(self, now: float) -> str:
        done, totals = self._result, self._totals
        rate = done.loaded_bytes / max(now - self._began, 0.001)
        return (
            f"{done.done_files} of {totals.files} files, {format_size(done.done_bytes)} of {format_size(totals.bytes)},"
            f" {format_size(rate)}/s, {len(done.failed)} failed"
        )


async def count(walk: Walk, console: Console) -> None:
    """List everything, telling how much it is so far. Raises TransportError."""
    with console.status("listing") as status:
        await walk.count(lambda found: status.update(f"listing: {amount(found.files, found.bytes)}"))


def facts_of(result: Result, dry_run: bool) -> dict[str, Any]:
    return {
        "cached_files": result.cached_files,
        "cached_bytes": result.cached_bytes,
        "loaded_files": result.loaded_files,
        "loaded_bytes": result.loaded_bytes,
        "dry_run": dry_run,
    }


def failures_of(failed: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"path": path, "reason": reason} for path, reason in failed]


def print_loaded(result: Result, spent_s: float, dry_run: bool) -> None:
    print(f"cached before: {amount(result.cached_files, result.cached_bytes)}")
    if not dry_run:
        rate = format_size(result.loaded_bytes / max(spent_s, 0.001))
        print(f"loaded: {amount(result.loaded_files, result.loaded_bytes)}, {rate}/s")


def print_failures(failed: list[tuple[str, str]], interrupted: bool) -> None:
    for path, reason in failed:
        print(f"{path}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed", file=sys.stderr)
    if interrupted:
        print("interrupted; run it again to go on", file=sys.stderr)


def exit_with(failed: list[tuple[str, str]], interrupted: bool) -> None:
    """With the status of that; returns when all is well."""
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)
    if failed:
        sys.exit(1)


def shown_paths(paths: Sequence[str]) -> str:
    return f"{', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}"


def amount(files: int, size_bytes: int) -> str:
    return f"{files} files, {format_size(size_bytes)}"
