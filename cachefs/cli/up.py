"""`cachefs up`: master, worker and mount as three real processes of this machine, talking over the real wire."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import click
import trio

from cachefs.cli import params
from cachefs.cli.children import END_TIMEOUT_S, Child, child_of
from cachefs.cli.common import json_ready_option, log_level_option, supervised_option
from cachefs.cli.instances import Instance, instance_name, recorded, running, state_root, worker_socket
from cachefs.cli.lifecycle import Report, run_service, set_up_logging
from cachefs.cli.mount import keeper_socket_of, listen_for, server_command
from cachefs.cli.mount_options import as_arguments, mount_config, mount_options, with_profile
from cachefs.cli.restarts import Restarts, kill_if_it_hangs
from cachefs.cli.settings import UFS_OPTIONS_VARIABLE, Configured
from cachefs.fuse import FS_TYPE, Driver, MountError, abort, allow_left_below, check_apart, find_mount, probe, unmount
from cachefs.fuse.keeping import command_file, keeper_command
from cachefs.model import CachefsError, ConfigError, format_duration, format_size, without_credentials
from cachefs.net import Address, TcpAddress, open_background
from cachefs.policy import Promote
from cachefs.store import KeepFree, TierConfig
from cachefs.ufs import directory_of

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 10
"""Times that a master or worker is started again, one after the other."""
LIVED_S = 60.0
"""One that ran for so long begins a new row."""
LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True)
class UpConfig:
    url: str
    mountpoint: str
    state_dir: str
    tiers: tuple[TierConfig, ...]
    ufs_options: Mapping[str, str]
    master_flags: tuple[str, ...]
    worker_flags: tuple[str, ...]
    mount_flags: tuple[str, ...]
    log_level: str
    driver: Driver = Driver.KERNEL
    hung_after_s: float = 10.0
    """Of the mount's server."""
    restart_hung_after_s: float = 30.0
    """Of master and worker; 0: never."""


async def run_up(config: UpConfig, report: Report) -> None:
    """Start the three, wait until the mount is there, and end them, the mount first, when that ends or on cancellation.
    A master or worker that dies or hangs is started again: whoever reads notices a pause at most.

    Raises CachefsError when the mount fails, or one of the others again and again.
    """
    with worker_socket(os.path.basename(config.state_dir)) as socket_path:
        await _run_three(config, socket_path, report)


async def _run_three(config: UpConfig, socket_path: str, report: Report) -> None:
    secrets = {UFS_OPTIONS_VARIABLE: json.dumps(dict(config.ufs_options))}
    common = ["--insecure", "--log-level", config.log_level]
    data_dir = os.path.join(config.state_dir, "master")
    master_flags = ["--data-dir", data_dir, "--mount", f"/={config.url}", *config.master_flags, *common]
    hung_after_s = config.restart_hung_after_s
    async with _restarted("master", master_flags, secrets, hung_after_s=hung_after_s) as master:
        reach_master = ["--master", master.facts["listen"]]
        worker_flags = ["--socket", socket_path, *config.worker_flags, *common]
        for tier in config.tiers:
            worker_flags += ["--tier", f"{tier.kind}:{tier.path}:{tier.capacity_bytes}"]
        async with _restarted("worker", [*reach_master, *worker_flags], hung_after_s=hung_after_s):
            mount_flags = ["--worker-socket", socket_path, *config.mount_flags, *common]
            async with _mount_child(config, [*reach_master, *mount_flags]) as mount:
                try:
                    await mount.wait_ready()
                    instance = Instance(
                        pid=os.getpid(),
                        url=config.url,
                        mountpoint=config.mountpoint,
                        master=master.facts["listen"],
                        worker_socket=socket_path,
                        state_dir=config.state_dir,
                    )
                    with recorded(instance):
                        told = ("driver", "open_mode", "why", "notes")
                        report(
                            {
                                "mountpoint": config.mountpoint,
                                **{name: mount.facts[name] for name in told if name in mount.facts},
                                "master": instance.master,
                            }
                        )
                        status = await mount.wait_end()
                        if status != 0:
                            raise CachefsError(f"the mount ended unexpectedly with status {status}")
                        logger.info("unmounted, ending")
                finally:
                    with trio.CancelScope(shield=True):
                        await mount.end()
                        await trio.to_thread.run_sync(_remove_mount, config.mountpoint, mount)


@asynccontextmanager
async def _restarted(
    role: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    hung_after_s: float = 0.0,
) -> AsyncGenerator[Child, None]:
    """The first process of that role, ready; when it dies, or gives no sign of life for `hung_after_s` (0: however
    long), another one takes its place and its addresses, until the end of the block.

    Raises CachefsError when the first does not come up, or one after the other ends: the block is cancelled then.
    """
    # What is ended last must not end because everything is cancelled at once.
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        first: Child = await nursery.start(_keep_running, scope, role, arguments, environment, hung_after_s)
        try:
            yield first
        finally:
            scope.cancel()


