"""`cachefs ufs`: under-stores that are attached to the namespace while it is in use."""

from __future__ import annotations

import json
import sys

import click
import msgspec
from rich.console import Console
from rich.table import Table

from cachefs.cli import params
from cachefs.cli.common import confirm
from cachefs.cli.connect import master_option, run_with_client
from cachefs.client import Client
from cachefs.model import ConfigError
from cachefs.net import Address
from cachefs.wire.messages import MountInfo


@click.group()
def ufs() -> None:
    """Under-stores of a running master: attach more, look at them, detach them."""


@ufs.command()
@click.argument("path")
@click.argument("url")
@params.ufs_option
@master_option
@params.json_option
def add(
    path: str, url: str, ufs_options: tuple[tuple[str, str], ...], master_address: Address | None, as_json: bool
) -> None:
    """Attach the under-store at URL at PATH of the namespace, for good: it is there again when the master restarts.

    Every mount shows it at once. PATH lies outside of the other under-stores, or right below the root of one, and is
    no name that exists. The store must answer and be listable. Its options are kept in the master's database, which
    only the master's user can read, and are told to the workers.
    """
    if "://" not in url:
        raise ConfigError("URL", url, "a URL such as s3://BUCKET/PREFIX or file:///DIRECTORY")
    options = params.collect_ufs_options(ufs_options)

    async def run(client: Client) -> None:
        info = await client.add_store(path, url, options)
        print(json.dumps(msgspec.to_builtins(info)) if as_json else f"{info.url} is attached at {info.path}")

    run_with_client(master_address, run, admin=True)


@ufs.command("list")
@master_option
@params.json_option
def list_(master_address: Address | None, as_json: bool) -> None:
    """List the under-stores, where they are attached, and how much is known of each. Credentials are not shown."""

    async def run(client: Client) -> None:
        mounts = sorted((await client.master_status()).mounts, key=lambda each: each.path)
        if as_json:
            print(json.dumps(msgspec.to_builtins(mounts)))
            return
        table = Table("path", "under-store", "directories known", "files known", "attached")
        for each in mounts:
            how = "by ufs add" if each.by_hand else "at the start"
            table.add_row(each.path, each.url, str(each.directories), str(each.files), how)
        Console(width=None if sys.stdout.isatty() else 160).print(table)

    run_with_client(master_address, run)


@ufs.command()
@click.argument("path")
@click.option("--dry-run", is_flag=True, help="Only say what would be detached.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@master_option
@params.json_option
def remove(path: str, dry_run: bool, yes: bool, master_address: Address | None, as_json: bool) -> None:
    """Detach the under-store at PATH, for good: also if the master is told to attach it at its next start.

    Its names are gone from every mount. Nothing in the store is touched, and what is cached of it stays until it is
    evicted, or freed before. Asks first, if there is a terminal to ask at.
    """

    found: list[MountInfo] = []

    async def look(client: Client) -> None:
        found.append(await client.remove_store(path, dry_run=True))

    async def detach(client: Client) -> None:
        await client.remove_store(path)

    run_with_client(master_address, look, admin=True)
    (info,) = found
    if not dry_run:
        if not yes:
            _ask(info)
        run_with_client(master_address, detach, admin=True)
    if as_json:
        print(json.dumps({**msgspec.to_builtins(info), "dry_run": dry_run}))
    else:
        print(f"{_described(info)} {'would be' if dry_run else 'is'} detached; nothing in it is touched")


def _ask(info: MountInfo) -> None:
    confirm(f"Detach {_described(info)}? Jobs that read it will get errors.")


def _described(info: MountInfo) -> str:
    return f"{info.path} ({info.url}, {info.files} files and {info.directories} directories known)"
