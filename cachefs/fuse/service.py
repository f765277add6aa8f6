"""A mount, from the device to the last unmount: one of the drivers on the cache's operations."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from cachefs.client import Client, ClientConfig, open_client
from cachefs.fuse.backing import BackingRegistry
from cachefs.fuse.fusermount import CONFIGURATION
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.metrics import MountParts, watch_mount
from cachefs.fuse.modes import PASSTHROUGH_NEEDS_ROOT, ChosenMode, Driver, OpenMode, choose_mode
from cachefs.fuse.mounting import (
    Mount,
    MountError,
    MountOptions,
    abort,
    check_options,
    open_mount,
    probe,
    set_read_ahead,
    unmount,
)
from cachefs.fuse.notify import KnownNames
from cachefs.fuse.operations import CacheOperations, Notices, OperationsConfig
from cachefs.fuse.protocol import Operations
from cachefs.fusewire import PAGE_SIZE, InitOptions, Negotiated
from cachefs.metrics import Monitor
from cachefs.model import ConfigError, MiB

logger = logging.getLogger(__name__)

_UNMOUNT_LIMIT_S = 10.0
_BUSY_TRIES, _BUSY_PAUSE_S = 4, 0.05
_PYFUSE3 = (
    "kernel, until pyfuse3 is installed: apt-get install fuse3 libfuse3-dev pkg-config gcc python3-dev, then "
    "pip install 'cachefs[pyfuse3]'"
)


class Session(Notices, Protocol):
    """One of the drivers, serving one mount."""

    known_names: KnownNames
    observe: Callable[[int, float], None] | None

    async def serve(self, *, task_status: trio.TaskStatus[Negotiated | None] = ...) -> None: ...


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
    driver: Driver = Driver.KERNEL

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ConfigError("threads", self.threads, "1 to 1024")
        if self.driver is Driver.PYFUSE3:
            self._check_pyfuse3()

    def _check_pyfuse3(self) -> None:
        """What would be ignored is refused."""
        mode, init = self.operations.open_mode, self.session.init
        if mode not in (OpenMode.AUTO, OpenMode.CACHED):
            raise ConfigError("open_mode", mode.value, "auto or cached with the driver pyfuse3, which has no other")
        if self.operations.open_wait_bytes != OperationsConfig.open_wait_bytes:
            accepted = "its default with the driver pyfuse3: every file is opened without waiting"
            raise ConfigError("open_wait", self.operations.open_wait_bytes, accepted)
        if init.max_background != InitOptions.max_background:
            accepted = f"its default, {InitOptions.max_background}, with the driver pyfuse3, which leaves it to libfuse"
            raise ConfigError("max_background", init.max_background, accepted)
        if self.options.max_read > MiB:
            accepted = f"{PAGE_SIZE} to {MiB} bytes with the driver pyfuse3: libfuse asks for no more"
            raise ConfigError("max_read", self.options.max_read, accepted)
        if init.ignored:
            raise ConfigError("ignore_kernel_feature", str(init.ignored), "nothing with the driver pyfuse3")

    def check_machine(self) -> None:
        """Raises ConfigError for what cannot be had here, by this user. What only a mount can tell, that tells."""
        check_options(self.options)
        if self.operations.open_mode is OpenMode.PASSTHROUGH and not probe().sys_admin:
            raise ConfigError("open_mode", "passthrough", f"auto or cached here: {PASSTHROUGH_NEEDS_ROOT}")
        if self.driver is Driver.PYFUSE3:
            reason = why_no_pyfuse3()
            if reason is not None:
                raise ConfigError("driver", self.driver.value, f"{_PYFUSE3} ({reason})")

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


def why_no_pyfuse3() -> str | None:
    """Why the driver pyfuse3 cannot be had in this Python; None if it can."""
    try:
        importlib.import_module("pyfuse3")
    except ImportError as error:
        return str(error)
    return None


async def run_mount(
    config: MountConfig, ready: Callable[[Mount, ChosenMode], None], monitor: Monitor | None = None
) -> None:
    """Mount, call `ready(mount, how files are opened)`, and serve until somebody unmounts. `monitor` is shown how it
    does.

    Cancelling unmounts: at once if nobody uses the mount, or else by taking it out of the tree and ending the
    connection, so that whoever still reads through it gets an error and nothing stays behind.

    Raises ConfigError, MountError, TransportError, NotFoundError and NotADirectory about the path.
    """
    config.check_machine()
    trio.to_thread.current_default_thread_limiter().total_tokens = config.threads
    async with open_client(config.client) as client:
        with ExitStack() as opened:
            async with trio.open_nursery() as nursery:
                operations = CacheOperations(client, config.path, config.operations, nursery)
                await operations.resolve_root()
                # In a thread: the check of the mountpoint reads a directory, on a disk or a mount of somebody else.
                needed = tuple(("the worker's tier", tier) for tier in client.tiers)
                fd, mounted = await trio.to_thread.run_sync(
                    open_mount, config.mountpoint, config.source, replace(config.options, needed=needed)
                )
                # After the nursery: the session reads it to the end. Without root, closing is what ends the connection.
                opened.callback(os.close, fd)
                try:
                    session = _session(config, fd, operations)
                    session.known_names = operations.known_names
                    operations.watch(session)
                    parts = MountParts(operations, client)
                    if monitor is not None:
                        session.observe = parts.times.observe
                    negotiated = await nursery.start(_serve, session, nursery)
                    backings = BackingRegistry(fd)

                    def choose(wanted: OpenMode) -> ChosenMode:
                        chosen = choose_mode(
                            *(wanted, negotiated, backings, client.tiers),
                            sys_admin=probe().sys_admin,
                            why_no_tiers=client.workers.why_no_tiers(),
                        )
                        logger.info("files are opened in mode %s", chosen)
                        operations.set_mode(chosen, backings)
                        return chosen

                    chosen = choose(config.operations.open_mode)
                    notes = *_notes(mounted, config.options), *_where_it_reads(client)
                    chosen = replace(chosen, notes=notes)
                    if config.operations.open_mode in (OpenMode.AUTO, OpenMode.PASSTHROUGH):
                        _follow_tiers(client, lambda: choose(OpenMode.AUTO))
                    if monitor is not None:
                        watch_mount(monitor, parts)
                    ready(mounted, chosen)
                    await trio.sleep_forever()
                finally:
                    await _unmount(mounted)
                    operations.close()


def _where_it_reads(client: Client) -> Iterator[str]:
    chosen = client.workers.chosen
    if chosen is not None and not chosen.is_local:
        yield f"what is read comes over the network: {chosen.candidate}"


def _follow_tiers(client: Client, choose: Callable[[], object]) -> None:
    """Decide anew how files are opened when another worker of this host is there, with other tiers."""
    known = client.tiers

    def on_chosen() -> None:
        nonlocal known
        if client.tiers != known:
            known = client.tiers
            choose()

    client.workers.on_chosen = on_chosen


def _session(config: MountConfig, fd: int, operations: Operations) -> Session:
    if config.driver is Driver.PYFUSE3:
        # Here, because it needs a package that is an extra.
        from cachefs.fuse.pyfuse3_driver import Pyfuse3Session

        return Pyfuse3Session(fd, operations, config.session_options())
    return KernelSession(fd, operations, config.session_options())


def _notes(mounted: Mount, options: MountOptions) -> Iterator[str]:
    """Sets the read-ahead, now that INIT, which had undone it, is over; and says what this user cannot have."""
    if options.read_ahead_kb is not None:
        try:
            set_read_ahead(mounted, options.read_ahead_kb)
        except OSError as error:
            yield f"the read-ahead stays the kernel's: only root can set it ({error.strerror})"
    if options.allow_other is None and not mounted.allows_other:
        yield f"only this user may use the mount: {CONFIGURATION} has no line user_allow_other"


async def _serve(
    session: Session, nursery: trio.Nursery, task_status: trio.TaskStatus[Negotiated | None] = trio.TASK_STATUS_IGNORED
) -> None:
    await session.serve(task_status=task_status)
    logger.info("unmounted")
    nursery.cancel_scope.cancel()


async def _unmount(mounted: Mount) -> None:
    """Take the mount away, whoever uses it."""
    with trio.move_on_after(_UNMOUNT_LIMIT_S, shield=True) as scope:
        await trio.to_thread.run_sync(_unmount_now, mounted, abandon_on_cancel=True)
    if scope.cancelled_caught:
        logger.error("unmounting hangs, the connection is ended mountpoint=%s", mounted.mountpoint)
        _end(mounted)


def _unmount_now(mounted: Mount) -> None:
    error = _try_to_unmount(mounted)
    for _ in range(_BUSY_TRIES):
        if error is None or error.errno != errno.EBUSY:
            break
        # Whoever has just ended may still be given up by the kernel, which does that in its own time.
        time.sleep(_BUSY_PAUSE_S)
        error = _try_to_unmount(mounted)
    if error is None or error.errno == errno.EINVAL:
        return  # EINVAL: somebody was faster
    if error.errno != errno.EBUSY:
        logger.error("not unmounted, and nobody serves it any more error=%s", error)
        return
    logger.warning("mount is in use, its readers get errors from now on mountpoint=%s", mounted.mountpoint)
    unmount(mounted.mountpoint, lazy=True)
    _end(mounted)


def _try_to_unmount(mounted: Mount) -> MountError | None:
    try:
        unmount(mounted.mountpoint)
    except MountError as error:
        return error
    return None


def _end(mounted: Mount) -> None:
    with suppress(MountError):  # not root: it ends when we close the device
        abort(mounted.connection)
