"""`cachefs doctor`: what stands in the way on this machine, and what mends it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import click
import trio
from rich.text import Text

from cachefs.cli import params, settings
from cachefs.cli.instances import running, state_root
from cachefs.cli.lifecycle import leaves
from cachefs.cli.mount_options import check_settings
from cachefs.cli.security import security_to_ask
from cachefs.cli.tables import print_tables, table_of
from cachefs.client import ClientConfig, open_client
from cachefs.fuse import (
    FS_TYPE,
    PASSTHROUGH_NEEDS_ROOT,
    all_mounts,
    is_dead,
    max_read_limit,
    probe,
    try_passthrough,
    user_allow_other,
    why_no_pyfuse3,
)
from cachefs.fusewire import InitFlag
from cachefs.model import CachefsError, ConfigError, GiB, MiB, format_size, without_credentials
from cachefs.net import Hello, open_peer, parse_address
from cachefs.store import TierConfig
from cachefs.ufs import open_under_store
from cachefs.wire.messages import GetMasterStatus

_OPEN_FILES = 65536
_LEAST_SPACE = GiB
_LEAST_MEMORY = 512 * MiB
_STORE_LIMIT_S = 15.0
_MASTER_LIMIT_S = 5.0


@dataclass(frozen=True)
class Finding:
    what: str
    level: Literal["ok", "warning", "error"]
    says: str
    mend: str = ""
    """A command, or what to do."""


@click.command()
@click.argument("url", required=False)
@click.option(
    "tiers",
    "--tier",
    type=params.TIER,
    multiple=True,
    help="Where it is to cache. Default: as cachefs up would, by the settings or else in the user's cache directory.",
)
@params.ufs_option
@click.option("--config", "path", metavar="FILE", help="As of cachefs up.")
@click.option("--ignore-kernel-feature", type=click.Choice(["passthrough"]), multiple=True, hidden=True)
@params.json_option
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    url: str | None,
    tiers: tuple[TierConfig, ...],
    ufs_options: tuple[tuple[str, str], ...],
    path: str | None,
    ignore_kernel_feature: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at this machine, and at the under-store at URL if one is given: can it mount, how fast, what is in the way.

    Looks at what `cachefs up` would use: flags, variables and the settings file count here as well. Changes nothing.
    Exits with status 1 if something makes mounting impossible.
    """
    ignored = sum(InitFlag[name.upper()] for name in ignore_kernel_feature)
    finding, configured = _settings(ctx, path)
    places = [tier.path for tier in tiers] or configured
    findings = [finding, *_machine(places, ignored), *_limits(places), *_mounts(), *_instances()]
    if finding.level == "ok":
        findings += _worker(path)
    if url is not None:
        try:
            findings.append(_under_store(url, params.collect_ufs_options(ufs_options)))
        except ConfigError as error:
            findings.append(Finding("under-store", "error", str(error), f"correct {settings.UFS_OPTIONS_VARIABLE}"))
    worst = "error" if any(each.level == "error" for each in findings) else "ok"
    if as_json:
        print(json.dumps({"status": worst, "findings": [asdict(each) for each in findings]}))
    else:
        _print(findings)
    if worst == "error":
        sys.exit(1)


def _settings(ctx: click.Context, path: str | None) -> tuple[Finding, list[str]]:
    """What `cachefs up` would be told, and where it would cache. Options of the under-store are left in `ctx`."""
    default = [state_root()]
    try:
        commands = settings.configured_commands()
        settings.check_environment(commands)
        chosen = path or os.environ.get(settings.CONFIG_VARIABLE) or settings.default_path()
        file = settings.load_settings(chosen, commands)
        ctx.meta[settings.UFS_OPTIONS_VARIABLE] = file.ufs_options
        with click.Context(commands["up"], info_name="up") as up:
            settings.apply_file(up, commands["up"], file)
            found = check_settings(settings.effective(up, commands["up"]), check_machine=True)
        values = {option.name or "": value for option, value, _ in found}
    except ConfigError as error:
        mend = "correct it where it is set: a key of the file, or a variable of the environment"
        return Finding("settings", "error", str(error), mend), default
    places = [tier.path for tier in values["tiers"] or ()]
    if not places:
        places = [values["state_dir"]] if values["state_dir"] else default
    return Finding("settings", "ok", f"{file.path}: can be used" if file.path else "there is no file"), places


