"""A mount, from the device to the last unmount: the kernel driver on the cache's operations."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import trio

from cachefs.client import ClientConfig, open_client
from cachefs.fuse.backing import BackingRegistry
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.modes import ChosenMode, OpenMode, choose_mode
from cachefs.fuse.mounting import (
    Mount,
    MountError,
    MountOptions,
    abort,
    mount,
    open_device,
    probe,
    set_read_ahead,
    unmount,
)
from cachefs.fuse.operations import CacheOperations, OperationsConfig
from cachefs.fusewire import PAGE_SIZE, Negotiated
from cachefs.model import ConfigError

logger = logging.getLogger(__name__)

_UNMOUNT_LIMIT_S = 10.0


@dataclass(frozen=True)
class MountConfig:
    mountpoint: str
    client: ClientConfig
    source: str = "cachefs"
    """What `mount` and `df` show."""
    path: str = "/"
    """The directory of the namespace to mount."""
    options: MountOptions = field(default_factory=MountOptions)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
    session: SessionOptions = field(default_factory=SessionOptions)
    """What depends on the other settings in it is set by `run_mount`."""
    threads: int = 32
    """For what blocks: reads of cached files that are not in the page cache."""

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ConfigError("threads", self.threads, "1 to 1024")

    def session_options(self) -> SessionOptions:
        mode = self.operations.open_mode
        read_ahead_kb = self.options.read_ahead_kb
        init = replace(
            self.session.init,
            passthrough=mode in (OpenMode.AUTO, OpenMode.PASSTHROUGH),
            no_open=mode is OpenMode.NO_OPEN,
            max_pages=-(-self.options.max_read // PAGE_SIZE),
            max_readahead=max(self.session.init.max_readahead, (read_ahead_kb or 0) * 1024),
        )
        return replace(self.session, init=init)


async def run_mount(config: MountConfig, ready: Callable[[Mount, ChosenMode], None]) -> None:
    """Mount, call `ready(mount, how files are opened)`, and serve until somebody unmounts.

    Cancelling unmounts: at once if nobody uses the mount, or else by taking it out of the tree and ending the
    connection, so that whoever still reads through it gets an error and nothing stays behind.

    Raises ConfigError, MountError, TransportError, NotFoundError and NotADirectory about the path.
    """
    trio.to_thread.current_default_thread_limiter().total_tokens = config.threads
    async with open_client(config.client) as client:
        fd = open_device()
        try:
            async with trio.open_nursery() as nursery:
                backings = BackingRegistry(fd)
                operations = CacheOperations(client, config.path, backings, config.operations, nursery)
                await operations.resolve_root()
                session = KernelSession(fd, operations, config.session_options())
                session.known_names = operations.known_names
                operations.watch(session)
                # In a thread: the check of the mountpoint reads a directory, on a disk or a mount of somebody else.
                mounted = await trio.to_thread.run_sync(mount, fd, config.mountpoint, config.source, config.options)
                try:
                    negotiated = await nursery.start(_serve, session, nursery)
                    if config.options.read_ahead_kb is not None:
                        set_read_ahead(mounted, config.options.read_ahead_kb)
                    chosen = choose_mode(
                        *(config.operations.open_mode, negotiated, backings, client.tiers),
                        sys_admin=probe().sys_admin,
                    )
                    logger.info("files are opened in mode %s", chosen)
                    operations.set_mode(chosen)
                    ready(mounted, chosen)
                    await trio.sleep_forever()
                finally:
                    await _unmount(mounted)
                    operations.close()
        finally:
            os.close(fd)


async def _serve(
    session: KernelSession, nursery: trio.Nursery, task_status: trio.TaskStatus[Negotiated] = trio.TASK_STATUS_IGNORED
) -> None:
    await session.serve(task_status=task_status)
    logger.info("unmounted")
    nursery.cancel_scope.cancel()


async def _unmount(mounted: Mount) -> None:
    """Take the mount away, whoever uses it."""
    with trio.move_on_after(_UNMOUNT_LIMIT_S, shield=True) as scope:
        await trio.to_thread.run_sync(_unmount_now, mounted, abandon_on_cancel=True)
    if scope.cancelled_caught:
        logger.error("unmounting hangs, connection aborted mountpoint=%s", mounted.mountpoint)
        abort(mounted.connection)


def _unmount_now(mounted: Mount) -> None:
    try:
        unmount(mounted.mountpoint)
    except MountError as error:
        if error.errno != errno.EBUSY:
            return  # somebody was faster
        logger.warning("mount is in use, its readers get errors from now on mountpoint=%s", mounted.mountpoint)
        unmount(mounted.mountpoint, lazy=True)
        abort(mounted.connection)
