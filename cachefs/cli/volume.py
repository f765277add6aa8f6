"""`cachefs volume`: what orchestrators made in a running master, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from cachefs.cli import params
from cachefs.cli.common import confirm
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.tables import print_tables, table_of
from cachefs.client import Client
from cachefs.model import format_size, volume_id
from cachefs.net import Address
from cachefs.wire.volumes import DeleteVolume, GetVolume, ListVolumes, VolumeInfo


@click.group()
def volume() -> None:
    """Volumes: what Kubernetes, or another orchestrator, made for its jobs in a running master."""


@volume.command("list")
@master_option
@params.json_option
def list_(master_address: Address | None, as_json: bool) -> None:
    """List all volumes: where each is in the namespace, its under-store, and its quota. Credentials are not shown."""

    async def run(client: Client) -> None:
        volumes = await _all(client)
        if as_json:
            print(json.dumps([facts_of(each) for each in volumes]))
        else:
            print_tables(table_of(COLUMNS, rows_of(volumes)))

    run_with_client(master_address, run)


_ID = re.compile(r"vol-[0-9a-f]{32}")

COLUMNS = ("id", "name", "path", "under-store", "quota", "used", "since")


def rows_of(volumes: Sequence[VolumeInfo]) -> list[tuple[str, ...]]:
    return [
        (
            each.id,
            each.name,
            each.path,
            each.url,
            format_size(each.quota_bytes) if each.quota_bytes else "none",
            format_size(each.used_bytes) if each.quota_bytes else "",
            _time(each),
        )
        for each in volumes
    ]


def facts_of(info: VolumeInfo) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(info)
    return facts


@volume.command()
@click.argument("volume", metavar="ID_OR_NAME")
@master_option
@params.json_option
def show(volume: str, master_address: Address | None, as_json: bool) -> None:
    """Show one volume, with the context that whoever made it keeps there."""

    async def run(client: Client) -> None:
        info = await _find(client, volume)
        if as_json:
            print(json.dumps(facts_of(info)))
            return
        quota = "none"
        if info.quota_bytes:
            quota = f"{format_size(info.quota_bytes)}, {format_size(info.used_bytes)} used"
        rows = [
            ("id", info.id),
            ("name", info.name),
            ("path", info.path),
            ("under-store", info.url or "none of its own"),
            ("quota", quota),
            ("since", _time(info)),
            *((f"context {key}", value) for key, value in sorted(info.context.items())),
        ]
        for key, value in rows:
            print(f"{key}: {value}")

    run_with_client(master_address, run)


@volume.command()
@click.argument("volume", metavar="ID_OR_NAME")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@master_option
@params.json_option
def remove(volume: str, dry_run: bool, yes: bool, master_address: Address | None, as_json: bool) -> None:
    """Remove a volume: the under-store that was attached for it, and its quota.

    Its names are gone from every mount. Nothing in the store is touched, and what is cached of it stays until it is
    evicted, or freed before. Not for volumes of an orchestrator that still knows them: have them removed there. Asks
    first, if there is a terminal to ask at.
    """
    found: list[VolumeInfo] = []

    async def look(client: Client) -> None:
        found.append(await _find(client, volume))

    async def delete(client: Client) -> None:
        await client.ask(DeleteVolume(info.id))

    run_with_client(master_address, look, admin=True)
    (info,) = found
    if not dry_run:
        if not yes:
            _ask(info)
        run_with_client(master_address, delete, admin=True)
    if as_json:
        print(json.dumps({**facts_of(info), "dry_run": dry_run}))
    else:
        would = "would be" if dry_run else "is"
        print(f"{_described(info)} {would} removed; no object is touched")


async def _all(client: Client) -> list[VolumeInfo]:
    found: list[VolumeInfo] = []
    after = ""
    while True:
        part = await client.ask(ListVolumes(after))
        found += part.volumes
        if not part.next:
            return found
        after = part.next


async def _find(client: Client, text: str) -> VolumeInfo:
    """Raises NotFoundError."""
    return await client.ask(GetVolume(text if _ID.fullmatch(text) else volume_id(text)))


def _ask(info: VolumeInfo) -> None:
    confirm(f"Remove {_described(info)}? Jobs that read it will get errors.")


def _described(info: VolumeInfo) -> str:
    return f"{info.id} ({info.name}, {info.path}, {info.url or 'a directory of the namespace'})"


def _time(info: VolumeInfo) -> str:
    return datetime.fromtimestamp(info.created_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
