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
from functools import partial
from typing import Protocol

import trio

from cachefs.client import Client, ClientConfig, Earlier, open_client
from cachefs.fuse.backing import BackingRegistry
from cachefs.fuse.connections import MountError, abort_of, is_dead, is_over
from cachefs.fuse.fusermount import CONFIGURATION
from cachefs.fuse.keep_names import keep_names
from cachefs.fuse.keeping import KeeperLink, MountFacts
from cachefs.fuse.kept import Found, Kept
from cachefs.fuse.kernel import KernelSession, SessionOptions
from cachefs.fuse.metrics import MountParts, watch_mount
from cachefs.fuse.modes import PASSTHROUGH_NEEDS_ROOT, ChosenMode, Driver, OpenMode, choose_mode
from cachefs.fuse.mountinfo import find_mount
from cachefs.fuse.mounting import (
    Mount,
    MountOptions,
    allow_below,
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
from cachefs.model import ConfigError, Ino, MiB, UnavailableError

logger = logging.getLogger(__name__)

_UNMOUNT_LIMIT_S = 10.0
_ANSWER_LIMIT_S = 30.0
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
    config: MountConfig,
    ready: Callable[[Mount, ChosenMode], None],
    monitor: Monitor | None = None,
    keeper: KeeperLink | None = None,
) -> None:
    """Mount, call `ready(mount, how files are opened)`, and serve until somebody unmounts. `monitor` is shown how it
    does.

    Cancelling unmounts: at once if nobody uses the mount, or else by taking it out of the tree and ending the
    connection, so that whoever still reads through it gets an error and nothing stays behind.

    `keeper` holds what outlives us. If an earlier server left a mount there, we go on with it, once that server is
    gone; and when it tells us to make way for another, or we fail, the mount stays as it is.

    Raises ConfigError, MountError, TransportError, NotFoundError and NotADirectory about the path.
    """
    config.check_machine()
    trio.to_thread.current_default_thread_limiter().total_tokens = config.threads
    facts = keeper.facts() if keeper is not None else None
    if keeper is not None and facts is not None and not facts.agreed.resend:
        await trio.to_thread.run_sync(_give_up_connection, keeper, facts)
        facts = None
    earlier = None
    if keeper is not None and facts is not None:
        earlier = Earlier(facts.cluster, facts.epoch, facts.tiers, keeper.kept.names())
    async with open_client(config.client, earlier) as client:
        if keeper is not None and facts is not None:
            await keeper.stand_by()
            now = keeper.facts()
            if now is None or (now.epoch, now.cluster) != (facts.epoch, facts.cluster):
                # Another one knows better.
                raise UnavailableError("the namespace changed while this server was waiting for its turn")
            facts = now
        await _Serving(config, client, keeper, facts, monitor).run(ready)


