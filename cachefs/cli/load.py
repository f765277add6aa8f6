"""`cachefs load`: have names, or contents too, here before somebody needs them."""

from __future__ import annotations

import json
import time
from typing import Any

import click
from rich.console import Console

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.following import has_worker_here, run_job
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
from cachefs.cli.walk import Totals, Walk
from cachefs.client import Client
from cachefs.model import ConfigError
from cachefs.net import Address
from cachefs.wire.control import JobSpec
from cachefs.wire.messages import PromoteMode


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("--metadata", is_flag=True, help="Names and attributes only.")
@click.option("--from-file", type=click.File(), help="Also the paths in this file, one in a line; - is standard input.")
@concurrency_option
@click.option("--replicas", type=click.IntRange(1, 1000), help="Copies, each on another worker. Makes it a job.")
@click.option("--on", "on", metavar="WORKER", multiple=True, help="Only on these workers; repeatable. Makes it a job.")
@click.option("--spread", is_flag=True, help="Over all workers, each file on one. Makes it a job.")
@click.option(
    "--limit", type=params.RATE, help="Bytes a second over the cluster, such as 200M; 0 = none. Makes it a job."
)
@click.option(
    "--promote",
    type=click.Choice(["always", "if-space"]),
    help="Of a job: whether others are evicted for it. Default: always. Makes it a job.",
)
@click.option("--background", is_flag=True, help="Only begin it: `cachefs job show` tells how far. Makes it a job.")
@click.option("--dry-run", is_flag=True, help="Only say what there is, and what of it is cached.")
@master_option
@params.json_option
def load(
    paths: tuple[str, ...],
    metadata: bool,
    from_file: Any,
    concurrency: int,
    replicas: int | None,
    on: tuple[str, ...],
    spread: bool,
    limit: int | None,
    promote: PromoteMode | None,
    background: bool,
    dry_run: bool,
    master_address: Address | None,
    as_json: bool,
) -> None:
    """Make files and everything below directories local to this node, so that nobody waits for them later.

    Readers are not delayed by it. What is here already is passed over: run it again to go on after an interruption.
    Exits with status 1 when something could not be loaded, and lists exactly what.

    A job of the master instead, where there is no worker on this node, and by some flags: it loads on whichever
    workers, goes on when the master is restarted or this command is interrupted, and makes room by evicting others.
    """
    wanted = params.all_absolute(paths)
    if from_file is not None:
        wanted += params.all_absolute(line for line in from_file.read().splitlines() if line)
        if not wanted:
            raise ConfigError("--from-file", from_file.name, "a file with a path in each line; there is none in it")
    elif not wanted:
        wanted = ["/"]
    as_job = bool(replicas or on or spread or promote or background) or limit is not None
    if as_job and metadata:
        raise ConfigError("--metadata", "given", "no flags of contents with it")
    if spread and on:
        raise ConfigError("--spread", "given", "either --spread or --on")
    if as_job or (not metadata and not has_worker_here(master_address)):
        spec = JobSpec("load", wanted, list(dict.fromkeys(on)), replicas or 1, limit or 0, promote or "always")
        run_job(master_address, spec, dry_run=dry_run, background=background, as_json=as_json)
        return
    result, totals = Result(), Totals()

    async def run(client: Client) -> None:
        nonlocal totals
        walk = Walk(client, wanted)
        totals = walk.totals
        console = Console(stderr=True)
        async with interruptible(result):
            await count(walk, console)
            if not metadata:
                await load_all(client, walk, result, concurrency, dry_run, console)

    began = time.monotonic()
    run_with_client(master_address, run, with_worker=not metadata)
    failed = [*totals.failed, *result.failed]
    _tell(wanted, totals, result, failed, time.monotonic() - began, metadata, dry_run, as_json)
    exit_with(failed, result.interrupted)


def _tell(
    paths: list[str],
    totals: Totals,
    result: Result,
    failed: list[tuple[str, str]],
    spent_s: float,
    metadata: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json:
        facts: dict[str, Any] = {"paths": paths, "files": totals.files, "bytes": totals.bytes}
        if not metadata:
            facts |= facts_of(result, dry_run)
        facts |= {"seconds": spent_s, "interrupted": result.interrupted}
        print(json.dumps({**facts, "failed": failures_of(failed)}))
        return
    print(f"{shown_paths(paths)}: {amount(totals.files, totals.bytes)}")
    if not metadata:
        print_loaded(result, dry_run)
    print_failures(failed, result.interrupted)
