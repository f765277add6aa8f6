"""`cachefs free`: take contents out of this node's cache. The under-store is not touched."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click
from rich.console import Console

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.following import has_worker_here, run_job
from cachefs.cli.loading import count, failures_of
from cachefs.cli.progress import HowFar, shown
from cachefs.cli.walk import File, Walk
from cachefs.client import Client
from cachefs.model import BlockId, ConfigError, TransportError, format_size
from cachefs.net import Address
from cachefs.wire.control import JobSpec

_BATCH = 500


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--everywhere", is_flag=True, help="On all workers. So it is where there is none on this node.")
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@master_option
@params.json_option
def free(
    paths: tuple[str, ...], everywhere: bool, dry_run: bool, master_address: Address | None, as_json: bool
) -> None:
    """Drop what is cached on this node of files and of everything below directories.

    Nothing in the under-store is touched: what is read again is fetched again. What somebody has open stays, and so
    does what is cached in part, and what is pinned; a path that is pinned as a whole is refused.
    """
    wanted = params.all_absolute(paths)
    if everywhere or not has_worker_here(master_address, admin=True):
        run_job(master_address, JobSpec("free", wanted), dry_run=dry_run, as_json=as_json)
        return
    blocks = freed_bytes = in_use = pinned = 0
    failed: list[tuple[str, str]] = []
    unconfirmed: list[tuple[str, str]] = []

    async def run(client: Client) -> None:
        nonlocal blocks, freed_bytes, in_use, pinned
        pins = [each.path for each in (await client.pins(sizes=False)).pins]
        _check_not_pinned(wanted, pins)
        walk = Walk(client, wanted)
        console = Console(stderr=True)
        await count(walk, console)
        looked_at = 0
        batch: list[BlockId] = []

        async def send() -> None:
            nonlocal blocks, freed_bytes, in_use, pinned
            if unconfirmed:
                # It has been waited for once.
                batch.clear()
                return
            try:
                reply = await client.free(batch)
            except TransportError as error:
                chosen = client.workers.chosen
                unconfirmed.append((chosen.candidate.name if chosen is not None else "", str(error)))
                return
            blocks += reply.freed_blocks
            freed_bytes += reply.freed_bytes
            in_use += reply.in_use
            pinned += reply.pinned
            batch.clear()

        async def visit(file: File) -> None:
            nonlocal blocks, freed_bytes, pinned, looked_at
            attr = file.attr
            looked_at += 1
            if not attr.key or not attr.size_bytes:
                return
            if dry_run:
                fd = client.open_sealed(attr)
                if fd is not None:
                    os.close(fd)
                    if _pin_of(file.path, pins) is not None:
                        pinned += 1
                        return
                    blocks, freed_bytes = blocks + 1, freed_bytes + attr.size_bytes
                return
            for index in range(client.cluster.geometry.block_count(attr.size_bytes)):
                batch.append(BlockId(attr.key, index))
                if len(batch) == _BATCH:
                    await send()

        def look() -> HowFar:
            text = f"{looked_at} of {walk.totals.files} files, {blocks} blocks, {format_size(freed_bytes)}"
            return HowFar(text, looked_at, walk.totals.files)

        async with shown(console, "freeing", look):
            await walk.each(visit)
            if batch:
                await send()
        failed.extend(walk.totals.failed)

    run_with_client(master_address, run, with_worker=True, admin=True)
    if as_json:
        facts = {"blocks": blocks, "bytes": freed_bytes, "in_use": in_use, "pinned": pinned, "dry_run": dry_run}
        told = {"unconfirmed": [name for name, _ in unconfirmed], "failed": failures_of(failed)}
        print(json.dumps({**facts, **told}))
    else:
        would = "would be freed" if dry_run else "freed"
        print(f"{blocks} blocks, {format_size(freed_bytes)} {would}")
        if in_use:
            print(f"{in_use} are in use and stay")
        if pinned:
            print(f"{pinned} are pinned and stay; see cachefs pin --list")
        for path, reason in failed:
            click.echo(f"{path}: {reason}", err=True)
    for _, reason in unconfirmed:
        click.echo(f"{reason}: what is counted is what it has confirmed, the rest may be freed or not", err=True)
    if failed or unconfirmed:
        raise SystemExit(1)


def _check_not_pinned(paths: Sequence[str], pins: Sequence[str]) -> None:
    """Raises ConfigError."""
    for path in paths:
        by = _pin_of(path, pins)
        if by is not None:
            raise ConfigError("PATH", path, f"a path that is not pinned: cachefs unpin {by} comes first")


def _pin_of(path: str, pins: Sequence[str]) -> str | None:
    """The pin that a path lies at or below."""
    whole = "/" + "/".join(part for part in path.split("/") if part) + "/"
    return next((each for each in pins if whole.startswith(each.rstrip("/") + "/")), None)