class _Serving:
    """One server of a mount, from when it may begin."""

    def __init__(
        self,
        config: MountConfig,
        client: Client,
        keeper: KeeperLink | None,
        facts: MountFacts | None,
        monitor: Monitor | None,
    ) -> None:
        """`facts`: what an earlier server left."""
        self._config = config
        self._client = client
        self._keeper = keeper
        self._kept = keeper.kept if keeper is not None else None
        self._facts = facts
        self._monitor = monitor
        self._mounted: Mount | None = facts.mounted if facts is not None else None
        self._fd = -1
        self._agreed: Negotiated | None = facts.agreed if facts is not None else None
        self._is_successor = facts is not None
        self._is_ready = False

    async def run(self, ready: Callable[[Mount, ChosenMode], None]) -> None:
        with ExitStack() as opened:
            try:
                async with trio.open_nursery() as nursery:
                    operations = CacheOperations(
                        self._client, self._config.path, self._config.operations, nursery, self._kept
                    )
                    opened.callback(operations.close)
                    if self._facts is None:
                        await operations.resolve_root()
                        fd = await self._mount()
                    else:
                        assert self._keeper is not None
                        fd = self._fd = self._keeper.fuse_fd
                    # After the nursery: the session reads it to the end. Without root, closing is what ends the
                    # connection.
                    opened.callback(os.close, fd)
                    await self._serve(fd, operations, nursery, ready)
            except BaseException as error:
                await self._leave_or_end(error)
                raise
            await self._leave_or_end(None)

    async def _leave_or_end(self, error: BaseException | None) -> None:
        if not self._stays_for_another(error):
            await self._end()
        elif self._keeper is not None:
            with trio.CancelScope(shield=True):
                await self._keeper.leave()

    def _stays_for_another(self, error: BaseException | None) -> bool:
        """Whether a server after us goes on with the mount."""
        if self._keeper is None:
            return False
        if self._keeper.hands_over:
            return True
        if not (self._is_ready or self._is_successor):
            return False  # it never worked
        if error is not None and not _is_cancelled(error):
            return True
        return self._keeper.connects and error is not None and not self._keeper.was_told_to_end

    async def _mount(self) -> int:
        # In a thread: the check of the mountpoint reads a directory, on a disk or a mount of somebody else.
        config = self._config
        needed = tuple(("the worker's tier", tier) for tier in self._client.tiers)
        fd, mounted = await trio.to_thread.run_sync(
            open_mount, config.mountpoint, config.source, replace(config.options, needed=needed, forbid_below=True)
        )
        self._mounted, self._fd = mounted, fd
        if self._keeper is not None:
            self._keeper.kept.clear()
            self._keeper.mounted(fd, mounted.connection, mounted.below)
        return fd

    async def _serve(
        self,
        fd: int,
        operations: CacheOperations,
        nursery: trio.Nursery,
        ready: Callable[[Mount, ChosenMode], None],
    ) -> None:
        config, client, keeper = self._config, self._client, self._keeper
        assert self._mounted is not None
        backings = BackingRegistry(fd, self._kept)
        session = _session(config, fd, operations, self._agreed, self._kept)
        session.known_names = operations.known_names
        operations.watch(session)
        parts = MountParts(operations, client)
        if self._monitor is not None:
            session.observe = parts.times.observe

        def choose(wanted: OpenMode) -> ChosenMode:
            chosen = choose_mode(
                *(wanted, negotiated, backings, client.tiers),
                sys_admin=probe().sys_admin,
                why_no_tiers=client.workers.why_no_tiers(),
            )
            logger.info("files are opened in mode %s", chosen)
            operations.set_mode(chosen, backings)
            return chosen

        negotiated = self._agreed
        if self._facts is not None:
            found = keeper.kept.load() if keeper is not None else Found([], [])
            if negotiated is not None and not negotiated.passthrough:
                # Without passthrough there are no ids, and the kernel does not let one be given back.
                found = Found(found.nodes, [])
            operations.restore(Ino(self._facts.root) if self._facts.root is not None else None, found, backings)
            if keeper is not None:
                keeper.kept.settle()
            logger.info("going on with what an earlier server left files=%d", len(found.nodes))
            # What cannot be had any more is no reason to end what works.
            asked = config.operations.open_mode
            chosen = choose(OpenMode.AUTO if asked is OpenMode.PASSTHROUGH else asked)
        if isinstance(session, KernelSession) and keeper is not None:
            keeper.on_drain = session.drain
        negotiated = await nursery.start(_serve, session, nursery)
        if self._facts is None:
            chosen = choose(config.operations.open_mode)
            self._agreed = negotiated
        else:
            session.notify_everything()
        if self._kept is not None:
            nursery.start_soon(keep_names, client, self._kept)
        operations.on_place = partial(self._save_facts, operations)
        self._save_facts(operations)
        chosen = replace(chosen, notes=(*_notes(self._mounted, config.options), *_where_it_reads(client)))
        if config.operations.open_mode in (OpenMode.AUTO, OpenMode.PASSTHROUGH):

            def choose_again() -> None:
                choose(OpenMode.AUTO)
                self._save_facts(operations)

            _follow_tiers(client, choose_again)
        if self._monitor is not None:
            watch_mount(self._monitor, parts)
        await _wait_until_it_answers(self._mounted)
        self._is_ready = True
        if keeper is not None:
            keeper.ready()
        ready(self._mounted, chosen)
        await trio.sleep_forever()

    def _save_facts(self, operations: CacheOperations) -> None:
        """For a successor."""
        mounted, view = self._mounted, self._client.view
        if self._kept is None or self._agreed is None or mounted is None:
            return
        facts = MountFacts(
            *(self._agreed, mounted.mountpoint, mounted.source, mounted.device, mounted.allows_other),
            *(view.cluster, view.epoch, operations.root, self._client.tiers, mounted.below),
        )
        if facts != self._facts:
            self._kept.save_facts(facts.save())
            self._facts = facts

    async def _end(self) -> None:
        if self._mounted is None:
            return
        if self._keeper is not None:
            self._keeper.ending()
        await _unmount(self._mounted, self._fd)
        allow_below(self._mounted)
        if self._keeper is not None and (self._is_ready or self._is_successor):
            self._keeper.done()


