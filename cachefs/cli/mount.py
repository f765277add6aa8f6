"""`cachefs mount`: it becomes the keeper of the mount, which starts the server (`cachefs mount-server`)."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from typing import Any, NoReturn

import click
import trio

from cachefs.cli import params
from cachefs.cli.common import json_ready_option, log_level_option, supervised_option, tcp_address
from cachefs.cli.instances import runtime_root
from cachefs.cli.lifecycle import (
    ENDED_WELL,
    LEAST_OPEN_FILES,
    Report,
    keep_tables_apart,
    leaves,
    run_service,
    set_up_logging,
)
from cachefs.cli.monitoring import Shown, http_option, monitored, shown_if_possible, shown_later
from cachefs.cli.mount_options import as_arguments, by_flag, mount_config, mount_options, with_profile
from cachefs.cli.security import security_arguments, security_of, security_options
from cachefs.cli.settings import Configured
from cachefs.fuse import FS_TYPE, ChosenMode, Driver, Mount, MountConfig, MountInfo, find_mount, run_mount
from cachefs.fuse.keeping import (
    KeeperLink,
    ask,
    command_file,
    has_finished,
    keeper_command,
    listen,
    listen_nowhere,
    parse_facts,
    socket_of,
)
from cachefs.model import CachefsError, ConfigError
from cachefs.net import Address, Role, TcpAddress, open_background
from cachefs.policy import Promote

logger = logging.getLogger(__name__)


class _NeededToServe(click.Option):
    """Required, unless nothing is served."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        self.required = not (ctx.params.get("upgrade") or ctx.params.get("keep_only"))
        try:
            return super().process_value(ctx, value)
        finally:
            self.required = True


_SERVED = (
    click.argument("mountpoint"),
    click.option("--master", "master_address", type=params.ADDRESS, required=True, cls=_NeededToServe),
    click.option("--worker-socket", metavar="PATH", help="Default: that of the worker the master knows on this node."),
    click.option(
        "--worker",
        "worker_address",
        type=params.ADDRESS,
        help="Read through this worker as long as it is there, on whatever host. Default: that of this node, or else "
        "the nearest by its labels.",
    ),
    params.label_option,
    click.option(
        "--promote",
        type=click.Choice([each.value for each in Promote]),
        show_default="that of the worker",
        help="Whether the worker keeps what is read through this mount.",
    ),
    mount_options,
    http_option,
    security_options,
    log_level_option,
    json_ready_option,
    supervised_option,
)
"""What a server is told."""


def _served(function: params.F) -> params.F:
    for option in reversed(_SERVED):
        function = option(function)
    return function


@click.command(cls=Configured)
@_served
@click.option(
    "--upgrade",
    is_flag=True,
    is_eager=True,
    help="Have a server of this version go on with what is mounted on MOUNTPOINT, with the flags it has; jobs notice "
    "nothing. If it does not come up, the old one stays.",
)
@click.option(
    "--keep-only",
    is_flag=True,
    is_eager=True,
    help="Only keep the mount, for servers that are started by themselves: cachefs mount MOUNTPOINT --keeper-socket "
    "PATH.",
)
@click.option(
    "--keeper-socket",
    metavar="PATH",
    help="With --keep-only: where to listen. Without: serve what the keeper at this socket keeps; from a server that "
    "does so already, take over.",
)
@click.pass_context
def mount(
    ctx: click.Context,
    /,
    mountpoint: str,
    upgrade: bool,
    keep_only: bool,
    keeper_socket: str | None,
    **values: Any,
) -> None:
    """Mount the namespace, read only, and serve it until it is unmounted.

    Two processes do: a small one keeps the mount, and a server answers. If either dies, the other starts it again, and
    whoever reads notices a pause at most.
    """
    set_up_logging("mount", values["log_level"])
    if upgrade:
        _upgrade(mountpoint)
        return
    kept = {"hung": f"{values['hung_after']:g}"}
    if keep_only:
        _become_keeper(mountpoint, {**kept, "mode": "keep"}, [], values["supervised_fd"], keeper_socket)
    config = _config(ctx, mountpoint, values)
    if config.driver is not Driver.KERNEL:
        # libfuse has the device to itself.
        if keeper_socket is not None:
            raise ConfigError("--keeper-socket", keeper_socket, "nothing with the driver pyfuse3, which has no keeper")
        _run(config, values, None)
        return
    arguments = _arguments(ctx, values)
    if keeper_socket is None:
        _become_keeper(mountpoint, {**kept, "mode": "spawn"}, arguments, values["supervised_fd"], None)
    link = _connect(keeper_socket)
    os.set_inheritable(link.fileno(), True)
    if values["supervised_fd"] is not None:
        os.set_inheritable(values["supervised_fd"], True)
    number = str(link.detach())
    _execute([each.replace("{keeper}", number) for each in server_command(mountpoint, arguments)])


