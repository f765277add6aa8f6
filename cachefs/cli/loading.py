"""Making contents local, as `cachefs load` and `cachefs pin` do: many at a time, interruptible, told as it goes."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import click
import trio
from rich.console import Console

from cachefs.cli.params import reason_of
from cachefs.cli.progress import HowFar, shown
from cachefs.cli.walk import File, Totals, Walk
from cachefs.client import Client
from cachefs.model import BlockId, CachefsError, format_duration, format_size

_ASK_EVERY_S = 1.0
_NOT_KEPT = "not kept: larger than a block or a quarter of the cache, or there is no room for it"
EXIT_INTERRUPTED = 130

concurrency_option = click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=32,
    show_default=True,
    help="Files asked for at a time.",
)


class UnderWay:
    """A file that is being loaded, and what is here of it."""

    def __init__(self, file: File, before_bytes: int) -> None:
        self.file = file
        self.before_bytes = before_bytes
        """Here already when it was begun."""
        self.now_bytes = before_bytes


@dataclass
class Result:
    cached_files: int = 0
    """Were here already."""
    cached_bytes: int = 0
    loaded_files: int = 0
    loaded_bytes: int = 0
    resumed_bytes: int = 0
    """Of the loaded ones, what was here already of files that were here in part."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    failed_bytes: int = 0
    """What those that failed have."""
    interrupted: bool = False
    under_way: set[UnderWay] = field(default_factory=set)
    spent_s: float = 0.0
    """Loading."""

    @property
    def done_bytes(self) -> int:
        """What need not be waited for any more."""
        under_way = sum(each.now_bytes for each in self.under_way)
        return self.cached_bytes + self.loaded_bytes + self.failed_bytes + under_way

    @property
    def done_files(self) -> int:
        return self.cached_files + self.loaded_files + len(self.failed)

    @property
    def fetched_bytes(self) -> int:
        """Only what came since this began: what a rate is made of."""
        under_way = sum(each.now_bytes - each.before_bytes for each in self.under_way)
        return self.loaded_bytes - self.resumed_bytes + under_way


async def load_all(
    client: Client, walk: Walk, result: Result, concurrency: int, dry_run: bool, console: Console
) -> None:
    """Told on the console as it goes."""
    began = trio.current_time()
    send, receive = trio.open_memory_channel[File](0)

    async def work() -> None:
        async for file in receive:
            await _one(client, file, result, dry_run)

    def look() -> HowFar:
        result.spent_s = trio.current_time() - began
        return _how_far(walk.totals, result)

    try:
        async with shown(console, "loading", look), trio.open_nursery() as asking:
            asking.start_soon(_ask, client, result)
            async with trio.open_nursery() as nursery:
                for _ in range(concurrency):
                    nursery.start_soon(work)
                async with send:
                    await walk.each(send.send)
            asking.cancel_scope.cancel()
    finally:
        result.spent_s = trio.current_time() - began


async def _one(client: Client, file: File, result: Result, dry_run: bool) -> None:
    attr = file.attr
    if attr.size_bytes == 0 or _is_here(client, file):
        result.cached_files += 1
        result.cached_bytes += attr.size_bytes
        return
    if dry_run:
        return
    way = UnderWay(file, 0)
    try:
        if _comes_in_pages(client, file):
            way.before_bytes = way.now_bytes = await _here_bytes(client, file)
            result.under_way.add(way)
        reply = await client.view.ask_to_promote(attr.ino, background=True)
        if reply.sealed:
            result.loaded_files += 1
            result.loaded_bytes += attr.size_bytes
            result.resumed_bytes += way.before_bytes
            return
        reason = f"not kept: {reply.reason}" if reply.reason else _NOT_KEPT
    except CachefsError as error:
        reason = reason_of(file.path, error)
    finally:
        result.under_way.discard(way)
    result.failed.append((file.path, reason))
    result.failed_bytes += attr.size_bytes


async def _ask(client: Client, result: Result) -> None:
    """How much has come of what is under way, about once a second. Runs until cancelled."""
    while True:
        await trio.sleep(_ASK_EVERY_S)
        for way in list(result.under_way):
            # The worker may be away; loading itself finds that out.
            with suppress(CachefsError):
                way.now_bytes = max(way.before_bytes, await _here_bytes(client, way.file))


def _comes_in_pages(client: Client, file: File) -> bool:
    geometry = client.cluster.geometry
    size = file.attr.size_bytes
    return bool(file.attr.key) and geometry.block_count(size) == 1 and geometry.page_count(size) > 1


async def _here_bytes(client: Client, file: File) -> int:
    status = await client.view.block_status(BlockId(file.attr.key, 0))
    # What a file takes on its disk is more, rounded up and with its checksums.
    return min(status.cached_bytes, file.attr.size_bytes)


def _how_far(totals: Totals, result: Result) -> HowFar:
    rate = result.fetched_bytes / max(result.spent_s, 0.001)
    left_s = (totals.bytes - result.done_bytes) / rate if rate else math.inf
    text = (
        f"{result.done_files} of {totals.files} files, {format_size(result.done_bytes)} of {format_size(totals.bytes)},"
        f" {format_size(rate)}/s, {len(result.failed)} failed"
    )
    if 0 < left_s < math.inf:
        text += f", {format_duration(math.ceil(left_s))} left"
    return HowFar(text, result.done_bytes, totals.bytes)


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


async def count(walk: Walk, console: Console) -> None:
    """List everything, telling how much it is so far. Raises TransportError."""
    totals = walk.totals
    async with shown(console, "listing", lambda: HowFar(f"{amount(totals.files, totals.bytes)} so far")):
        await walk.count()


def facts_of(result: Result, dry_run: bool) -> dict[str, Any]:
    return {
        "cached_files": result.cached_files,
        "cached_bytes": result.cached_bytes,
        "loaded_files": result.loaded_files,
        "loaded_bytes": result.loaded_bytes,
        "resumed_bytes": result.resumed_bytes,
        "dry_run": dry_run,
    }


def failures_of(failed: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"path": path, "reason": reason} for path, reason in failed]


def print_loaded(result: Result, dry_run: bool) -> None:
    print(f"cached before: {amount(result.cached_files, result.cached_bytes)}")
    if not dry_run:
        rate = format_size(result.fetched_bytes / max(result.spent_s, 0.001))
        resumed = f", {format_size(result.resumed_bytes)} of it here before" if result.resumed_bytes else ""
        print(f"loaded: {amount(result.loaded_files, result.loaded_bytes)}{resumed}, {rate}/s")


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