async def _keep_running(
    scope: trio.CancelScope,
    role: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None,
    hung_after_s: float,
    task_status: trio.TaskStatus[Child],
) -> None:
    addresses = ["--listen", "127.0.0.1:0"]
    in_a_row, restarts = 0, Restarts()
    with scope:
        while True:
            began = trio.current_time()
            said, hung = "before it was ready", False
            try:
                told = [*arguments, *addresses, *restarts.arguments()]
                async with child_of(role, told, environment) as child, open_background() as watching:
                    await child.wait_ready()
                    if not scope.shield:
                        scope.shield = True
                        for name in ("listen", "http"):
                            if name in child.facts:
                                addresses += [f"--{name}", child.facts[name]]
                        task_status.started(child)
                    if hung_after_s > 0:
                        watching.start_soon(kill_if_it_hangs, child, hung_after_s)
                    said = f"with status {await child.wait_end()}"
                    hung = child.was_killed
            except CachefsError as error:
                if not scope.shield:
                    raise
                logger.error("not started again role=%s error=%s", role, error)
            restarts = Restarts(restarts.ended + (not hung), restarts.hung + hung)
            in_a_row = in_a_row + 1 if trio.current_time() < began + LIVED_S else 1
            if in_a_row > MOST_IN_A_ROW:
                raise CachefsError(
                    f"the {role} ended unexpectedly {said}, and was started again {MOST_IN_A_ROW} times in a row"
                )
            logger.error(
                "the %s %s %s, starting it again count=%d ended=%d hung=%d",
                *(role, "hung and ended" if hung else "ended unexpectedly", said, in_a_row, *restarts),
            )
            await trio.sleep(0 if in_a_row == 1 else min(LONGEST_PAUSE_S, 0.1 * 2**in_a_row))


def _remove_mount(mountpoint: str, mount: Child) -> None:
    """Whatever became of its server, no dead mount stays behind."""
    left = find_mount(mountpoint)
    if left is not None and left.fs_type == FS_TYPE and left.connection == mount.facts.get("connection"):
        logger.warning("removing what the mount left mountpoint=%s", mountpoint)
        with suppress(MountError):  # not root: it ends with its server
            abort(left)
        with suppress(MountError):  # its server was faster
            unmount(mountpoint, lazy=True)


@asynccontextmanager
async def _mount_child(config: UpConfig, arguments: Sequence[str]) -> AsyncGenerator[Child, None]:
    """The keeper, which starts the server; where there is none, the server."""
    if config.driver is not Driver.KERNEL:
        async with child_of("mount", [config.mountpoint, *arguments]) as child:
            yield child
        return
    path = keeper_socket_of(config.mountpoint)
    with listen_for(config.mountpoint, path) as listener:
        fds = [listener.fileno()]

        def command(link: str) -> list[str]:
            fds.append(command_file(server_command(config.mountpoint, [*arguments, "--supervised", link])))
            values = {"listen": listener.fileno(), "path": path, "hold": link, "end": END_TIMEOUT_S - 5}
            values["hung"] = config.hung_after_s
            return keeper_command(config.mountpoint, values, fds[-1])

        async with child_of("mount", arguments, command=command, fds=fds) as child:
            listener.close()
            os.close(fds[-1])
            yield child