def _is_cancelled(error: BaseException) -> bool:
    """And nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cancelled(each) for each in error.exceptions)
    return isinstance(error, trio.Cancelled)


def _give_up_connection(keeper: KeeperLink, facts: MountFacts) -> None:
    """Where requests cannot be sent again, whoever waits for an answer of the earlier server would wait for ever."""
    if keeper.has_server:
        raise MountError("this kernel (before Linux 6.9) cannot change the server of a mount", errno.EOPNOTSUPP)
    logger.error("this kernel cannot send again what was left unanswered: open files get errors, mounting anew")
    fd = keeper.fuse_fd
    keeper.remount()
    _end(facts.mounted, fd)
    with suppress(MountError):
        unmount(facts.mountpoint, lazy=True)
    allow_below(facts.mounted)
    os.close(fd)


async def _wait_until_it_answers(mounted: Mount) -> None:
    """What a reader would have to wait for, we do. Raises MountError."""
    with trio.move_on_after(_ANSWER_LIMIT_S) as scope:
        with suppress(OSError):  # somebody was fast, and unmounted it
            await trio.to_thread.run_sync(os.statvfs, mounted.mountpoint, abandon_on_cancel=True)
    if scope.cancelled_caught:
        raise MountError(f"{mounted.mountpoint} is mounted and does not answer", errno.ETIMEDOUT)


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


def _session(
    config: MountConfig, fd: int, operations: Operations, agreed: Negotiated | None, kept: Kept | None
) -> Session:
    if config.driver is Driver.PYFUSE3:
        # Here, because it needs a package that is an extra.
        from cachefs.fuse.pyfuse3_driver import Pyfuse3Session

        return Pyfuse3Session(fd, operations, config.session_options())
    return KernelSession(fd, operations, config.session_options(), agreed=agreed, kept=kept)


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
    logger.info("nothing more comes from the kernel")
    nursery.cancel_scope.cancel()


async def _unmount(mounted: Mount, fd: int) -> None:
    """Take the mount of this /dev/fuse file away, whoever uses it."""
    with trio.move_on_after(_UNMOUNT_LIMIT_S, shield=True) as scope:
        await trio.to_thread.run_sync(_unmount_now, mounted, fd, abandon_on_cancel=True)
    if scope.cancelled_caught:
        logger.error("unmounting hangs, the connection is ended mountpoint=%s", mounted.mountpoint)
        _end(mounted, fd)


def _unmount_now(mounted: Mount, fd: int) -> None:
    error = _try_to_unmount(mounted, fd)
    for _ in range(_BUSY_TRIES):
        if error is None or error.errno != errno.EBUSY:
            break
        # Whoever has just ended may still be given up by the kernel, which does that in its own time.
        time.sleep(_BUSY_PAUSE_S)
        error = _try_to_unmount(mounted, fd)
    if error is None or error.errno == errno.EINVAL:
        return  # EINVAL: somebody was faster
    if error.errno != errno.EBUSY:
        logger.error("not unmounted, and nobody serves it any more error=%s", error)
        return
    logger.warning("mount is in use, its readers get errors from now on mountpoint=%s", mounted.mountpoint)
    _end(mounted, fd)  # first: what is mounted no more cannot be ended
    unmount(mounted.mountpoint, lazy=True)


def _try_to_unmount(mounted: Mount, fd: int) -> MountError | None:
    found = find_mount(mounted.mountpoint)
    # Somebody was faster, and another may have been mounted there since, even by the same number.
    if found is None or found.device != mounted.device or (is_over(fd) and not is_dead(found)):
        return None
    try:
        unmount(mounted.mountpoint)
    except MountError as error:
        return error
    return None


def _end(mounted: Mount, fd: int) -> None:
    """Also one that has left the tree."""
    with suppress(MountError):  # not root: it ends when we close the device
        abort_of(fd, mounted.connection)