@click.command("mount-server", cls=Configured, hidden=True)
@_served
@click.option("--keeper", "keeper_fd", type=int, required=True)
@click.pass_context
def mount_server(ctx: click.Context, /, mountpoint: str, keeper_fd: int, **values: Any) -> None:
    """Serve what a keeper keeps. Started by one."""
    set_up_logging("mount", values["log_level"])
    with closing(KeeperLink(socket.socket(fileno=keeper_fd), mountpoint)) as keeper:
        _run(_config(ctx, mountpoint, values), values, keeper)
        keeper.end_if_left()


def _config(ctx: click.Context, mountpoint: str, values: dict[str, Any]) -> MountConfig:
    master, worker_socket, worker_address = values["master_address"], values["worker_socket"], values["worker_address"]
    addresses = {"master": master}
    if worker_address is not None:
        if worker_socket is not None:
            raise ConfigError("--worker-socket", worker_socket, "without --worker: a mount reads through one of them")
        addresses["worker"] = tcp_address("--worker", worker_address)
    security = security_of(Role.CLIENT, Role.CLIENT, serves=False, **addresses)
    flags = with_profile(ctx, _flags(values))
    config = mount_config(mountpoint, master, worker_socket, flags, promote=values["promote"])
    client = replace(
        config.client,
        security=security,
        worker_address=worker_address,
        anywhere=True,
        labels=params.collect_labels(values["labels"]),
    )
    return replace(config, client=client)


_OTHER = {
    *("master_address", "worker_socket", "worker_address", "labels", "promote"),
    *("http", "log_level", "as_json", "supervised_fd"),
}


