"""`cachefs umount`."""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import suppress

import click

from cachefs.cli import params
from cachefs.cli.common import confirm
from cachefs.fuse import (
    FS_TYPE,
    Mount,
    MountError,
    MountInfo,
    abort,
    abort_of,
    all_mounts,
    allow_below,
    find_mount,
    is_dead,
    is_over,
    unmount,
)
from cachefs.model import ConfigError


@click.command()
# Not click.Path, which looks at the path: for ever, if the server hangs.
@click.argument("mountpoints", metavar="MOUNTPOINT...", nargs=-1)
@click.option("everything", "--all", is_flag=True, help="Every mount of cachefs on this machine.")
@click.option("dead", "--dead", is_flag=True, help="Every mount of cachefs whose server is gone.")
@click.option("--lazy", is_flag=True, help="Also while files on it are open: they stay usable until they are closed.")
@click.option("--force", is_flag=True, help="Also when its server hangs: open files get errors.")
@click.option("--connection", type=int, hidden=True, help="Only the mount with this connection, dead or alive.")
@click.option("--device", type=int, hidden=True, help="With --connection: its /dev/fuse file, which we inherited.")
@click.option("--below", type=(int, int, int), hidden=True, help="With --connection: Mount.below.")
@click.option("--dry-run", is_flag=True, help="Only say what would be unmounted.")
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
@params.json_option
def umount(
    mountpoints: tuple[str, ...],
    everything: bool,
    dead: bool,
    lazy: bool,
    force: bool,
    connection: int | None,
    device: int | None,
    below: tuple[int, int, int] | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Unmount; the processes that served the mount end by themselves. Cached data stays for the next time.

    A mount whose server is gone ("Transport endpoint is not connected") is taken away like any other. --all means
    those of other users and jobs too, and asks first, if there is a terminal to ask at.
    """
    if connection is not None:
        _end(mountpoints, connection, device, force, below)
        return
    if everything and (mountpoints or dead):
        other = "MOUNTPOINT" if mountpoints else "--dead"
        raise click.UsageError(f"--all takes no {other}: it is every mount of cachefs on this machine.")
    chosen = [_mounted(mountpoint) for mountpoint in mountpoints]
    ours = [info for info in all_mounts() if info.fs_type == FS_TYPE]
    if everything:
        chosen = ours
        if ours and not dry_run and not yes:
            _ask(ours)
    elif dead:
        chosen += [info for info in ours if is_dead(info)]
    elif not mountpoints:
        raise click.UsageError("Missing MOUNTPOINT, --all or --dead.")
    results = [(info.mountpoint, None if dry_run else _unmount(info, lazy, force)) for info in chosen]
    failed = [error for _, error in results if error is not None]
    if as_json:
        print(json.dumps([{"mountpoint": where, "error": error} for where, error in results]))
    else:
        for where, error in results:
            if error is None:
                print(where if dry_run else f"{where}: unmounted")
        if not results:
            print("nothing to unmount", file=sys.stderr)
    for error in failed:
        print(f"Error: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


def _end(
    mountpoints: tuple[str, ...],
    connection: int,
    device: int | None,
    force: bool,
    below: tuple[int, int, int] | None,
) -> None:
    """For whoever kept a mount that cannot be saved. `device`: while that lives, so does the mount; else the number may
    be another's by now. `force` without one: of a keeper that an earlier version started, which holds it, and has just
    seen that it lives. `below`: see `Mount`.
    """
    lives = force if device is None else not is_over(device)
    if device is not None:
        with suppress(MountError):  # not root: it ends with its server
            abort_of(device, connection)
    for mountpoint in mountpoints:
        found = find_mount(mountpoint)
        if found is not None and found.fs_type == FS_TYPE and found.connection == connection:
            if device is None and lives:
                with suppress(MountError):  # not root: it ends with its server
                    abort(found)
            with suppress(MountError):  # somebody was faster
                if lives or is_dead(found):
                    unmount(mountpoint, lazy=True)
        if below is not None:
            allow_below(Mount(os.path.realpath(mountpoint), "", "", below=below))


def _ask(mounts: list[MountInfo]) -> None:
    listed = ", ".join(info.mountpoint for info in mounts)
    confirm(f"Unmount {listed}? Jobs that use them will get errors.")


def _mounted(mountpoint: str) -> MountInfo:
    found = find_mount(mountpoint)
    if found is None or found.fs_type != FS_TYPE:
        raise ConfigError("MOUNTPOINT", mountpoint, "a directory that a cachefs is mounted on")
    return found


def _unmount(info: MountInfo, lazy: bool, force: bool) -> str | None:
    """What went wrong. One whose server is gone goes away whoever has files on it open: they have errors already."""
    problem = None
    if force:
        try:
            abort(info)
        except MountError as error:
            problem = str(error)
    try:
        unmount(info.mountpoint, lazy=lazy or force or is_dead(info))
    except MountError as error:
        if not force or error.errno != errno.EINVAL:  # its server may have been faster
            return str(error)
    return problem
