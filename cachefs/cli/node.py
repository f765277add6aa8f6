"""`cachefs node-keeper` and `cachefs node-mounts`: the mounts of a node as a service, for whoever has volumes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import click
import trio

from cachefs.cli import params, server_metrics
from cachefs.cli.common import json_ready_option, log_level_option, supervised_option
from cachefs.cli.lifecycle import Report, run_service, set_up_logging
from cachefs.cli.monitoring import http_option, monitored
from cachefs.cli.mount_options import arguments_of, as_arguments, options_named
from cachefs.cli.mount_records import MountRecord, MountRecords
from cachefs.cli.mount_service import MountService
from cachefs.cli.security import security_arguments, security_of, security_options
from cachefs.cli.settings import Configured
from cachefs.fuse import NODE_KEEPER
from cachefs.metrics import Metric, counter, gauge
from cachefs.model import ConfigError
from cachefs.net import Address, Hello, Role, Service, serve_on, taking_over
from cachefs.policy import Promote

logger = logging.getLogger(__name__)

STATES = ("serving", "starting", "dead")

NODE_METRICS: tuple[Metric[MountService], ...] = (
    gauge(
        "cachefs_node_mounts",
        "Mounts that this node was asked for, by state.",
        lambda service: {(state,): sum(each.state == state for each in service.mounts) for state in STATES},
        "state",
    ),
    counter(
        "cachefs_node_mount_restarts_total",
        "Servers of mounts that were started in the place of one that ended.",
        lambda service: service.restarts,
    ),
)


@click.command("node-keeper")
@click.option("--socket", "socket_path", required=True, metavar="PATH", help="Where to listen.")
@click.pass_context
def node_keeper(ctx: click.Context, socket_path: str) -> None:
    """Keep the mounts of this node, and nothing else: the process that is not upgraded while jobs run.

    It starts a keeper for each mount that `cachefs node-mounts` asks for. Servers of mounts may then be killed and
    exchanged at any time.
    """
    path = os.path.abspath(socket_path)
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError("--socket", socket_path, f"a path where a socket can be made ({error.strerror})") from error
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-I", "-S", NODE_KEEPER, "node-keeper", path])


def _shared(function: params.F) -> params.F:
    """How the mounts behave that do not ask for something else."""
    function.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(function, "__click_params__", []),
        *reversed([option for option in options_named() if option.name not in ("path", "driver", "allow_nonempty")]),
    ]
    return function


@click.command("node-mounts", cls=Configured)
@click.option("--socket", "socket_path", required=True, metavar="PATH", help="Where to listen for who wants mounts.")
@click.option("--keeper-socket", required=True, metavar="PATH", help="--socket of this node's `cachefs node-keeper`.")
@click.option(
    "--state-dir", required=True, metavar="DIR", help="Where it is kept which mounts this node has; made if missing."
)
@click.option("--master", "master_address", type=params.ADDRESS, required=True)
@click.option("--worker-socket", metavar="PATH", help="As of cachefs mount.")
@params.label_option
@click.option("--promote", type=click.Choice([each.value for each in Promote]), help="As of cachefs mount.")
@click.option(
    "static",
    "--mount",
    type=params.HOST_MOUNT,
    multiple=True,
    help="Have this directory of the namespace mounted there, though nobody asks; repeatable.",
)
@_shared
@http_option
@security_options
@log_level_option
@json_ready_option
@supervised_option
@click.pass_context
def node_mounts(
    ctx: click.Context,
    /,
    socket_path: str,
    keeper_socket: str,
    state_dir: str,
    master_address: Address,
    worker_socket: str | None,
    labels: tuple[tuple[str, str], ...],
    promote: str | None,
    static: tuple[tuple[str, str], ...],
    http: Address | None,
    log_level: str,
    as_json: bool,
    supervised_fd: int | None,
    **flags: Any,
) -> None:
    """Mount what is asked for on this node, and keep it served: the service behind the CSI driver.

    It may be ended and started again, also by another version: mounts stay, whoever reads them waits a moment. What it
    was asked for it mounts by itself when it is started again.
    """
    set_up_logging("node-mounts", log_level)
    security_of(Role.CLIENT, Role.CLIENT, serves=False, master=master_address)
    common = [
        *("--master", str(master_address), "--log-level", log_level),
        *(["--worker-socket", worker_socket] if worker_socket is not None else []),
        *(["--promote", promote] if promote is not None else []),
        *(["--http", server_metrics.LISTEN] if http is not None else []),
        *(each for key, value in labels for each in ("--label", f"{key}={value}")),
        *security_arguments(),
        *as_arguments(_asked_for(ctx, flags)),
    ]

    def arguments(record: MountRecord) -> list[str]:
        return [record.mountpoint, *common, "--path", record.path, *arguments_of(record.options)]

    records = MountRecords(state_dir)
    path = os.path.abspath(socket_path)

    async def run(report: Report) -> None:
        async with (
            monitored("node-mounts", http) as shown,
            taking_over(path) as (listener, is_replaced),
            trio.open_nursery() as nursery,
        ):
            mounts = MountService(records, os.path.abspath(keeper_socket), arguments, is_replaced, nursery)
            service = Service()
            mounts.add_to(service)
            if shown.monitor is not None:
                shown.monitor.watch(NODE_METRICS, mounts)
                shown.monitor.ready_if(mounts.why_not_ready)
                shown.monitor.degraded_by(mounts.degraded)
                shown.monitor.answer_for(lambda: server_metrics.ask_servers(mounts.watched()))
            mounts.go_on()
            mounts.have({mountpoint: shows for shows, mountpoint in static})
            report({"socket": path, **shown.facts})
            await serve_on(service, [listener], hello=Hello(role="mounts"))

    run_service("node-mounts", run, supervised_fd, as_json=as_json)


def _asked_for(ctx: click.Context, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Without defaults, which would go before those of a profile that a volume asks for."""
    default = click.core.ParameterSource.DEFAULT
    return {name: value for name, value in flags.items() if ctx.get_parameter_source(name) is not default}