def _machine(places: list[str], ignored: int) -> Iterator[Finding]:
    found = probe()
    kernel = ".".join(map(str, found.kernel))
    if found.kernel >= (6, 9):
        yield Finding("kernel", "ok", f"Linux {kernel}")
    else:
        says = f"Linux {kernel}: passthrough came with 6.9; until then files are read in cached mode, through a process"
        yield Finding("kernel", "warning", says, "use a newer kernel")
    if found.device_error is None:
        yield Finding("/dev/fuse", "ok", "can be opened")
    else:
        in_container = os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")
        mend = "docker run --device /dev/fuse --cap-add SYS_ADMIN ..." if in_container else "modprobe fuse"
        if os.path.exists("/dev/fuse") and not in_container:
            mend = "chmod 666 /dev/fuse, as root"
        yield Finding("/dev/fuse", "error", found.device_error, mend)
    if found.sys_admin:
        yield Finding("privileges", "ok", "CAP_SYS_ADMIN, which mounting and passthrough need")
    elif found.helper_error is None:
        yield from _without_root()
    else:
        says = f"no CAP_SYS_ADMIN, which mounting needs, and no way around it: {found.helper_error}"
        yield Finding("privileges", "error", says, "run it as root: sudo cachefs ...; or what is said on the left")
    if found.why_no_mount is None:
        yield from _passthrough(places, ignored)
    reason = why_no_pyfuse3()
    if reason is None:
        yield Finding("pyfuse3", "ok", "installed, for --driver pyfuse3")
    else:
        says = f"cannot be had, and only --driver pyfuse3 needs it: {reason}"
        yield Finding("pyfuse3", "ok", says, "pip install 'cachefs[pyfuse3]'")
    limit = max_read_limit()
    yield Finding("READ size", "ok", f"up to {format_size(limit)} (sysctl fs.fuse.max_pages_limit sets the limit)")
    # Clean-up does without; people who look for what hangs do not.
    if os.path.isdir("/sys/fs/fuse/connections") and not os.listdir("/sys/fs/fuse/connections"):
        says = "the FUSE control file system is not mounted, or nothing is; only needed to look at connections by hand"
        yield Finding("fusectl", "ok", says, "mount -t fusectl none /sys/fs/fuse/connections")
    else:
        yield Finding("fusectl", "ok", "mounted")


def _without_root() -> Iterator[Finding]:
    yield Finding("privileges", "ok", "no CAP_SYS_ADMIN: fusermount3 mounts for this user")
    if user_allow_other():
        yield Finding("other users", "ok", "may use the mounts of this user (user_allow_other)")
    else:
        says = "may not use the mounts of this user: /etc/fuse.conf has no line user_allow_other"
        yield Finding("other users", "warning", says, "echo user_allow_other >> /etc/fuse.conf, as root")
    says = "stays what the kernel has (128 KiB), which halves sequential reads in cached mode: only root can set it"
    yield Finding("read-ahead", "warning", says, "run it as root: sudo cachefs ...")


def _passthrough(places: list[str], ignored: int) -> Iterator[Finding]:
    directories = {_nearest(place): place for place in places}
    try:
        tried = trio.run(try_passthrough, list(directories), ignored)
    except (CachefsError, OSError, trio.TooSlowError) as error:
        yield Finding("passthrough", "error", f"nothing can be mounted: {error}", "")
        return
    for directory, reason in tried.items():
        place = directories[directory]
        if reason is None:
            yield Finding("passthrough", "ok", f"works for a cache in {place}: cached files are read at native speed")
        else:
            mend = "cache on ext4, xfs or tmpfs: --tier ssd:DIR:SIZE" if "file" in reason else "use Linux 6.9 or newer"
            if reason == PASSTHROUGH_NEEDS_ROOT:
                mend = "run it as root: sudo cachefs ..."
            says = f"does not work for a cache in {place}: {reason}; files are read in cached mode"
            yield Finding("passthrough", "warning", says, mend)


