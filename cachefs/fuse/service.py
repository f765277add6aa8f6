"""A mount, from the device to the last unmount: the kernel driver on the cache's operations."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from cachefs.client import ClientConfig, open_client
from cachefs.fuse.backing import BackingRegistry
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.mounting import Mount, MountError, MountOptions, abort, mount, open_device, unmount
from cachefs.fuse.operations import CacheOperations, OperationsConfig
from cachefs.fusewire import Negotiated

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


async def run_mount(config: MountConfig, ready: Callable[[Mount, bool], None]) -> None:
    """Mount, call `ready(mount, passthrough is on)`, and serve until somebody unmounts.

    Cancelling unmounts: at once if nobody uses the mount, or else by taking it out of the tree and ending the
    connection, so that whoever still reads through it gets an error and nothing stays behind.

    Raises ConfigError, MountError, TransportError, NotFoundError and NotADirectory about the path.
    """
    async with open_client(config.client) as client:
        fd = open_device()
        try:
            async with trio.open_nursery() as nursery:
                operations = CacheOperations(client, config.path, BackingRegistry(fd), config.operations, nursery)
                await operations.resolve_root()
                session = KernelSession(fd, operations, config.session)
                session.known_names = operations.known_names
                operations.watch(session)
                # In a thread: the check of the mountpoint reads a directory, on a disk or a mount of somebody else.
                mounted = await trio.to_thread.run_sync(mount, fd, config.mountpoint, config.source, config.options)
                try:
                    negotiated = await nursery.start(_serve, session, nursery)
                    operations.set_passthrough(negotiated.passthrough)
                    ready(mounted, negotiated.passthrough)
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
