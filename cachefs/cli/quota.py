"""`cachefs quota`: what a directory's contents may take in all caches together."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.tables import print_tables, table_of
from cachefs.client import Client
from cachefs.model import ConfigError, format_size
from cachefs.net import Address
from cachefs.wire.quotas import MOST_BYTES, ListQuotas, QuotaInfo, RemoveQuota, SetQuota


@click.group()
def quota() -> None:
    """Quotas: what a directory, with everything below it, may take in the caches of all workers together."""


@quota.command("set")
@click.argument("path")
@click.argument("size", type=params.SIZE)
@master_option
@params.json_option
def set_(path: str, size: int, master_address: Address | None, as_json: bool) -> None:
    """Let a directory take at most SIZE, such as 500G, in all caches together; what appears there later counts too.

    What finds no room is read all the same, and not kept. Nothing in use is dropped where more is cached already:
    nothing new is kept there until it is less, and it is given up first when others need room. A quota that is set gets
    the new SIZE. Below one, others can be set: both hold. Refused where more than SIZE is pinned.
    """
    wanted = params.absolute(path)
    if size > MOST_BYTES:
        raise ConfigError("SIZE", size, f"at most {format_size(MOST_BYTES)}")

    async def run(client: Client) -> None:
        info = await client.ask(SetQuota(wanted, size))
        if as_json:
            print(json.dumps(facts_of(info)))
            return
        print(
            f"{info.path}: at most {format_size(info.limit_bytes)} in all caches, {format_size(info.used_bytes)} used"
        )
        if info.used_bytes > info.limit_bytes:
            over = format_size(info.used_bytes - info.limit_bytes)
            print(f"that is {over} over it: nothing new is kept there until it is less; cachefs free drops what is")
        _warn(info)

    run_with_client(master_address, run, admin=True)


@quota.command("list")
@master_option
@params.json_option
def list_(master_address: Address | None, as_json: bool) -> None:
    """List all quotas: how much of each is used, as workers said within a second, and how often one was used up."""

    async def run(client: Client) -> None:
        quotas = (await client.ask(ListQuotas())).quotas
        if as_json:
            print(json.dumps([facts_of(each) for each in quotas]))
        else:
            print_tables(table_of(COLUMNS, rows_of(quotas)))

    run_with_client(master_address, run)


COLUMNS = ("path", "limit", "used", "", "refused", "since")


def rows_of(quotas: Sequence[QuotaInfo]) -> list[tuple[str, ...]]:
    return [
        (
            each.path if each.exists else f"{each.path} (not there now)",
            format_size(each.limit_bytes),
            format_size(each.used_bytes),
            f"{each.used_bytes / each.limit_bytes:.0%}" if each.limit_bytes else "",
            str(each.refused),
            datetime.fromtimestamp(each.set_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S"),
        )
        for each in quotas
    ]


def facts_of(info: QuotaInfo) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(info)
    return facts


@quota.command()
@click.argument("path")
@click.option("--dry-run", is_flag=True, help="Only say which quota would be removed.")
@master_option
@params.json_option
def remove(path: str, dry_run: bool, master_address: Address | None, as_json: bool) -> None:
    """Remove the quota of a directory. What is cached stays, and is bounded by quotas above it alone."""
    wanted = params.absolute(path)

    async def run(client: Client) -> None:
        info = await client.ask(RemoveQuota(wanted, dry_run))
        if as_json:
            print(json.dumps({**facts_of(info), "dry_run": dry_run}))
            return
        would = "would have" if dry_run else "has"
        print(f"{info.path}: {would} no quota any more; it was {format_size(info.limit_bytes)}")
        _warn(info)

    run_with_client(master_address, run, admin=True)


def _warn(info: QuotaInfo) -> None:
    for name in info.unconfirmed:
        print(f"worker {name} has not confirmed it yet; it will hear of it", file=sys.stderr)