def _nearest(path: str) -> str:
    """What exists of a path."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _limits(places: list[str]) -> Iterator[Finding]:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= _OPEN_FILES:
        yield Finding("open files", "ok", f"up to {'any number' if most == resource.RLIM_INFINITY else most}")
    else:
        says = f"no more than {most} open files: what is read and cached holds descriptors"
        yield Finding(
            "open files", "warning", says, f"ulimit -Hn {_OPEN_FILES}, or LimitNOFILE={_OPEN_FILES} in systemd"
        )
    for place in places:
        free = shutil.disk_usage(_nearest(place)).free
        if free >= _LEAST_SPACE:
            yield Finding("space", "ok", f"{format_size(free)} free for {place}")
        else:
            says = f"only {format_size(free)} free for {place}"
            yield Finding("space", "warning", says, "cache elsewhere: --tier ssd:DIR:SIZE")
    available = _available_memory()
    if available is not None and available < _LEAST_MEMORY:
        says = f"only {format_size(available)} of memory available"
        yield Finding("memory", "warning", says, "give the machine or the container more memory")
    elif available is not None:
        yield Finding("memory", "ok", f"{format_size(available)} available")


def _available_memory() -> int | None:
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _mounts() -> Iterator[Finding]:
    for info in all_mounts():
        if info.fs_type != FS_TYPE:
            continue
        if is_dead(info):
            says = f"{info.mountpoint}: its server is gone, and every access an error"
            yield Finding("mount", "warning", says, f"cachefs umount {info.mountpoint}")
        else:
            yield Finding("mount", "ok", f"{info.source} on {info.mountpoint}")


def _instances() -> Iterator[Finding]:
    for instance in running():
        says = f"{without_credentials(instance.url)} on {instance.mountpoint}, master {instance.master}"
        if trio.run(_answers, instance.master):
            yield Finding("cachefs up", "ok", says)
        else:
            yield Finding("cachefs up", "error", f"{says}: the master does not answer", f"kill {instance.pid}")


def _worker(path: str | None) -> Iterator[Finding]:
    """Through which worker `cachefs mount` would read, where its settings name a master."""
    try:
        config = _mount_client(path)
    except ConfigError as error:
        mend = "correct it where it is set: a key of the file, or a variable of the environment"
        yield Finding("worker", "warning", f"a mount would not start: {error}", mend)
        return
    if config is None:
        return
    try:
        yield trio.run(_found_worker, config)
    except* CachefsError as group:
        says = f"a mount would find none: {leaves(group)[0]}"
        yield Finding("worker", "warning", says, "start master and workers, or correct --tokens of mounts")


def _mount_client(path: str | None) -> ClientConfig | None:
    """What `cachefs mount` would be told; None: no master. Raises ConfigError."""
    commands = settings.configured_commands()
    command = commands["mount"]
    file = settings.load_settings(path or os.environ.get(settings.CONFIG_VARIABLE) or settings.default_path(), commands)
    with click.Context(command, info_name="mount") as context:
        settings.apply_file(context, command, file)
        context.params.update({option.name or "": value for option, value, _ in settings.effective(context, command)})
        found = context.params
        if found["master_address"] is None:
            return None
        return ClientConfig(
            found["master_address"],
            found["worker_socket"],
            security=security_to_ask(found["master_address"], admin=False),
            worker_address=found["worker_address"],
            anywhere=True,
            labels=params.collect_labels(found["labels"] or ()),
        )


async def _found_worker(config: ClientConfig) -> Finding:
    """Raises CachefsError."""
    config = replace(config, patience_s=_MASTER_LIMIT_S, first_contact_s=_MASTER_LIMIT_S)
    async with open_client(config) as client:
        chosen = client.workers.chosen
    if chosen is None:
        return Finding("worker", "warning", f"the master at {config.master} knows none", "cachefs worker ...")
    says = f"a mount reads through {chosen.candidate}"
    if chosen.is_local:
        return Finding("worker", "ok", says)
    return Finding("worker", "warning", f"{says}: over the network, without passthrough", "cachefs worker ... here")


async def _answers(master: str) -> bool:
    try:
        with trio.fail_after(_MASTER_LIMIT_S):
            async with open_peer(parse_address(master), Hello(role="client")) as peer:
                await peer.call(GetMasterStatus())
    except (CachefsError, trio.TooSlowError):
        return False
    return True


def _under_store(url: str, options: dict[str, str]) -> Finding:
    shown = without_credentials(url)

    async def look() -> str:
        with trio.fail_after(_STORE_LIMIT_S):
            async with open_under_store(url, options) as store, store.list_dir("") as batches:
                async for batch in batches:
                    if batch:
                        return f"{shown}: can be listed, the first name is {batch[0].path!r}"
        return f"{shown}: can be listed, and is empty"

    try:
        return Finding("under-store", "ok", trio.run(look))
    except* (CachefsError, OSError) as group:
        says = f"{shown}: {leaves(group)[0]}"
    except* trio.TooSlowError:
        says = f"{shown}: no answer within {_STORE_LIMIT_S:g} s"
    mend = "credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; another server: --ufs-option endpoint_url=URL"
    return Finding("under-store", "error", says, mend if url.startswith("s3") else "see the URL and --ufs-option")


def _print(findings: list[Finding]) -> None:
    styles = {"ok": "green", "warning": "yellow", "error": "bold red"}
    rows = [(Text(each.level, styles[each.level]), each.what, each.says, each.mend) for each in findings]
    print_tables(table_of(("", "", "", "what mends it"), rows))
