"""`cachefs umount`."""

from __future__ import annotations

import click

from cachefs.fuse import FS_TYPE, MountError, abort, find_mount, unmount
from cachefs.model import ConfigError


@click.command()
@click.argument("mountpoint")
@click.option("--lazy", is_flag=True, help="Also while files on it are open: they stay usable until they are closed.")
@click.option("--force", is_flag=True, help="Also when its server hangs or is gone: open files get errors.")
def umount(mountpoint: str, lazy: bool, force: bool) -> None:
    """Unmount; the processes that served the mount end by themselves. Cached data stays for the next time."""
    mounted = find_mount(mountpoint)
    if mounted is None or mounted.fs_type != FS_TYPE:
        raise ConfigError("MOUNTPOINT", mountpoint, "a directory that a cachefs is mounted on")
    try:
        unmount(mounted.mountpoint, lazy=lazy or force)
        if force:
            abort(mounted.connection)
    except MountError as error:
        raise click.ClickException(str(error)) from error
