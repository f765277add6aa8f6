"""`cachefs ls`, `stat`, `report`: looking at a running cluster."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
import trio

from cachefs.cli import params
from cachefs.cli.connect import FIRST_CONTACT_S, master_option, run_with_client
from cachefs.cli.instances import the_running_one
from cachefs.cli.quota import COLUMNS as QUOTA_COLUMNS
from cachefs.cli.quota import facts_of as quota_facts
from cachefs.cli.quota import rows_of as quota_rows
from cachefs.cli.tables import print_tables, table_of
from cachefs.cli.troubles import Trouble, troubles_of, worker_troubles
from cachefs.client import Client
from cachefs.model import Attr, Entry, HandshakeError, TransportError, format_size
from cachefs.net import Address, Hello, Security, UnixAddress, open_peer, parse_address
from cachefs.wire.messages import GetWorkerStatus, MasterStatus, WorkerInfo, WorkerStatus
from cachefs.wire.quotas import ListQuotas


@click.command()
@click.argument("path", default="/")
@master_option
@click.option("long", "-l", "--long", is_flag=True, help="Sizes and times too.")
@params.json_option
def ls(path: str, master_address: Address | None, long: bool, as_json: bool) -> None:
    """List a directory of the namespace, as it comes."""

    path = params.absolute(path)

    async def run(client: Client) -> None:
        attr = await client.metadata.resolve(path)
        if not attr.is_dir:
            _print_entry(Entry(path.rstrip("/").rpartition("/")[2], attr), long, as_json)
            return
        async with client.metadata.list_dir(attr.ino) as chunks:
            async for entries in chunks:
                for entry in entries:
                    _print_entry(entry, long, as_json)

    run_with_client(master_address, run)


def _print_entry(entry: Entry, long: bool, as_json: bool) -> None:
    attr = entry.attr
    if as_json:
        print(json.dumps({"name": entry.name, **_facts(attr)}))
    elif long:
        mark = "/" if attr.is_dir else ""
        print(f"{attr.size_bytes:>15} {_time(attr.mtime_ns)} {entry.name}{mark}")
    else:
        print(entry.name)


@click.command()
@click.argument("path")
@master_option
@params.json_option
def stat(path: str, master_address: Address | None, as_json: bool) -> None:
    """Show what is known of a file or directory, and which workers hold it."""

    path = params.absolute(path)

    async def run(client: Client) -> None:
        attr = await client.metadata.resolve(path)
        blocks = client.cluster.geometry.block_count(attr.size_bytes) if attr.key else 0
        holders = [await client.holders(attr, index) for index in range(blocks)]
        facts = {"path": path, **_facts(attr), "blocks": [{"workers": workers} for workers in holders]}
        if as_json:
            print(json.dumps(facts))
            return
        print(f"  path: {path}")
        print(f"  type: {facts['type']}")
        print(f"  size: {attr.size_bytes} ({format_size(attr.size_bytes)})")
        print(f" mtime: {_time(attr.mtime_ns)}")
        print(f" inode: {attr.ino}")
        if attr.key:
            print(f"   key: {attr.key.hex()}")
            for index, workers in enumerate(holders):
                print(f" block {index}: {', '.join(workers) or 'not cached'}")

    run_with_client(master_address, run)


def _facts(attr: Attr) -> dict[str, Any]:
    return {
        "type": "directory" if attr.is_dir else "file",
        "size": attr.size_bytes,
        "mtime_ns": attr.mtime_ns,
        "inode": attr.ino,
        "mode": f"{attr.mode:o}",
        "key": attr.key.hex() or None,
    }


def _time(mtime_ns: int) -> str:
    return datetime.fromtimestamp(mtime_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S")


@click.command()
@master_option
@click.option(
    "--worker-socket",
    metavar="PATH",
    help="Of a worker on this machine, which is asked when the master does not answer. Default: that of the `cachefs "
    "up` on this machine.",
)
@params.json_option
def report(master_address: Address | None, worker_socket: str | None, as_json: bool) -> None:
    """Show the cluster: under-stores, workers, how full the caches are, what they did, and what does not work.

    When the master does not answer, what a worker of this machine can tell, and the status is 1.
    """
    if master_address is None:
        worker_socket = worker_socket or the_running_one().worker_socket

    async def run(client: Client) -> None:
        status = await client.master_status()
        pins = [each.path for each in (await client.pins(sizes=False)).pins]
        quotas = (await client.ask(ListQuotas())).quotas
        workers = [(info, await _worker_status(info, client.security)) for info in status.workers]
        if as_json:
            facts = _report_json(status, workers)
            troubles = [each.facts() for each in troubles_of(status, workers)]
            facts |= {"pins": pins, "quotas": [quota_facts(each) for each in quotas], "troubles": troubles}
            print(json.dumps(facts))
        else:
            _print_report(status, workers)
            if pins:
                print(f"pinned: {', '.join(pins)}; cachefs pin --list tells how much that is")
            if quotas:
                print_tables(table_of(QUOTA_COLUMNS, quota_rows(quotas), "quotas"))

    try:
        run_with_client(master_address, run, patience_s=0.0)
    except HandshakeError:
        raise
    except TransportError as error:
        _report_without_master(error, worker_socket, as_json)
        raise SystemExit(1) from error


def _report_without_master(error: TransportError, worker_socket: str | None, as_json: bool) -> None:
    """What can be told without it."""

    async def ask(socket: str) -> WorkerStatus | None:
        return await _status_at([UnixAddress(socket)], None)

    details = trio.run(ask, worker_socket) if worker_socket is not None else None
    troubles = [Trouble("master", "", "does not answer", 0.0, str(error))]
    if worker_socket is not None:
        troubles += worker_troubles(details.name if details is not None else worker_socket, details)
    if as_json:
        workers = [{"name": details.name, "status": msgspec.to_builtins(details)}] if details is not None else []
        print(json.dumps({"mounts": None, "workers": workers, "troubles": [each.facts() for each in troubles]}))
        return
    if details is not None:
        print_tables(table_of(_WORKER_COLUMNS, _tier_rows(details.name, "", "", details), "workers"))
        print(_opens(details.name, details))
        print(_open_stores(details.name, details))
    for each in troubles:
        print(each)
    if worker_socket is None:
        print("a worker of this machine can be asked with --worker-socket")


async def _worker_status(info: WorkerInfo, security: Security | None) -> WorkerStatus | None:
    """None: it does not answer."""
    if not info.connected:
        return None
    addresses: list[Address] = [UnixAddress(info.socket)]
    address = parse_address(info.address)
    if getattr(address, "port", 0):
        addresses.append(address)
    return await _status_at(addresses, security)


async def _status_at(addresses: list[Address], security: Security | None) -> WorkerStatus | None:
    """Of the first that answers."""
    hello = Hello(role="client")
    for each in addresses:
        try:
            with trio.fail_after(FIRST_CONTACT_S):
                async with open_peer(each, hello, timeout_s=FIRST_CONTACT_S, security=security) as peer:
                    return (await peer.call(GetWorkerStatus())).message
        except (TransportError, trio.TooSlowError):
            continue
    return None


def _report_json(status: MasterStatus, workers: list[tuple[WorkerInfo, WorkerStatus | None]]) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(status)
    for listed, (_, details) in zip(facts["workers"], workers, strict=True):
        listed["status"] = msgspec.to_builtins(details) if details is not None else None
    return facts


def _print_report(status: MasterStatus, workers: list[tuple[WorkerInfo, WorkerStatus | None]]) -> None:
    geometry = status.cluster.geometry
    print(
        f"cluster {status.cluster.cluster_id}, up {_duration(status.uptime_s)},"
        f" pages of {format_size(geometry.page_size)}, blocks of {format_size(geometry.block_size)}"
    )
    columns = ("path", "under-store", "directories", "files", "hidden keys", "served stale")
    numbers = ("directories", "files", "hidden_keys", "serving_stale")
    mounts = [(mount.path, mount.url, *(str(getattr(mount, name)) for name in numbers)) for mount in status.mounts]
    rows: list[tuple[str, ...]] = []
    opens = []
    for info, details in workers:
        if details is None:
            rows.append((info.name, info.state, _labels(info), "does not answer" if info.connected else "away"))
            continue
        rows += _tier_rows(info.name, info.state, _labels(info), details)
        opens.append(_opens(info.name, details))
        opens.append(_open_stores(info.name, details))
    print_tables(table_of(columns, mounts, "mounts"), table_of(_WORKER_COLUMNS, rows, "workers"))
    for line in opens:
        print(line)
    for trouble in troubles_of(status, workers):
        print(trouble)


_WORKER_COLUMNS = (
    *("worker", "state", "labels", "tier", "disk", "used", "pinned", "capacity", "blocks", "evicted"),
    *("from under-store", "not admitted", "corrupt"),
)


def _tier_rows(name: str, state: str, labels: str, details: WorkerStatus) -> list[tuple[str, ...]]:
    counters = details.counters
    return [
        (
            name,
            state,
            labels,
            f"{tier.kind}:{tier.path}",
            tier.state,
            format_size(tier.used_bytes + tier.reserved_bytes),
            format_size(tier.pinned_bytes),
            format_size(tier.capacity_bytes),
            str(tier.blocks),
            str(tier.evictions),
            f"{format_size(counters.under_store_bytes)} in {counters.under_store_reads} reads",
            str(counters.not_admitted),
            str(counters.corrupt),
        )
        for tier in details.tiers
    ]


def _opens(name: str, details: WorkerStatus) -> str:
    opens = details.opens
    return f"opens by the mounts of {name}: {opens.passthrough} by passthrough, {opens.cached} in cached mode"


def _open_stores(name: str, details: WorkerStatus) -> str:
    return f"under-stores that {name} has open: {details.open_stores}"


def _labels(info: WorkerInfo) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"
