"""`cachefs refresh`: have the master look at the under-store before somebody needs it."""

from __future__ import annotations

import json

import click

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.client import Client
from cachefs.net import Address


@click.command()
@click.argument("path", default="/")
@click.option("--recursive", is_flag=True, help="Also every directory below that was listed before.")
@master_option
@params.json_option
def refresh(path: str, recursive: bool, master_address: Address | None, as_json: bool) -> None:
    """Look at the under-store now, instead of when --sync-interval is over: at a file, or at the names of a directory.

    Only names and attributes; mounts are told what changed.
    """

    path = params.absolute(path)

    async def run(client: Client) -> None:
        reply = await client.refresh(path, recursive=recursive)
        if as_json:
            print(json.dumps({"path": path, "directories": reply.directories, "changed": reply.changed}))
        else:
            print(f"{path}: {reply.directories} directories listed, {reply.changed} names changed")

    run_with_client(master_address, run, admin=True)
