"""`cachefs pin`, `cachefs unpin`: data that is never evicted."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.loading import (
    Result,
    amount,
    concurrency_option,
    count,
    exit_with,
    facts_of,
    failures_of,
    interruptible,
    load_all,
    print_failures,
    print_loaded,
    shown_paths,
)
from cachefs.cli.walk import Walk
from cachefs.client import Client
from cachefs.model import CapacityError, format_size
from cachefs.net import Address
from cachefs.wire.messages import PinList, PinReply


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("show", "--list", is_flag=True, help="Show what is pinned, and how much of it is cached.")
@click.option("--no-load", is_flag=True, help="Load nothing: what is cached stays, and what is read is kept.")
@concurrency_option
@click.option("--dry-run", is_flag=True, help="Only say what there is, what of it is cached, and whether it fits.")
@master_option
@params.json_option
def pin(
    paths: tuple[str, ...],
    show: bool,
    no_load: bool,
    concurrency: int,
    dry_run: bool,
    master_address: Address | None,
    as_json: bool,
) -> None:
    """Keep files, and everything below directories, in the caches until they are unpinned, and load them to this node.

    What appears or changes there later is kept as well. Refused, with the numbers, if more would be pinned than nine
    tenths of what the caches hold. Can be run again to go on loading after an interruption. Exits with status 1 when
    something could not be loaded, and lists exactly what; it is pinned all the same.
    """
    if show:
        if paths:
            raise click.UsageError("--list takes no PATH.")
        _show(master_address, as_json)
        return
    if not paths:
        raise click.UsageError("Missing PATH, or --list.")
    wanted, result = params.all_absolute(paths), Result()
    replies: list[PinReply] = []
    failed: list[tuple[str, str]] = []

    async def run(client: Client) -> None:
        walk = Walk(client, wanted)
        console = Console(stderr=True)
        async with interruptible(result):
            await count(walk, console)
            # How much it is must be known before it is pinned.
            if not walk.totals.failed:
                replies.append(await client.pin(wanted, dry_run=dry_run))
                if not no_load:
                    await load_all(client, walk, result, concurrency, dry_run, console)
        failed.extend(walk.totals.failed)

    began = time.monotonic()
    run_with_client(master_address, run, with_worker=not no_load, admin=True)
    failed += result.failed
    if replies:
        _tell(wanted, replies[0], result, failed, time.monotonic() - began, no_load, dry_run, as_json)
        if dry_run and replies[0].needed_bytes > replies[0].limit_bytes:
            limits = _limits(replies[0].needed_bytes, replies[0].limit_bytes)
            raise CapacityError(f"it does not fit: {limits}")
    else:
        if as_json:
            print(json.dumps({"paths": wanted, "interrupted": result.interrupted, "failed": failures_of(failed)}))
        print_failures(failed, result.interrupted)
        print("nothing was pinned", file=sys.stderr)
    exit_with(failed, result.interrupted)


def _tell(
    paths: list[str],
    reply: PinReply,
    result: Result,
    failed: list[tuple[str, str]],
    spent_s: float,
    no_load: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json:
        facts: dict[str, Any] = {"paths": paths, **msgspec.to_builtins(reply)}
        facts |= {"dry_run": dry_run} if no_load else facts_of(result, dry_run)
        facts |= {"seconds": spent_s, "interrupted": result.interrupted, "failed": failures_of(failed)}
        print(json.dumps(facts))
        return
    would = "would be pinned" if dry_run else "pinned"
    print(f"{shown_paths(paths)}: {amount(reply.files, reply.bytes)} {would}")
    print(f"all that is pinned: {_limits(reply.needed_bytes, reply.limit_bytes)}")
    if not no_load:
        print_loaded(result, dry_run)
    _warn(reply.unconfirmed)
    print_failures(failed, result.interrupted)


def _limits(needed_bytes: int, limit_bytes: int) -> str:
    return f"{format_size(needed_bytes)} on disk, of {format_size(limit_bytes)} that may be"


def _warn(unconfirmed: list[str]) -> None:
    for name in unconfirmed:
        print(f"worker {name} has not confirmed it yet; it will hear of it", file=sys.stderr)


def _show(master_address: Address | None, as_json: bool) -> None:
    async def run(client: Client) -> None:
        found = await client.pins(sizes=True)
        if as_json:
            print(json.dumps(msgspec.to_builtins(found)))
        else:
            _print(found)

    run_with_client(master_address, run)


def _print(found: PinList) -> None:
    table = Table("path", "files", "size", "cached files", "cached", "since", title="pinned")
    for each in found.pins:
        since = datetime.fromtimestamp(each.pinned_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")
        sizes = (str(each.files), format_size(each.bytes), str(each.cached_files), format_size(each.cached_bytes))
        table.add_row(each.path, *(sizes if each.exists else ("not there now", "", "", "")), since)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"all that is pinned: {_limits(found.needed_bytes, found.limit_bytes)}")


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Only say what would not be pinned any more.")
@master_option
@params.json_option
def unpin(paths: tuple[str, ...], dry_run: bool, master_address: Address | None, as_json: bool) -> None:
    """Let what is at and below pinned paths be evicted again like anything else. It stays until then, or is freed."""
    wanted = params.all_absolute(paths)

    async def run(client: Client) -> None:
        reply = await client.unpin(wanted, dry_run=dry_run)
        if as_json:
            print(json.dumps({"paths": wanted, "dry_run": dry_run, **msgspec.to_builtins(reply)}))
        else:
            print(f"{shown_paths(wanted)}: {'would be ' if dry_run else ''}not pinned any more")
            _warn(reply.unconfirmed)

    run_with_client(master_address, run, admin=True)