def _flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `mount_options`."""
    return {name: value for name, value in values.items() if name not in _OTHER}


def _arguments(ctx: click.Context, values: Mapping[str, Any]) -> list[str]:
    """What the server is told: everything, so that it looks into no file and no environment, now and later."""
    named = {
        "--master": values["master_address"],
        "--worker-socket": values["worker_socket"],
        "--worker": values["worker_address"],
        "--promote": values["promote"],
        "--http": values["http"],
        "--log-level": values["log_level"],
        "--supervised": values["supervised_fd"],
    }
    return [
        *(each for name, value in named.items() if value is not None for each in (name, str(value))),
        *(each for key, value in values["labels"] for each in ("--label", f"{key}={value}")),
        *as_arguments(with_profile(ctx, _flags(values))),
        *security_arguments(),
        *(["--json"] if values["as_json"] else []),
    ]


# ---- the server ------------------------------------------------------------------------------------------------------


def _run(config: MountConfig, values: Mapping[str, Any], keeper: KeeperLink | None) -> None:
    is_successor = keeper is not None and keeper.facts() is not None
    http: Address | None = values["http"]

    async def service(report: Report) -> None:
        show = monitored
        if is_successor:
            # A port that is chosen is free, also while the one before it has not ended.
            show = shown_if_possible if isinstance(http, TcpAddress) and http.port == 0 else shown_later
        async with _kept_by(keeper), show("mount", http) as shown:
            await serve(report, shown)
        if values["supervised_fd"] is not None and keeper is not None and not keeper.hands_over:
            with suppress(OSError):
                os.write(values["supervised_fd"], ENDED_WELL)

    async def serve(report: Report, shown: Shown) -> None:
        def ready(mounted: Mount, chosen: ChosenMode) -> None:
            shown.begin()
            if is_successor and keeper is not None and not keeper.connects:
                return  # it was said by the first
            report(
                {
                    "mountpoint": mounted.mountpoint,
                    "driver": config.driver.value,
                    "open_mode": chosen.mode.value,
                    "why": chosen.why,
                    **({"notes": "; ".join(chosen.notes)} if chosen.notes else {}),
                    "connection": mounted.connection,
                    **shown.facts,
                }
            )

        try:
            await run_mount(config, ready, shown.monitor, keeper)
        except* ConfigError as group:
            error = leaves(group)[0]
            assert isinstance(error, ConfigError)
            raise by_flag(error) from group

    keep_tables_apart()
    # Each request that is carried out may have a descriptor on its way, in the half that is not for those that stay:
    # see `PassedFiles`.
    least = LEAST_OPEN_FILES + 2 * config.session.max_tasks
    run_service("mount", service, values["supervised_fd"], as_json=values["as_json"], least_open_files=least)


@asynccontextmanager
async def _kept_by(keeper: KeeperLink | None) -> AsyncGenerator[None, None]:
    """Do what the keeper says: also end the block."""
    if keeper is None:
        yield
        return
    async with open_background() as nursery:
        nursery.start_soon(keeper.follow)
        with trio.CancelScope() as scope:
            keeper.on_end = scope.cancel
            yield


# ---- the keeper ------------------------------------------------------------------------------------------------------


def server_command(mountpoint: str, arguments: Sequence[str]) -> list[str]:
    """What starts a server; its keeper puts a number in the place of {keeper}. -P: whatever is in the directory that we
    were started in, it is not imported.
    """
    return [sys.executable, "-P", "-m", "cachefs", "mount-server", mountpoint, "--keeper", "{keeper}", *arguments]


def keeper_socket_of(mountpoint: str) -> str:
    """Where the keeper of this mountpoint listens. Looks at no mount of ours: its server may hang.

    Raises ConfigError when there is no directory for it.
    """
    info = _found(mountpoint)
    resolved = info.mountpoint if info is not None else os.path.realpath(mountpoint)
    return socket_of(resolved, runtime_root())


def _found(mountpoint: str) -> MountInfo | None:
    """Of ours."""
    info = find_mount(mountpoint)
    return info if info is not None and info.fs_type == FS_TYPE else None


def listen_for(mountpoint: str, path: str) -> socket.socket:
    """From a keeper that has done its work there, take the path over. Raises ConfigError when another listens there."""
    try:
        listener = listen(path)
        if listener is None and path == keeper_socket_of(mountpoint) and _found(mountpoint) is None:
            listener = listen(path, replaces=has_finished(path))
    except OSError as error:
        raise ConfigError("--keeper-socket", path, f"a path where a socket can be made ({error})") from error
    if listener is None:
        raise ConfigError("MOUNTPOINT", mountpoint, "a directory that no cachefs is mounted on; unmount it first")
    return listener


def _become_keeper(
    mountpoint: str, values: dict[str, Any], arguments: Sequence[str], hold: int | None, path: str | None
) -> NoReturn:
    try:
        path = os.path.abspath(path) if path is not None else keeper_socket_of(mountpoint)
    except ConfigError as error:
        if values["mode"] == "keep":
            raise
        # As where /run is read-only.
        logger.warning("nobody can ask this mount for an upgrade: %s", error)
        path = ""
    listener = listen_for(mountpoint, path) if path else listen_nowhere()
    for fd in (listener.fileno(), *([hold] if hold is not None else [])):
        os.set_inheritable(fd, True)
    if values["mode"] == "keep":
        said = {"mountpoint": os.path.abspath(mountpoint), "keeper_socket": path}
        if hold is not None:
            os.write(hold, json.dumps(said).encode() + b"\n")
        else:
            click.echo(f"cachefs mount keeps {said['mountpoint']} for servers with --keeper-socket {path}")
    values |= {"listen": listener.detach(), "path": path, "hold": hold if hold is not None else ""}
    command = server_command(mountpoint, arguments) if values["mode"] == "spawn" else []
    _execute(keeper_command(mountpoint, values, command_file(command)))


def _execute(command: list[str]) -> NoReturn:
    """Become this program: the same process, without our settings in its environment, as it is told by its flags."""
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHEFS_")}
    os.execve(command[0], command, environment)


def _connect(path: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.connect(path)
        link.send(f"hello 1 {os.getpid()}".encode())
    except OSError as error:
        link.close()
        accepted = f"the socket of a cachefs mount --keep-only that runs ({error.strerror})"
        raise ConfigError("--keeper-socket", path, accepted) from error
    return link


def _upgrade(mountpoint: str) -> None:
    """Raises ConfigError, CachefsError with what the keeper says."""
    info = _found(mountpoint)
    if info is None:
        raise ConfigError("MOUNTPOINT", mountpoint, "a directory that a cachefs is mounted on")
    path = keeper_socket_of(mountpoint)
    _, command = parse_facts(ask(path, "who").removeprefix("keeper "))
    if "mount-server" not in command:
        raise ConfigError("--upgrade", mountpoint, "a mount that starts its servers itself, unlike --keep-only")
    answer = ask(path, "\0".join(["upgrade", sys.executable, *command[1:]]))
    if not answer.startswith("ok "):
        raise CachefsError(f"not upgraded, the server that was there goes on: {answer.removeprefix('failed ')}")
    click.echo(f"{info.mountpoint}: served by process {answer.removeprefix('ok ')}")
