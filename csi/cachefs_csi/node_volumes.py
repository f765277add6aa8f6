"""Volumes on a node: staged once by the mount service, shown to pods by bind mounts, and looked at.

Nothing is remembered here: what there is, the kernel's mount table and the mount service say. So every call may be
repeated, also after a driver that was killed halfway, and finds what is left to do. Calls about one volume wait for
each other.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio
import xxhash

from cachefs.fuse import FS_TYPE, MountInfo, find_mount, is_dead
from cachefs.model import ConfigError, DeadlineError, ExistsError, NamespaceError, NotFoundError, UnavailableError
from cachefs.wire.mounts import MountState
from cachefs_csi.binding import bind, binds_of, check, parts_of, take_off, unbind, unbind_parts

STATISTICS_S = 5.0
"""What takes longer is told as a mount that does not answer."""


class Mounts(Protocol):
    """What is asked of the mount service of the node; `NodeMounts` in life."""

    async def ensure(
        self, mount_id: str, mountpoint: str, path: str, options: Mapping[str, str] | None = None
    ) -> object:
        """Have it mounted; returns when it answers. What is dead there is mounted anew."""

    async def remove(self, mountpoint: str) -> None:
        """Unmount and forget it; one that is not there is no error."""

    async def list(self) -> Sequence[MountState]:
        """All that were asked for."""


class NotStagedError(NamespaceError):
    """The volume has to be staged first."""


class InUseError(NamespaceError):
    """The volume is still shown to pods."""


@dataclass(frozen=True)
class Usage:
    """Of a volume; all 0 where it does not answer."""

    why_abnormal: str = ""
    """A sentence; "": it answers."""
    total_bytes: int = 0
    available_bytes: int = 0
    total_inodes: int = 0
    free_inodes: int = 0


class NodeVolumes:
    """Called from one trio thread. Every path is absolute, and what kubelet gave.

    Cancelled, a call may have done all or a part of it; the same again does the rest. Raises what the mount service
    does, ConfigError for a path that will not do, MountError, UnavailableError or DeadlineError for a mount that does
    not answer, and what stands with the methods.
    """

    def __init__(self, mounts: Mounts, directory: str) -> None:
        """`directory`: the driver's own, for mounts that belong to a single pod."""
        self._mounts = mounts
        self._directory = directory
        self._turns: dict[str, trio.Lock] = {}

    async def stage(self, volume_id: str, path: str, options: Mapping[str, str], staging: str) -> None:
        """Have a directory of the namespace mounted there. A dead mount is replaced, and what pods see of it too."""
        _check_path("staging_target_path", staging)
        async with self._turn(volume_id):
            await self._ensure(volume_id, path, options, staging)

    async def unstage(self, volume_id: str, staging: str) -> None:
        """Raises InUseError while a living mount is shown to pods: nothing is changed then."""
        _check_path("staging_target_path", staging)
        async with self._turn(volume_id):
            found = _ours(staging)
            if found is not None:
                targets, parts = binds_of(found.device, staging), parts_of(found.device)
                if (targets or parts) and not await _is_dead(found):
                    raise InUseError(f"volume {volume_id} is still shown at {', '.join(targets + parts)}")
                for part in parts:
                    await trio.to_thread.run_sync(take_off, part)
                for target in targets:
                    await trio.to_thread.run_sync(unbind, target)
            await self._mounts.remove(staging)

    async def publish(self, volume_id: str, staging: str, target: str) -> None:
        """Show what is staged at a target too. What is staged and dead is mounted anew, as it was asked for.

        Raises NotStagedError; ExistsError when another volume is shown there, and answers.
        """
        _check_path("staging_target_path", staging)
        _check_path("target_path", target)
        async with self._turn(volume_id):
            found = _ours(staging)
            if found is None:
                raise NotStagedError(f"volume {volume_id} is not staged at {staging}")
            if await _is_dead(found):
                known = next((each for each in await self._mounts.list() if each.mountpoint == staging), None)
                if known is None:
                    raise NotStagedError(f"what is staged at {staging} is dead, and not known to the mount service")
                await self._ensure(volume_id, known.path, known.options, staging)
            await self._show(staging, target)

    async def publish_alone(self, volume_id: str, path: str, options: Mapping[str, str], target: str) -> None:
        """Show a mount of its own at a target: for a volume that lives as long as its pod. Raises as `publish`."""
        _check_path("target_path", target)
        own = self._own(volume_id, target)
        async with self._turn(volume_id):
            await self._ensure(volume_id, path, options, own)
            await self._show(own, target)

    async def unpublish(self, volume_id: str, target: str) -> None:
        """Take away what a pod sees, and its own mount if it had one. A target that is not there is no error.

        Parts of it that kubelet has shown (subPath) go with it, if they are still there.
        """
        _check_path("target_path", target)
        async with self._turn(volume_id):
            await trio.to_thread.run_sync(unbind_parts, target)
            await trio.to_thread.run_sync(unbind, target)
            own = self._own(volume_id, target)
            # Also when only the directory is left: the service may know the mount, though it is dead and taken away.
            if os.path.lexists(own):
                await self._mounts.remove(own)
                await trio.to_thread.run_sync(unbind, own)

    async def usage(self, volume_path: str) -> Usage:
        """Of what is staged or shown there. Raises NotFoundError if nothing is."""
        _check_path("volume_path", volume_path)
        found = _ours(volume_path)
        if found is None:
            raise NotFoundError(f"no volume is mounted at {volume_path}")
        try:
            # It says why a mount does not answer, and the next call is of use only where it does.
            await trio.to_thread.run_sync(partial(check, volume_path, STATISTICS_S), abandon_on_cancel=True)
            with trio.fail_after(STATISTICS_S):
                status = await trio.to_thread.run_sync(os.statvfs, volume_path, abandon_on_cancel=True)
        except (UnavailableError, DeadlineError) as error:
            return Usage(str(error))
        except (OSError, trio.TooSlowError) as error:
            return Usage(f"the mount at {volume_path} does not answer: {error or 'too slow'}")
        return Usage(
            "",
            status.f_blocks * status.f_frsize,
            status.f_bavail * status.f_frsize,
            status.f_files,
            status.f_ffree,
        )

    # ---- steps -----------------------------------------------------------------------------------------------------

    async def _ensure(self, volume_id: str, path: str, options: Mapping[str, str], mountpoint: str) -> None:
        before = _ours(mountpoint)
        targets: list[str] = []
        if before is not None and await _is_dead(before):
            targets = binds_of(before.device, mountpoint)
            for part in parts_of(before.device):
                # kubelet makes it anew when a container starts, but not where it finds a dead one.
                await trio.to_thread.run_sync(take_off, part)
        await self._mounts.ensure(volume_id, mountpoint, path, options)
        await trio.to_thread.run_sync(check, mountpoint, abandon_on_cancel=True)
        for target in targets:
            await trio.to_thread.run_sync(bind, mountpoint, target)

    async def _show(self, mountpoint: str, target: str) -> None:
        there, wanted = _ours(target), _ours(mountpoint)
        if there is not None and wanted is not None and there.device != wanted.device and not await _is_dead(there):
            raise ExistsError(f"target_path {target}: another volume is shown there")
        await trio.to_thread.run_sync(bind, mountpoint, target)
        if wanted is not None:
            # Of a mount that died before, and that the mount service has replaced meanwhile.
            await trio.to_thread.run_sync(partial(unbind_parts, target, shown=wanted.device))
        await trio.to_thread.run_sync(check, target, abandon_on_cancel=True)

    def _own(self, volume_id: str, target: str) -> str:
        """Where the mount for one target is: follows from what `unpublish` is told as well."""
        return os.path.join(self._directory, xxhash.xxh3_128_hexdigest(f"{volume_id}\0{target}".encode()))

    @asynccontextmanager
    async def _turn(self, volume_id: str) -> AsyncGenerator[None, None]:
        lock = self._turns.setdefault(volume_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            statistics = lock.statistics()
            if not statistics.locked and not statistics.tasks_waiting:
                self._turns.pop(volume_id, None)


def _ours(path: str) -> MountInfo | None:
    """The cachefs mount that is seen on exactly this directory; links are not followed."""
    found = find_mount(path)
    return found if found is not None and found.fs_type == FS_TYPE and not _is_link_to_mount(path) else None


def _is_link_to_mount(path: str) -> bool:
    """Of a path where `find_mount` finds one. Never asks the mount, which may hang: in the table are no links."""
    found = find_mount(path)
    parent, name = os.path.split(path.rstrip("/"))
    return found is not None and found.mountpoint != os.path.join(os.path.realpath(parent), name)


async def _is_dead(info: MountInfo) -> bool:
    return await trio.to_thread.run_sync(is_dead, info, abandon_on_cancel=True)


def _check_path(field: str, path: str) -> None:
    """Raises ConfigError."""
    if not os.path.isabs(path) or os.path.normpath(path) != path.rstrip("/") or "\0" in path:
        raise ConfigError(field, path, "an absolute path without . and ..")
    if find_mount(path) is not None and not _is_link_to_mount(path):
        return  # a link is no mountpoint; and one that hangs would have all calls wait
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(field, path, "a path that is not too long") from error
        return  # not there, or a dead mount
    if is_link:
        raise ConfigError(field, path, "a directory; not a symbolic link")
