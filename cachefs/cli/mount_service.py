"""The mount service of a node: it has one server running for each mount that it was asked for.

One task for each mount starts servers, one after the other; the mount itself is held by a keeper elsewhere (see
`fuse.node_keeper`), so that this process and its servers may be killed, and exchanged, while jobs read on. Two services
may run for a moment, as in a rolling update: the one whose socket was replaced starts nothing any more, and its servers
end as the other's take over.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Literal

import trio

from cachefs.cli.children import Child, child_of
from cachefs.cli.mount_records import MountRecord, MountRecords
from cachefs.fuse import (
    FS_TYPE,
    MountError,
    MountInfo,
    abort,
    all_mounts,
    allow_left_below,
    find_mount,
    is_dead,
    unmount,
)
from cachefs.fuse.keeping import ask, ask_node_keeper, is_listening, parse_facts, socket_of
from cachefs.model import CachefsError, ConfigError, ExistsError, NamespaceError, TransportError, UnavailableError
from cachefs.net import Service, Session, open_background
from cachefs.wire import mounts as m
from cachefs.wire.messages import Done

logger = logging.getLogger(__name__)

FIRST_SERVER_S = 90.0
"""For whoever asks for a mount."""
ABSENT_S = 1800
"""How long a mount without any server is kept: nodes may have to fetch the image of the next version first."""
_LONGEST_PAUSE_S = 5.0
_LIVED_S = 30.0
_LOOK_S = 2.0
_ANSWER_S = 10.0
_KEEPER_END_S = 25.0
"""More than a keeper gives whoever takes its mount away for it."""
_OF_THE_HOST = "host:"
"""What the ids of mounts begin with that nobody asks for but this service itself."""
STARTING_S = 120.0
"""One that is not served for longer does not keep the service from being ready: it may be of a directory that is gone,
and a service that is never ready is what the update of a cluster waits for.
"""
_BUSY_TRIES, _BUSY_PAUSE_S = 20, 0.1


class _Mount:
    """One that was asked for."""

    def __init__(self, record: MountRecord) -> None:
        self.record = record
        self.lock = trio.Lock()
        self.state: Literal["serving", "starting", "dead"] = "dead"
        self.why = ""
        self.since = trio.current_time()
        """That it is in this state."""
        self.device = ""
        self.child: Child | None = None
        self.keeper_socket = ""
        self.restarts = 0
        self.scope: trio.CancelScope | None = None
        """Of the task that has servers running."""
        self.ended = trio.Event()
        self.changed = trio.Event()
        self.is_to_go = False
        """No server is started any more."""

    def become(self, state: Literal["serving", "starting", "dead"], why: str = "") -> None:
        if state != self.state:
            self.since = trio.current_time()
        self.state, self.why = state, why
        self.changed.set()
        self.changed = trio.Event()

    def told(self) -> m.MountState:
        record = self.record
        return m.MountState(
            *(record.id, record.mountpoint, record.path, record.options, self.state, self.why, self.device),
            server_pid=self.child.pid if self.child is not None else 0,
            keeper_socket=self.keeper_socket,
            restarts=self.restarts,
        )


class MountService:
    """Handlers of requests, and what they keep running."""

    def __init__(
        self,
        records: MountRecords,
        node_keeper: str,
        arguments_of: Callable[[MountRecord], list[str]],
        is_replaced: Callable[[], bool],
        nursery: trio.Nursery,
    ) -> None:
        """`node_keeper`: its socket. `arguments_of`: those of `cachefs mount` for a mount; raises ConfigError for
        options that will not do. `is_replaced`: whether another service has taken our place.
        """
        self._records = records
        self._node_keeper = node_keeper
        self._arguments_of = arguments_of
        self._is_replaced = is_replaced
        self._nursery = nursery
        self._mounts: dict[str, _Mount] = {}
        self.restarts = 0
        """Servers that were started in the place of one that ended."""

    @property
    def mounts(self) -> list[m.MountState]:
        return [each.told() for _, each in sorted(self._mounts.items())]

    def add_to(self, service: Service) -> None:
        service.on(m.EnsureMount, self.ensure)
        service.on(m.RemoveMount, self.remove)
        service.on_at_once(m.ListMounts, lambda request, session: m.MountList(self.mounts))

    def go_on(self) -> None:
        """With what an earlier service was asked for."""
        for record in self._records.load():
            mount = self._mounts[record.mountpoint] = _Mount(record)
            try:
                self._arguments_of(record)
            except ConfigError as error:
                mount.become("dead", str(error))
                logger.error("not mounted mountpoint=%s error=%s", record.mountpoint, error)
                continue
            self._start(mount)

    async def why_not_ready(self) -> str | None:
        late = trio.current_time() - STARTING_S
        waiting = sum(each.state == "starting" and each.since > late for each in self._mounts.values())
        return f"{waiting} of {len(self._mounts)} mounts are not served yet" if waiting else None

    def degraded(self) -> list[str]:
        late = trio.current_time() - STARTING_S
        return [
            f"{mountpoint}: {each.why}"
            for mountpoint, each in sorted(self._mounts.items())
            if each.state == "dead" or (each.state == "starting" and each.since <= late)
        ]

    def watched(self) -> list[tuple[dict[str, str], str]]:
        """(labels, where it shows its metrics) of each server that was told to."""
        return [
            ({"mount": each.record.id, "mountpoint": mountpoint}, each.child.facts["http"])
            for mountpoint, each in sorted(self._mounts.items())
            if each.state == "serving" and each.child is not None and "http" in each.child.facts
        ]

    def have(self, host_mounts: Mapping[str, str]) -> None:
        """Ask ourselves for these, a directory of the namespace for each mountpoint, and no others any more."""
        earlier = {each.mountpoint for each in self.mounts if each.id.startswith(_OF_THE_HOST)}
        for mountpoint in {*host_mounts, *earlier}:
            self._nursery.start_soon(self._have, mountpoint, host_mounts.get(mountpoint))

    async def _have(self, mountpoint: str, path: str | None) -> None:
        """Until it is so. `path`: None for one that is not wanted any more."""
        pause_s, told = 1.0, ""
        while not self._is_replaced():
            mount = self._mounts.get(mountpoint)
            try:
                if mount is not None and mount.record.id.startswith(_OF_THE_HOST) and mount.record.path != path:
                    await self._remove(mountpoint)
                if path is not None:
                    await self._ensure(m.EnsureMount(_OF_THE_HOST + mountpoint, mountpoint, path))
                return
            except (ConfigError, ExistsError) as error:
                logger.error("not mounted mountpoint=%s error=%s", mountpoint, error)
                return
            except CachefsError as error:
                if str(error) != told:
                    told = str(error)
                    logger.warning("not as it is to be yet mountpoint=%s error=%s", mountpoint, told)
            await trio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    # ---- requests --------------------------------------------------------------------------------------------------

    async def ensure(self, request: m.EnsureMount, session: Session) -> m.MountState:
        return await self._ensure(request)

    async def _ensure(self, request: m.EnsureMount) -> m.MountState:
        record = MountRecord(request.id, _checked("mountpoint", request.mountpoint), request.path, request.options)
        _checked("path", request.path)
        if not request.id or len(request.id.encode()) > m.MOST_ID_BYTES:
            raise ConfigError("id", request.id, f"1 to {m.MOST_ID_BYTES} bytes")
        self._arguments_of(record)
        mount = self._mounts.get(record.mountpoint)
        if mount is None:
            mount = self._mounts[record.mountpoint] = _Mount(record)
        async with mount.lock:
            if self._mounts.get(record.mountpoint) is not mount:
                return await self._ensure(request)  # it was removed meanwhile
            self._check_same(mount.record, record)
            if mount.scope is not None and mount.state == "serving":
                if await self._answers(record.mountpoint, mount.device):
                    return mount.told()
                await self._wait_for_its_end(mount)
            is_new, was_mounted = mount.scope is None, True
            try:
                if is_new:
                    was_mounted = await trio.to_thread.run_sync(self._prepare, record)
                    self._start(mount, is_asked=True)
                await self._wait_until_serving(mount)
            except BaseException:
                if is_new:
                    with trio.CancelScope(shield=True):
                        await self._give_up(mount, drop=not was_mounted)
                raise
            return mount.told()

    async def remove(self, request: m.RemoveMount, session: Session) -> Done:
        await self._remove(_checked("mountpoint", request.mountpoint))
        return Done()

    async def _remove(self, mountpoint: str) -> None:
        mount = self._mounts.get(mountpoint)
        if mount is None:
            return
        async with mount.lock:
            if self._mounts.get(mountpoint) is not mount:
                return
            # Who reads there without a server waits, and uses the mount.
            with trio.move_on_after(_ANSWER_S):
                while mount.state == "starting":
                    await mount.changed.wait()
            mount.is_to_go, was_served = True, mount.scope is not None
            if mount.scope is not None and mount.state != "serving":
                # It would be mounted anew meanwhile.
                mount.scope.cancel()
                await mount.ended.wait()
            try:
                await self._unmount(mount)
            except BaseException:
                mount.is_to_go = False
                if was_served and mount.scope is None:
                    self._start(mount)
                raise
            with trio.CancelScope(shield=True):
                await self._give_up(mount)

    def _prepare(self, record: MountRecord) -> bool:
        """Whether it is mounted there already, and lives, though we know nothing of it.

        Raises ExistsError when somebody else mounted something there, NamespaceError.
        """
        self._clear(record.mountpoint)
        found = find_mount(record.mountpoint)
        if found is not None and found.fs_type != FS_TYPE:
            raise ExistsError(f"{record.mountpoint}: {found.fs_type} {found.source} is mounted there")
        if found is not None and found.source != f"cachefs:{record.path}":
            raise ExistsError(
                f"{record.mountpoint} is mounted already, and shows {found.source.removeprefix('cachefs:')}"
            )
        if found is None:
            try:
                os.makedirs(record.mountpoint, 0o755, exist_ok=True)
                if not stat.S_ISDIR(os.lstat(record.mountpoint).st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
            except OSError as error:
                raise NamespaceError(f"{record.mountpoint} cannot be mounted on: {error.strerror}") from error
            allow_left_below(record.mountpoint)
        self._records.save(record)
        return found is not None

    def _check_same(self, known: MountRecord, wanted: MountRecord) -> None:
        for name in ("id", "path", "options"):
            if getattr(known, name) != getattr(wanted, name):
                raise ExistsError(
                    f"{known.mountpoint} is mounted already with {name} {getattr(known, name)!r}, "
                    f"not {getattr(wanted, name)!r}; remove it first"
                )

    async def _wait_for_its_end(self, mount: _Mount) -> None:
        """Of a server whose mount is not there any more. Raises NamespaceError, UnavailableError."""
        where = mount.record.mountpoint
        others = [each.mountpoint for each in all_mounts() if each.device == mount.device and each.mountpoint != where]
        if others and find_mount(where) is None:
            shown = ", ".join(sorted(others)[:3])
            raise NamespaceError(f"{where} was unmounted, and is in use where it is mounted as well: {shown}")
        with trio.move_on_after(_ANSWER_S):
            while mount.state == "serving":
                await mount.changed.wait()
            return
        raise UnavailableError(f"{where} was unmounted, and what served it has not ended within {_ANSWER_S:g} s")

    async def _wait_until_serving(self, mount: _Mount) -> None:
        """Raises UnavailableError."""
        with trio.move_on_after(FIRST_SERVER_S):
            while mount.state != "serving":
                if mount.scope is None:
                    raise UnavailableError(f"{mount.record.mountpoint} is not mounted: {mount.why}")
                await mount.changed.wait()
            return
        raise UnavailableError(f"{mount.record.mountpoint} is not mounted within {FIRST_SERVER_S:g} s: {mount.why}")

    async def _unmount(self, mount: _Mount) -> None:
        """Raises NamespaceError, and has changed nothing then."""
        mountpoint = mount.record.mountpoint
        found = find_mount(mountpoint)
        if found is None or found.fs_type != FS_TYPE:
            return
        others = [each.mountpoint for each in all_mounts() if each.device == found.device]
        others.remove(found.mountpoint)
        if others and not await self._is_dead(mountpoint, found):
            raise NamespaceError(f"{mountpoint} is in use: it is mounted on {', '.join(sorted(others)[:3])} as well")
        for _ in range(_BUSY_TRIES):
            try:
                await self._unmount_now(mountpoint, found)
                break
            except MountError as error:
                if error.errno != errno.EBUSY:
                    raise NamespaceError(str(error)) from error
                last = error
            await trio.sleep(_BUSY_PAUSE_S)  # what has just ended may still be given up by the kernel
        else:
            raise NamespaceError(str(last))
        if mount.child is not None:
            with trio.move_on_after(_ANSWER_S):
                await mount.ended.wait()

    async def _give_up(self, mount: _Mount, *, drop: bool = True) -> None:
        """Nothing of it stays. The mount itself is away, or never was there; or (`drop`: False) is not ours to end."""
        if mount.scope is not None:
            mount.scope.cancel()
            await mount.ended.wait()
        mountpoint = mount.record.mountpoint
        if drop:
            with suppress(MountError, TransportError, OSError):
                await trio.to_thread.run_sync(ask_node_keeper, self._node_keeper, ["drop", mountpoint])
                await self._wait_for_the_end_of_its_keeper(mountpoint)
            with suppress(MountError, OSError):
                await trio.to_thread.run_sync(self._clear, mountpoint)
                if find_mount(mountpoint) is None:  # looking at one without a server would take for ever
                    allow_left_below(mountpoint)
        self._records.remove(mountpoint)
        if self._mounts.get(mountpoint) is mount:
            del self._mounts[mountpoint]

    async def _wait_for_the_end_of_its_keeper(self, mountpoint: str) -> None:
        """It ends the connection of what was mounted and never answered, though it may not see where that is."""
        with trio.move_on_after(_KEEPER_END_S):
            # It does not answer any more before it is gone; and until then the next server would find it there.
            while True:
                if not is_listening(self._keeper_of(mountpoint)):
                    return
                await trio.sleep(0.02)

    def _keeper_of(self, mountpoint: str) -> str:
        """Where it listens, if there is one."""
        return socket_of(mountpoint, os.path.dirname(self._node_keeper))

    # ---- servers ---------------------------------------------------------------------------------------------------

    def _start(self, mount: _Mount, *, is_asked: bool = False) -> None:
        """`is_asked`: somebody waits, and is told when the first server fails; otherwise there is another one."""
        mount.scope = trio.CancelScope()
        mount.ended = trio.Event()
        mount.become("starting", "its first server is not ready yet")
        self._nursery.start_soon(self._keep_served, mount, mount.scope, is_asked)

    async def _keep_served(self, mount: _Mount, scope: trio.CancelScope, is_asked: bool) -> None:
        """Until it is unmounted by somebody, removed, or another service takes over."""
        in_a_row = 0
        try:
            with scope:
                while not (self._is_replaced() or mount.is_to_go):
                    began = trio.current_time()
                    why = "its server ended"
                    try:
                        async with self._server(mount) as child:
                            await self._watch(mount, child)
                    except (CachefsError, OSError) as error:
                        why = str(error)
                        if is_asked and not mount.device:
                            mount.become("dead", why)
                            return
                    finally:
                        mount.child = None
                    if await trio.to_thread.run_sync(find_mount, mount.record.mountpoint) is None and mount.device:
                        # Whoever asks for it again would be given a keeper that is about to end.
                        await self._wait_for_the_end_of_its_keeper(mount.record.mountpoint)
                        mount.device = ""
                        mount.become("dead", "it was unmounted")
                        if not mount.is_to_go:
                            logger.warning("unmounted by somebody mountpoint=%s", mount.record.mountpoint)
                        return
                    in_a_row = in_a_row + 1 if trio.current_time() < began + _LIVED_S else 1
                    mount.restarts += 1
                    self.restarts += 1
                    mount.become("starting", why)
                    if not self._is_replaced():
                        message = "a server ended, another is started mountpoint=%s count=%d reason=%s"
                        logger.warning(message, mount.record.mountpoint, in_a_row, why)
                    await trio.sleep(0 if in_a_row == 1 else min(_LONGEST_PAUSE_S, 0.05 * 2**in_a_row))
                mount.become("dead", "another service has taken over" if not mount.is_to_go else "it is unmounted")
        finally:
            mount.scope = None
            mount.ended.set()
            mount.become("dead", mount.why)

    @asynccontextmanager
    async def _server(self, mount: _Mount) -> AsyncGenerator[Child, None]:
        """One that answers. Raises CachefsError, OSError."""
        record = mount.record
        words = ["keep", record.mountpoint, f"absent={ABSENT_S}"]
        await trio.to_thread.run_sync(self._clear, record.mountpoint)
        mount.keeper_socket = await trio.to_thread.run_sync(ask_node_keeper, self._node_keeper, words)
        arguments = [*self._arguments_of(record), "--keeper-socket", mount.keeper_socket]
        async with child_of("mount", arguments) as child:
            mount.child = child
            async with open_background() as nursery:
                nursery.start_soon(self._kill_if_hung, mount, child)
                await child.wait_ready()
            found = await trio.to_thread.run_sync(find_mount, record.mountpoint)
            mount.device = found.device if found is not None else ""
            mount.become("serving")
            yield child

    async def _watch(self, mount: _Mount, child: Child) -> None:
        """Until it ends."""
        async with open_background() as nursery:
            nursery.start_soon(self._kill_if_hung, mount, child)
            await child.wait_end()

    async def _kill_if_hung(self, mount: _Mount, child: Child) -> None:
        """One that the keeper cannot kill, in another pid namespace, we can: it is ours. While it is starting, the
        keeper may mean the one before it, of which an earlier service takes care at once.
        """
        seen = 0
        while True:
            await trio.sleep(_LOOK_S)
            with suppress(TransportError, ConfigError):
                answer = await trio.to_thread.run_sync(ask, mount.keeper_socket, "who", _LOOK_S)
                values, _ = parse_facts(answer.removeprefix("keeper "))
                seen = seen + 1 if values.get("state") == "killed" else 0
                if seen >= (1 if mount.state == "serving" else 2):
                    child.kill()

    def _clear(self, mountpoint: str) -> None:
        """Take a dead mount away, of which the keeper may not see the mountpoint: it may be in another namespace."""
        while True:
            found = find_mount(mountpoint)
            if found is None or found.fs_type != FS_TYPE or not self._is_dead_now(mountpoint, found):
                return
            logger.warning("a dead mount is taken away mountpoint=%s", mountpoint)
            unmount(mountpoint, lazy=True)

    async def _unmount_now(self, mountpoint: str, found: MountInfo) -> None:
        """Raises MountError."""
        dead = await self._is_dead(mountpoint, found)

        def do() -> None:
            if dead:
                with suppress(MountError):
                    abort(found)
            try:
                unmount(found.mountpoint, lazy=dead)
            except MountError as error:
                if error.errno != errno.EINVAL:  # somebody was faster
                    raise

        await trio.to_thread.run_sync(do)

    async def _answers(self, mountpoint: str, device: str) -> bool:
        """Whether what we mounted there is there, and lives."""
        found = await trio.to_thread.run_sync(find_mount, mountpoint)
        return found is not None and found.device == device and not await self._is_dead(mountpoint, found)

    async def _is_dead(self, mountpoint: str, found: MountInfo) -> bool:
        return await trio.to_thread.run_sync(self._is_dead_now, mountpoint, found)

    def _is_dead_now(self, mountpoint: str, found: MountInfo) -> bool:
        """A mount that only its keeper holds is not looked at: whoever looks waits there for a server, and uses the
        mount, so that we ourselves would keep it from being unmounted.
        """
        with suppress(TransportError, ConfigError):
            answer = ask(self._keeper_of(mountpoint), "who", _LOOK_S)
            values, _ = parse_facts(answer.removeprefix("keeper "))
            if values.get("state") == "none" and values.get("connection") == str(found.connection):
                return False
        return is_dead(found)


def _checked(key: str, path: str) -> str:
    if not path.startswith("/") or os.path.normpath(path) != path or "\0" in path:
        raise ConfigError(key, path, "an absolute path without . and ..")
    return path
