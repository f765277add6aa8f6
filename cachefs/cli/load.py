"""`cachefs load`: have names, or contents too, here before somebody needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.walk import File, Totals, Walk
from cachefs.client import Client
from cachefs.model import CachefsError, ConfigError, format_size
from cachefs.net import Address

_LINE_EVERY_S = 5.0
_NOT_KEPT = "not kept: larger than a block or a quarter of the cache, or there is no room for it"
EXIT_INTERRUPTED = 130


@dataclass
class _Result:
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


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("--metadata", is_flag=True, help="Names and attributes only.")
@click.option("--from-file", type=click.File(), help="Also the paths in this file, one in a line; - is standard input.")
@click.option(
    "--concurrency", type=click.IntRange(1, 256), default=32, show_default=True, help="Files asked for at a time."
)
@click.option("--dry-run", is_flag=True, help="Only say what there is, and what of it is cached.")
@master_option
@params.json_option
def load(
    paths: tuple[str, ...],
    metadata: bool,
    from_file: Any,
    concurrency: int,
    dry_run: bool,
    master_address: Address | None,
    as_json: bool,
) -> None:
    """Make files and everything below directories local to this node, so that nobody waits for them later.

    Readers are not delayed by it. What is here already is passed over: run it again to go on after an interruption.
    Exits with status 1 when something could not be loaded, and lists exactly what.
    """
    wanted = list(paths)
    if from_file is not None:
        wanted += [line for line in from_file.read().splitlines() if line]
    elif not wanted:
        wanted = ["/"]
    for path in wanted:
        if not path.startswith("/"):
            raise ConfigError("PATH", path, "a path of the namespace, beginning with a slash")
    result, totals = _Result(), Totals()

    async def run(client: Client) -> None:
        nonlocal totals
        walk = Walk(client, wanted)
        totals = walk.totals
        console = Console(stderr=True)
        async with _interruptible(result):
            with console.status("listing") as status:
                await walk.count(lambda found: status.update(f"listing: {_amount(found.files, found.bytes)}"))
            if not metadata:
                with _shown(console, totals, result) as show:
                    await _load(client, walk, result, concurrency, dry_run, show)

    began = time.monotonic()
    run_with_client(master_address, run, with_worker=not metadata)
    failed = [*totals.failed, *result.failed]
    _tell(wanted, totals, result, failed, time.monotonic() - began, metadata, dry_run, as_json)
    if result.interrupted:
        sys.exit(EXIT_INTERRUPTED)
    if failed:
        sys.exit(1)


async def _load(client: Client, walk: Walk, result: _Result, concurrency: int, dry_run: bool, show: _Shown) -> None:
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


async def _one(client: Client, file: File, result: _Result, dry_run: bool) -> None:
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
            result.failed.append((file.path, str(error)))


def _is_here(client: Client, file: File) -> bool:
    fd = client.open_sealed(file.attr)
    if fd is None:
        return False
    os.close(fd)
    return True


@asynccontextmanager
async def _interruptible(result: _Result) -> AsyncIterator[None]:
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


class _Shown:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, totals: Totals, result: _Result) -> None:
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

    def __enter__(self) -> _Shown:
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


def _shown(console: Console, totals: Totals, result: _Result) -> _Shown:
    return _Shown(console, totals, result)


def _tell(
    paths: list[str],
    totals: Totals,
    result: _Result,
    failed: list[tuple[str, str]],
    spent_s: float,
    metadata: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json:
        facts: dict[str, Any] = {"paths": paths, "files": totals.files, "bytes": totals.bytes}
        if not metadata:
            facts |= {
                "cached_files": result.cached_files,
                "cached_bytes": result.cached_bytes,
                "loaded_files": result.loaded_files,
                "loaded_bytes": result.loaded_bytes,
                "dry_run": dry_run,
            }
        facts |= {"seconds": spent_s, "interrupted": result.interrupted}
        print(json.dumps({**facts, "failed": [{"path": path, "reason": reason} for path, reason in failed]}))
        return
    print(f"{', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}: {_amount(totals.files, totals.bytes)}")
    if not metadata:
        print(f"cached before: {_amount(result.cached_files, result.cached_bytes)}")
        if not dry_run:
            rate = format_size(result.loaded_bytes / max(spent_s, 0.001))
            print(f"loaded: {_amount(result.loaded_files, result.loaded_bytes)}, {rate}/s")
    for path, reason in failed:
        print(f"{path}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} failed", file=sys.stderr)
    if result.interrupted:
        print("interrupted; run it again to go on", file=sys.stderr)


def _amount(files: int, size_bytes: int) -> str:
    return f"{files} files, {format_size(size_bytes)}"
