"""`cachefs-csi`: the command line of the driver."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import click
import trio

from cachefs.cli import params
from cachefs.cli.common import json_ready_option, log_level_option, supervised_option
from cachefs.cli.lifecycle import Report, run_service, set_up_logging
from cachefs.cli.monitoring import Shown, http_option, monitored
from cachefs.cli.security import security_options, security_to_ask
from cachefs.client.volumes import open_volumes
from cachefs.fuse.mounts_client import open_node_mounts
from cachefs.model import CachefsError, ConfigError
from cachefs.net import Address, Security
from cachefs_csi.controller import Controller
from cachefs_csi.identity import Identity
from cachefs_csi.node import Node, NodeConfig
from cachefs_csi.node_volumes import NodeVolumes
from cachefs_csi.server import CSI_METRICS, endpoint_of, serving, until_ended

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_MOST_NODE_ID_BYTES = 256
_PATIENCE_S = 10.0
"""What is away longer (master, mount service) fails a call, which Kubernetes repeats."""
_PROBE_PATIENCE_S = 1.0
"""For probes: less than who asks for readiness waits, so that it is told why."""


class _Group(click.Group):
    """Errors made on purpose are told in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except CachefsError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """The CSI driver of cachefs: volumes of Kubernetes. Which processes belong together is in docs/kubernetes.md."""


def _shared(function: params.F) -> params.F:
    options: list[Callable[[params.F], params.F]] = [
        click.option("--endpoint", required=True, metavar="unix:///PATH", help="The socket to make and serve."),
        click.option("--master", "master_address", type=params.ADDRESS, required=True),
        click.option("--driver-name", default="csi.cachefs.io", show_default=True, help="As in the CSIDriver object."),
        http_option,
        security_options,
        log_level_option,
        json_ready_option,
        supervised_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@main.command()
@_shared
def controller(
    endpoint: str,
    master_address: Address,
    driver_name: str,
    http: Address | None,
    log_level: str,
    as_json: bool,
    supervised_fd: int | None,
) -> None:
    """Make, resize and remove volumes at the master: one for the whole cluster."""
    set_up_logging("csi-controller", log_level)
    path, security = endpoint_of(endpoint), security_to_ask(master_address, admin=True)
    _check_name(driver_name)

    async def run(report: Report) -> None:
        async def serve(ending: trio.Event) -> None:
            async with (
                monitored("csi-controller", http) as shown,
                open_volumes(master_address, security, patience_s=_PATIENCE_S) as volumes,
            ):
                asked = volumes.with_patience(_PROBE_PATIENCE_S)
                identity = Identity(driver_name, lambda: asked.list(limit=1))
                await _answer(path, identity, {"Controller": Controller(volumes)}, shown, report, ending)

        await until_ended(serve)

    run_service("csi-controller", run, supervised_fd, as_json=as_json)


@main.command()
@_shared
@click.option("--node-id", required=True, help="The name of this node in Kubernetes.")
@click.option("--mounts-socket", required=True, metavar="PATH", help="--socket of this node's `cachefs node-mounts`.")
@click.option(
    "--may-attach",
    is_flag=True,
    help="Static volumes may name an under-store, and volumes that were made take the Secret of a stage; needs the "
    "token of an admin.",
)
@click.option(
    "--inline-urls",
    is_flag=True,
    help="Volumes in the description of a pod may name an under-store; needs the token of an admin. Whoever may make "
    "pods may attach under-stores then.",
)
@click.option(
    "--inline-dir",
    metavar="DIR",
    help="Where mounts of single pods are made, at the same path here and for the mount service. Default: "
    "/var/lib/kubelet/plugins/DRIVER-NAME/inline.",
)
@click.option(
    "--max-volumes", type=click.IntRange(0, 2**31 - 1), default=0, help="Of this node; 0: as many as there are."
)
@click.option(
    "labels", "--label", type=params.LABEL, multiple=True, help="Topology of this node, such as zone=a; repeatable."
)
def node(
    endpoint: str,
    master_address: Address,
    driver_name: str,
    http: Address | None,
    log_level: str,
    as_json: bool,
    supervised_fd: int | None,
    node_id: str,
    mounts_socket: str,
    may_attach: bool,
    inline_urls: bool,
    inline_dir: str | None,
    max_volumes: int,
    labels: tuple[tuple[str, str], ...],
) -> None:
    """Bring volumes to the pods of this node. It may be ended and started again at any time: mounts stay."""
    set_up_logging("csi-node", log_level)
    path = endpoint_of(endpoint)
    security: Security | None = security_to_ask(master_address, admin=may_attach or inline_urls)
    _check_name(driver_name)
    if not 0 < len(node_id.encode()) <= _MOST_NODE_ID_BYTES:
        raise ConfigError("--node-id", node_id, f"1 to {_MOST_NODE_ID_BYTES} bytes")
    config = NodeConfig(node_id, driver_name, may_attach, inline_urls, max_volumes, dict(labels))
    own = os.path.abspath(inline_dir or f"/var/lib/kubelet/plugins/{driver_name}/inline")

    async def run(report: Report) -> None:
        async def serve(ending: trio.Event) -> None:
            async with (
                monitored("csi-node", http) as shown,
                open_volumes(master_address, security, patience_s=_PATIENCE_S) as volumes,
                open_node_mounts(os.path.abspath(mounts_socket), patience_s=_PATIENCE_S) as mounts,
            ):
                identity = Identity(driver_name, mounts.with_patience(_PROBE_PATIENCE_S).list)
                on_node = Node(config, volumes, mounts, NodeVolumes(mounts, own))
                await _answer(path, identity, {"Node": on_node}, shown, report, ending)

        await until_ended(serve)

    run_service("csi-node", run, supervised_fd, as_json=as_json)


async def _answer(
    path: str, identity: Identity, services: Mapping[str, object], shown: Shown, report: Report, ending: trio.Event
) -> None:
    """Calls of these services and of the identity's, on the socket, until it is to end."""
    async with serving(path, {"Identity": identity, **services}) as calls:
        if shown.monitor is not None:
            shown.monitor.watch(CSI_METRICS, calls)
            shown.monitor.ready_if(identity.why_not_ready)
        report({"socket": path, **shown.facts})
        await ending.wait()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError("--driver-name", name, "a domain name of at most 63 characters, such as csi.cachefs.io")


if __name__ == "__main__":
    main()