@click.command(cls=Configured)
@click.argument("url")
@click.argument("mountpoint")
@click.option(
    "tiers",
    "--tier",
    type=params.TIER,
    multiple=True,
    help="Where to cache, mem: or ssd:; repeatable, the fastest first. Default: ssd, in the user's cache directory.",
)
@params.ufs_option
@click.option("--state-dir", metavar="DIR", help="Where the namespace and the default tier are kept.")
@click.option(
    "--sync-interval", type=params.SYNC_INTERVAL, default="60s", show_default=True, help="As of cachefs master."
)
@click.option("--page-size", type=params.PAGE_SIZE, help="As of cachefs master.")
@click.option("--promote", type=click.Choice([each.value for each in Promote]), help="As of cachefs worker.")
@click.option("--files-ahead", type=click.IntRange(0, 1000), help="As of cachefs worker.")
@click.option("--idle-after", type=params.DURATION, help="As of cachefs worker.")
@click.option("--keep-free", type=params.KEEP_FREE, help="As of cachefs worker.")
@click.option("--master-http", type=params.ADDRESS, help="--http of cachefs master.")
@click.option("--worker-http", type=params.ADDRESS, help="--http of cachefs worker.")
@click.option("--mount-http", type=params.ADDRESS, help="--http of cachefs mount.")
@click.option(
    "--restart-hung-after",
    type=params.DURATION,
    default="30s",
    show_default=True,
    help="A master or worker that gives no sign of life for so long, however slow its store may be, is killed and "
    "started again; 2s to 1h, 0 = never.",
)
@mount_options
@log_level_option
@json_ready_option
@supervised_option
@click.pass_context
def up(
    ctx: click.Context,
    /,
    url: str,
    mountpoint: str,
    tiers: tuple[TierConfig, ...],
    ufs_options: tuple[tuple[str, str], ...],
    state_dir: str | None,
    sync_interval: float,
    page_size: int | None,
    promote: str | None,
    files_ahead: int | None,
    idle_after: float | None,
    keep_free: KeepFree | None,
    master_http: Address | None,
    worker_http: Address | None,
    mount_http: Address | None,
    restart_hung_after: float,
    log_level: str,
    as_json: bool,
    supervised_fd: int | None,
    **mount_flags: Any,
) -> None:
    """Mount URL on MOUNTPOINT and cache what is read, all on this machine.

    For example: cachefs up s3://bucket/prefix /mnt/data
    """
    set_up_logging("up", log_level)
    if "://" not in url:
        raise ConfigError("URL", url, "s3://BUCKET/PREFIX or file:///DIRECTORY")
    flags = with_profile(ctx, mount_flags)
    # What is wrong with a flag is told before anything is started.
    mount_config(mountpoint, TcpAddress("127.0.0.1", 0), None, flags)
    if restart_hung_after != 0 and not 2 <= restart_hung_after <= 3600:
        raise ConfigError("--restart-hung-after", format_duration(restart_hung_after), "2s to 1h, or 0 for never")
    directory = os.path.abspath(state_dir or os.path.join(state_root(), instance_name(url)))
    needed = [("--state-dir", directory), *((f"--tier {tier.kind}:{tier.path}", tier.path) for tier in tiers)]
    if url.startswith("file://"):
        needed.insert(0, ("URL", directory_of(url)))
    _check_machine(mountpoint, flags["allow_nonempty"], needed)
    _check_not_running(directory)
    if not tiers:
        tiers = (_default_tier(os.path.join(directory, "tier")),)
    config = UpConfig(
        url=url,
        mountpoint=os.path.realpath(mountpoint),
        state_dir=directory,
        tiers=tiers,
        ufs_options=params.collect_ufs_options(ufs_options),
        master_flags=(
            *("--sync-interval", params.written_sync_interval(sync_interval)),
            *(("--page-size", str(page_size)) if page_size is not None else ()),
            *_http(master_http),
        ),
        worker_flags=(
            *(("--promote", promote) if promote else ()),
            *(("--files-ahead", str(files_ahead)) if files_ahead is not None else ()),
            *(("--idle-after", format_duration(idle_after)) if idle_after is not None else ()),
            *(("--keep-free", str(keep_free)) if keep_free is not None else ()),
            *_http(worker_http),
        ),
        mount_flags=(*as_arguments(flags), *_http(mount_http)),
        log_level=log_level,
        driver=Driver(flags["driver"]),
        hung_after_s=flags["hung_after"],
        restart_hung_after_s=restart_hung_after,
    )
    if supervised_fd is None and not as_json:
        places = ", ".join(f"{format_size(tier.capacity_bytes)} in {tier.path}" for tier in tiers)
        click.echo(f"cachefs: mounting {without_credentials(url)} on {config.mountpoint}, caching up to {places}")
    run_service("up", lambda report: run_up(config, report), supervised_fd, as_json=as_json)


def _http(address: Address | None) -> tuple[str, ...]:
    return ("--http", str(address)) if address is not None else ()


def _check_machine(mountpoint: str, allow_nonempty: bool, needed: Sequence[tuple[str, str]]) -> None:
    """What would fail only in the third process is told before the first."""
    found = probe()
    if found.device_error is not None:
        raise ConfigError("/dev/fuse", "not usable", found.device_error)
    if found.why_no_mount is not None:
        raise ConfigError("user", os.geteuid(), f"one who can mount; {found.why_no_mount}")
    mounted = find_mount(mountpoint)
    if mounted is not None and mounted.fs_type == FS_TYPE:
        raise ConfigError("MOUNTPOINT", mountpoint, "a directory that no cachefs is mounted on; see cachefs umount")
    if not os.path.isdir(mountpoint):
        raise ConfigError("MOUNTPOINT", mountpoint, "an existing directory")
    check_apart(mountpoint, needed, "MOUNTPOINT")
    allow_left_below(mountpoint)
    if not allow_nonempty and os.listdir(mountpoint):
        raise ConfigError("MOUNTPOINT", mountpoint, "an empty directory, or --allow-nonempty to hide what is in it")


def _check_not_running(directory: str) -> None:
    for instance in running():
        if instance.state_dir == directory:
            raise ConfigError(
                "URL", instance.url, f"one that is not up already; it is mounted on {instance.mountpoint}"
            )


def _default_tier(path: str) -> TierConfig:
    """Half of what is free, counting what this tier holds already."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError("--state-dir", path, f"a directory that can be written ({error.strerror})") from error
    held = sum(
        os.stat(os.path.join(directory, name), follow_symlinks=False).st_blocks * 512
        for directory, _, names in os.walk(path)
        for name in names
    )
    capacity = (shutil.disk_usage(path).free + held) // 2
    return TierConfig("ssd", path, capacity)
