"""`cachefs worker list|drain|undrain|forget`: the workers of a running cluster."""

from __future__ import annotations

import json

import click
import msgspec

from cachefs.cli import params
from cachefs.cli.connect import master_option, run_with_client
from cachefs.cli.following import background_option, run_job
from cachefs.cli.tables import print_tables, table_of
from cachefs.client import Client
from cachefs.model import format_duration, format_size
from cachefs.net import Address
from cachefs.wire.control import ForgetWorker, JobSpec, UndrainWorker
from cachefs.wire.messages import WorkerInfo


@click.group("worker")
def workers() -> None:
    """Workers of a running cluster."""


@workers.command("list")
@master_option
@params.json_option
def list_(master_address: Address | None, as_json: bool) -> None:
    """List all workers that ever joined and were not forgotten."""

    async def run(client: Client) -> None:
        found = (await client.master_status()).workers
        if as_json:
            print(json.dumps([_facts(each) for each in found]))
            return
        columns = ("name", "state", "alive", "address", "labels", "blocks", "bytes", "capacity", "room", "heard")
        print_tables(table_of(columns, [_row(each) for each in found]))

    run_with_client(master_address, run)


def _facts(info: WorkerInfo) -> dict[str, object]:
    facts: dict[str, object] = msgspec.to_builtins(info)
    facts["alive"] = facts.pop("connected")
    facts["bytes"] = facts.pop("block_bytes")
    return facts


def _row(info: WorkerInfo) -> tuple[str, ...]:
    return (
        info.name,
        info.state,
        "yes" if info.connected else "no",
        info.address,
        ", ".join(f"{name}={value}" for name, value in sorted(info.labels.items())),
        str(info.blocks),
        format_size(info.block_bytes),
        format_size(info.capacity_bytes),
        format_size(info.room_bytes) if info.connected else "",
        f"{format_duration(int(info.heard_s))} ago" if info.heard_s >= 0 else "",
    )


@workers.command()
@click.argument("name")
@background_option
@click.option("--dry-run", is_flag=True, help="Only say what would be moved.")
@master_option
@params.json_option
def drain(name: str, background: bool, dry_run: bool, master_address: Address | None, as_json: bool) -> None:
    """Have a worker take nothing new, and copy what only it holds to others that have room.

    It goes on serving what it has. What fits nowhere stays on it and is told, with exit status 1; else it is drained,
    and can be stopped without a byte of the cache being lost. A job of the master: Ctrl-C leaves it running.
    """
    run_job(master_address, JobSpec("drain", workers=[name]), dry_run=dry_run, background=background, as_json=as_json)


@workers.command()
@click.argument("name")
@master_option
@params.json_option
def undrain(name: str, master_address: Address | None, as_json: bool) -> None:
    """Have a worker take blocks again; draining it ends."""

    async def run(client: Client) -> None:
        await client.ask(UndrainWorker(name))
        print(json.dumps({"name": name, "state": "active"}) if as_json else f"{name} takes blocks")

    run_with_client(master_address, run, admin=True)


@workers.command()
@click.argument("name")
@master_option
@params.json_option
def forget(name: str, master_address: Address | None, as_json: bool) -> None:
    """Forget a worker that is away for good, and what it was said to hold. Should it come back, it joins anew."""

    async def run(client: Client) -> None:
        await client.ask(ForgetWorker(name))
        print(json.dumps({"name": name, "forgotten": True}) if as_json else f"{name} is forgotten")

    run_with_client(master_address, run, admin=True)
