"""`cachefs refresh` and `cachefs load`: have the master look at the under-store before somebody needs it."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.client import Client
from cachefs.model import format_size
from cachefs.net import Address
from cachefs.wire.messages import LoadProgress


@click.command()
@click.argument("path", default="/")
@click.option("--recursive", is_flag=True, help="Also every directory below that was listed before.")
@master_option
@params.json_option
def refresh(path: str, recursive: bool, master_address: Address | None, as_json: bool) -> None:
    """Look at the under-store now, instead of when --sync-interval is over: at a file, or at the names of a directory.

    Only names and attributes; mounts are told what changed.
    """

    async def run(client: Client) -> None:
        reply = await client.refresh(path, recursive=recursive)
        if as_json:
            print(json.dumps({"path": path, "directories": reply.directories, "changed": reply.changed}))
        else:
            print(f"{path}: {reply.directories} directories listed, {reply.changed} names changed")

    run_with_client(master_address, run)


@click.command()
@click.argument("path", default="/")
@click.option("--metadata", is_flag=True, help="Names and attributes: the only thing that is loaded so far.")
@master_option
@params.json_option
def load(path: str, metadata: bool, master_address: Address | None, as_json: bool) -> None:
    """List a directory and everything below it, many directories at a time, so that nobody waits for it later.

    What is fresh is not listed again: run it again to go on after an interruption. Exits with status 1 when directories
    could not be listed.
    """
    if not metadata:
        raise click.UsageError("contents cannot be loaded ahead yet; give --metadata to load names and attributes")
    failed: list[tuple[str, str]] = []

    async def run(client: Client) -> None:
        last: LoadProgress | None = None
        console = Console(stderr=True)
        with console.status(f"{path}: listing") as status:
            async with client.load_metadata(path) as stream:
                async for progress in stream:
                    last = progress
                    for where, reason in progress.failed:
                        failed.append((where, reason))
                        console.print(f"{where}: {reason}", markup=False, highlight=False, soft_wrap=True)
                    status.update(f"{path}: {_summary(progress)}")
        assert last is not None
        if as_json:
            facts = {"path": path, "directories": last.directories_done, "files": last.files, "bytes": last.bytes}
            print(json.dumps({**facts, "failed": [{"path": where, "reason": reason} for where, reason in failed]}))
        else:
            print(f"{path}: {_summary(last)}")

    run_with_client(master_address, run)
    if failed:
        print(f"{len(failed)} directories could not be listed", file=sys.stderr)
        sys.exit(1)


def _summary(progress: LoadProgress) -> str:
    directories = f"{progress.directories_done} of {progress.directories_found} directories"
    return f"{directories}, {progress.files} files, {format_size(progress.bytes)}"
