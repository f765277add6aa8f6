"""`cachefs master` and `cachefs worker`: one process each, in the foreground."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import click
import trio

from cachefs.cli import params
from cachefs.cli.common import json_ready_option, log_level_option, supervised_option, tcp_address
from cachefs.cli.lifecycle import LEAST_OPEN_FILES, Report, run_service, set_up_logging
from cachefs.cli.memory_limit import check_memory_tiers, memory_limit
from cachefs.cli.monitoring import http_option, monitored
from cachefs.cli.restarts import RESTART_METRICS, Restarts, restarts_option
from cachefs.cli.security import security_of, security_options
from cachefs.cli.settings import Configured
from cachefs.master import MasterConfig, run_master
from cachefs.model import ConfigError, format_size
from cachefs.net import Address, Role, TcpAddress
from cachefs.policy import Promote
from cachefs.store import KeepFree, TierConfig, disk_bytes
from cachefs.worker import WorkerConfig, default_name, run_worker

logger = logging.getLogger(__name__)


@click.command(cls=Configured)
@click.option("--data-dir", required=True, metavar="DIR", help="Where the namespace is kept; made if missing.")
@click.option("--listen", type=params.ADDRESS, required=True, help="Where to listen; port 0 takes a free one.")
@click.option(
    "mounts", "--mount", type=params.MOUNT, multiple=True, help="Attach an under-store to the namespace; repeatable."
)
@params.ufs_option
@click.option(
    "--sync-interval",
    type=params.SYNC_INTERVAL,
    default="60s",
    show_default=True,
    help="How long names are believed before the under-store is asked again; 0 always asks, -1 never.",
)
@click.option(
    "--page-size", type=params.PAGE_SIZE, help="Unit of one fetch, 64K to 16M; for a new namespace. Default 8M."
)
@click.option("--block-size", type=params.SIZE, help="Unit of placement; for a new namespace. Default 8G.")
@click.option("--cluster", default="cachefs", show_default=True, help="Name of the cluster that tiers belong to.")
@http_option
@security_options
@log_level_option
@json_ready_option
@restarts_option
@supervised_option
def master(
    data_dir: str,
    listen: Address,
    mounts: tuple[tuple[str, str], ...],
    ufs_options: tuple[tuple[str, str], ...],
    sync_interval: float,
    page_size: int | None,
    block_size: int | None,
    cluster: str,
    http: Address | None,
    log_level: str,
    as_json: bool,
    restarts: tuple[int, int],
    supervised_fd: int | None,
) -> None:
    """Keep the namespace: names, attributes, and which worker holds what."""
    set_up_logging("master", log_level)
    security = security_of(None, Role.WORKER, listen=listen)
    config = MasterConfig(
        data_dir=data_dir,
        listen=tcp_address("--listen", listen),
        mounts=mounts,
        ufs_options=params.collect_ufs_options(ufs_options),
        cluster_id=cluster,
        sync_interval_s=sync_interval,
        security=security,
        block_size=block_size,
        page_size=page_size,
    )
    service = partial(_run_and_report, "master", run_master, config, http, Restarts(*restarts))
    run_service("master", service, supervised_fd, as_json=as_json)


@click.command(cls=Configured)
@click.option("--name", default=default_name, help="Unique in the cluster. Default: the name of the host.")
@click.option("--master", "master_address", type=params.ADDRESS, required=True)
@click.option("--listen", type=params.ADDRESS, required=True, help="Where to listen; port 0 takes a free one.")
@click.option("--socket", required=True, metavar="PATH", help="Unix socket for the mounts of this node.")
@click.option(
    "tiers",
    "--tier",
    type=params.TIER,
    multiple=True,
    required=True,
    help="Where blocks are kept, mem: or ssd:; repeatable, the fastest first.",
)
@click.option(
    "--promote",
    type=click.Choice([each.value for each in Promote]),
    default=Promote.IF_SPACE.value,
    show_default=True,
    help="Whether to keep what is read: always (evicting), if-space, or never.",
)
@click.option(
    "--files-ahead",
    type=click.IntRange(0, 1000),
    default=64,
    show_default=True,
    help="Small files fetched ahead of whoever opens those of a directory in order; 0 = none.",
)
@click.option(
    "--idle-after",
    type=params.DURATION,
    default="30m",
    show_default=True,
    help="What nobody has read for so long counts as free, with all that came with it.",
)
@click.option(
    "--keep-free",
    type=params.KEEP_FREE,
    help="What stays free for others on the file systems of ssd tiers, such as 20G or 15%, whoever fills them. "
    "Default: 1G, or a tenth of a smaller tier.",
)
@params.label_option
@click.option(
    "--advertise",
    type=params.ADDRESS,
    help="Where other workers and mounts of other hosts reach this one. Default: --listen, which must name one address "
    "then, not all of them.",
)
@http_option
@security_options
@log_level_option
@json_ready_option
@restarts_option
@supervised_option
def worker(
    name: str,
    master_address: Address,
    listen: Address,
    socket: str,
    tiers: tuple[TierConfig, ...],
    promote: str,
    files_ahead: int,
    idle_after: float,
    keep_free: KeepFree | None,
    labels: tuple[tuple[str, str], ...],
    advertise: Address | None,
    http: Address | None,
    log_level: str,
    as_json: bool,
    restarts: tuple[int, int],
    supervised_fd: int | None,
) -> None:
    """Keep blocks on this node: fetch what its mounts ask for, verify it, and evict.

    To look at the workers of a running cluster, and to take one out: `cachefs worker list`, `drain NAME`,
    `undrain NAME`, `forget NAME`.
    """
    set_up_logging("worker", log_level)
    security = security_of(Role.WORKER, Role.WORKER, listen=listen, master=master_address)
    config = WorkerConfig(
        name=name,
        master=master_address,
        listen=tcp_address("--listen", listen),
        socket=os.path.abspath(socket),
        tiers=tuple(replace(_with_free(tier, keep_free), idle_after_s=idle_after) for tier in tiers),
        labels=params.collect_labels(labels),
        advertise=_advertised(listen, advertise),
        security=security,
        promote=Promote(promote),
        files_ahead=files_ahead,
    )

    async def service(report: Report) -> None:
        check_memory_tiers(config.tiers, memory_limit())
        _tell_tiers_that_are_too_large(config.tiers)
        await _run_and_report("worker", run_worker, config, http, Restarts(*restarts), report)

    run_service("worker", service, supervised_fd, as_json=as_json, least_open_files=_least_open_files(config))


def _with_free(tier: TierConfig, keep_free: KeepFree | None) -> TierConfig:
    if keep_free is None or tier.kind == "mem":
        return tier
    return replace(tier, free_floor_bytes=keep_free.on_disk_of(tier.path))


def _tell_tiers_that_are_too_large(tiers: Iterable[TierConfig]) -> None:
    """They work all the same, and never become as full as somebody hopes."""
    for tier in tiers:
        size = disk_bytes(tier.path)
        # A tmpfs without a limit says 0.
        if size and tier.capacity_bytes > size - tier.free_floor_bytes:
            message = "a tier is larger than what its disk has for it tier=%s:%s capacity=%s disk=%s kept_free=%s"
            sizes = (tier.capacity_bytes, size, tier.free_floor_bytes)
            logger.warning(message, tier.kind, tier.path, *map(format_size, sizes))


def _least_open_files(config: WorkerConfig) -> int:
    """Each that is fetched has three, and each that is given to others has one and a connection."""
    fetched = config.demand_slots + config.background_slots + config.load_slots + config.ahead_slots
    return LEAST_OPEN_FILES + 4 * (fetched + config.peer_slots)


async def _run_and_report(
    role: str, run: Any, config: Any, http: Address | None, restarts: Restarts, report: Report
) -> None:
    """Run a service and report the addresses it listens on."""
    async with monitored(role, http) as shown, trio.open_nursery() as nursery:
        if shown.monitor is not None:
            shown.monitor.watch(RESTART_METRICS, restarts)
        addresses: list[Address] = await nursery.start(run, config, shown.monitor)
        report({"listen": str(addresses[0]), **shown.facts})


def _advertised(listen: Address, advertise: Address | None) -> str:
    """Empty: where it listens. Raises ConfigError for what leads nobody to this worker."""
    if advertise is not None:
        address = tcp_address("--advertise", advertise)
        if address.port == 0 or _is_wildcard(address.host):
            raise ConfigError("--advertise", str(address), "HOST:PORT that others can connect to, with a port above 0")
        return str(address)
    if isinstance(listen, TcpAddress) and _is_wildcard(listen.host):
        accepted = f"HOST:PORT at which others reach this worker, as --listen {listen} names every address of the host"
        raise ConfigError("--advertise", "not given", accepted)
    return ""


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_unspecified
    except ValueError:
        return False
