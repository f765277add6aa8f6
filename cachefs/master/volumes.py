"""Volumes: made, bounded and taken away by name, so that whoever does not know how far it came just asks again.

All that makes a volume is one transaction: its under-store, its quota and the record of it. So a master that is killed
at any time has made it, or has not. The answer to an asker that left is the same: what was asked last is done or not,
and the next request about that name waits until that is known.

Several volumes may be of one directory, which has one quota: the largest that one of them asks for. One that was set by
hand before stays as it is, and is not taken away with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import trio

from cachefs.master.attaching import Attaching
from cachefs.master.mount_table import Along
from cachefs.master.namespace import Namespace
from cachefs.master.quotas import QuotaControl
from cachefs.master.writer import Writer
from cachefs.meta import MetaStore, Volume, normalise_mount_path
from cachefs.model import (
    VOLUMES_PATH,
    ConfigError,
    ExistsError,
    NotADirectory,
    NotFoundError,
    UnavailableError,
    format_size,
    is_credential,
    volume_id,
    without_credentials,
)
from cachefs.net import Service, Session
from cachefs.wire import volumes as v
from cachefs.wire.messages import Done

logger = logging.getLogger(__name__)

_MOST_CONTEXT_BYTES = 16 * 1024
_MOST_TOLD_BYTES = 512 * 1024
"""Of one answer, which takes 1 MiB at most."""


class Volumes:
    """Handlers of requests."""

    def __init__(
        self, store: MetaStore, writer: Writer, namespace: Namespace, attaching: Attaching, quotas: QuotaControl
    ) -> None:
        self._store = store
        self._writer = writer
        self._namespace = namespace
        self._attaching = attaching
        self._quotas = quotas
        self._locks: dict[str, trio.Lock] = {}

    def add_to(self, service: Service) -> None:
        service.on(v.CreateVolume, self.create)
        service.on(v.DeleteVolume, self.delete)
        service.on_at_once(v.GetVolume, self.get)
        service.on_at_once(v.ListVolumes, self.list)
        service.on(v.SetVolumeQuota, self.set_quota)
        service.on(v.RenewVolume, self.renew)

    async def create(self, request: v.CreateVolume, session: Session) -> v.VolumeInfo:
        wanted = _wanted(request)
        async with self._alone(wanted.volume_id):
            known = self._store.volume(wanted.volume_id)
            if known is not None:
                renewed = replace(known, options=wanted.options) if request.replaces_options else known
                _check_same(renewed, wanted)
                if renewed != known and self._is_attached(known.path):
                    return await self._reopen(known, renewed)
                if not known.url or self._is_attached(known.path):
                    return self._info(known)
                # The master was told of another store at its path, and is not told any more.
                wanted = renewed
            if wanted.url:
                async with (
                    self._attaching.tried(wanted.path, wanted.url, wanted.options) as tried,
                    self._changing(known, wanted) as (made, along),
                ):
                    await self._attaching.attach(tried, along)
            else:
                await self._check_directory(wanted.path)
                async with self._changing(None, wanted) as (made, along):
                    await self._writer.run(along.write, lambda _: along.then())
            logger.info("volume made id=%s path=%s quota=%d", made.volume_id, made.path, made.quota_bytes)
            return self._info(made)

    async def _reopen(self, known: Volume, renewed: Volume) -> v.VolumeInfo:
        """Workers are told when the options they have do not do any more."""
        async with (
            self._attaching.tried_again(known.path, renewed.url, renewed.options) as tried,
            self._changing(known, renewed) as (made, along),
        ):
            await self._attaching.reopen(tried, along)
        logger.info("volume has other options id=%s names=%s", made.volume_id, sorted(made.options))
        return self._info(made)

    async def delete(self, request: v.DeleteVolume, session: Session) -> Done:
        async with self._alone(request.id):
            known = self._store.volume(request.id)
            if known is None:
                return Done()
            if known.url:
                self._check_none_inside(known)
            async with self._changing(known, None) as (_, along):
                if known.url and self._is_attached(known.path):
                    await self._attaching.remove(known.path, dry_run=False, even_last=True, along=along)
                else:
                    await self._writer.run(along.write, lambda _: along.then())
            logger.info("volume removed id=%s path=%s", known.volume_id, known.path)
            return Done()

    async def set_quota(self, request: v.SetVolumeQuota, session: Session) -> v.VolumeInfo:
        async with self._alone(request.id):
            known = self._known(request.id)
            async with self._changing(known, replace(known, quota_bytes=request.quota_bytes)) as (changed, along):
                await self._writer.run(along.write, lambda _: along.then())
            return self._info(changed)

    async def renew(self, request: v.RenewVolume, session: Session) -> v.VolumeInfo:
        async with self._alone(request.id):
            known = self._known(request.id)
            if not known.url:
                accepted = "a volume with an under-store of its own; this one is a directory of another one"
                raise ConfigError("id", request.id, accepted)
            renewed = replace(known, options=with_credentials(known, request.options))
            if renewed == known:
                return self._info(known)
            if not self._is_attached(known.path):
                raise UnavailableError(f"{known.name!r} ({known.volume_id}): its under-store is not attached now")
            return await self._reopen(known, renewed)

    def get(self, request: v.GetVolume, session: Session) -> v.VolumeInfo:
        return self._info(self._known(request.id))

    def list(self, request: v.ListVolumes, session: Session) -> v.VolumeList:
        found = self._store.volumes(request.after, request.limit + 1)
        told: list[v.VolumeInfo] = []
        told_bytes = 0
        for each in found[: request.limit]:
            info = self._info(each)
            told_bytes += len(msgspec.msgpack.encode(info))
            if told and told_bytes > _MOST_TOLD_BYTES:
                break
            told.append(info)
        return v.VolumeList(told, told[-1].id if len(told) < len(found) else "")

    def check_no_volume(self, path: str) -> None:
        """Raises ConfigError where an under-store is attached for a volume: it goes with that alone."""
        for each in self._store.volumes_at(path):
            if each.url:
                accepted = f"one that belongs to no volume; cachefs volume remove {each.volume_id} takes this one away"
                raise ConfigError("PATH", path, accepted)

    def _check_none_inside(self, outer: Volume) -> None:
        """Raises ConfigError where another volume is a directory of this one's store: it would be gone with it."""
        inside = self._store.volume_below(outer.path)
        if inside is not None:
            accepted = f"one that no other volume is in: remove {inside.volume_id} ({inside.path}) first"
            raise ConfigError("id", outer.volume_id, accepted)

    @asynccontextmanager
    async def _alone(self, of_id: str) -> AsyncGenerator[None, None]:
        """One request about a volume at a time, once what was asked before is written."""
        lock = self._locks.setdefault(of_id, trio.Lock())
        try:
            async with lock:
                # An asker that left may have left a write behind.
                await self._writer.run(lambda: None)
                yield
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._locks.pop(of_id, None)

    @asynccontextmanager
    async def _changing(
        self, before: Volume | None, after: Volume | None
    ) -> AsyncGenerator[tuple[Volume, Along], None]:
        """What to write for a volume to become another one, or none, with what that means for the quota of its path;
        and how it will be. To be written within the block. Raises ConfigError, CapacityError.
        """
        at = before or after
        assert at is not None
        async with self._quotas.alone() as quotas:
            others = [each for each in self._store.volumes_at(at.path) if each.volume_id != at.volume_id]
            was_set = any(each.sets_quota for each in (*others, *([before] if before else [])))
            if after is not None:
                by_hand = at.path in quotas and not was_set
                after = replace(after, sets_quota=after.quota_bytes > 0 and not by_hand)
                if before is None:
                    after = replace(after, created_ns=time.time_ns())
            sets = [each.quota_bytes for each in (*others, *([after] if after else [])) if each.sets_quota]
            if sets and (at.path not in quotas or quotas[at.path].limit_bytes != max(sets)):
                await self._quotas.check(at.path, max(sets))

            def write() -> None:
                if after is not None:
                    self._store.put_volume(after)
                else:
                    self._store.remove_volume(at.volume_id)
                if sets:
                    self._store.set_quota(at.path, max(sets))
                elif was_set:
                    self._store.remove_quota(at.path)

            def then() -> None:
                if sets or was_set:
                    self._quotas.changed()

            yield after or at, Along(write, then)

    def _is_attached(self, path: str) -> bool:
        return any(each.mount.path == path for each in self._namespace.mounts.all())

    async def _check_directory(self, path: str) -> None:
        """Raises NotFoundError, NotADirectory, UnderStoreError."""
        if not (await self._namespace.resolve_path(path)).attr.is_dir:
            raise NotADirectory(f"{path}: a volume is a directory, with all that is below it; this is a file")

    def _known(self, of_id: str) -> Volume:
        found = self._store.volume(of_id)
        if found is None:
            raise NotFoundError(f"there is no volume {of_id!r}")
        return found

    def _info(self, volume: Volume) -> v.VolumeInfo:
        return v.VolumeInfo(
            id=volume.volume_id,
            name=volume.name,
            path=volume.path,
            url=without_credentials(volume.url),
            quota_bytes=volume.quota_bytes,
            used_bytes=self._quotas.used_bytes(volume.path),
            context=volume.context,
            created_s=volume.created_ns / 1e9,
        )


def _wanted(request: v.CreateVolume) -> Volume:
    """Raises ConfigError."""
    name_bytes = len(request.name.encode())
    if not 1 <= name_bytes <= v.MOST_NAME_BYTES or not request.name.isprintable():
        raise ConfigError("name", request.name, f"1 to {v.MOST_NAME_BYTES} bytes of printable text")
    if bool(request.url) == bool(request.path):
        given = f"{without_credentials(request.url)} {request.path}".strip()
        raise ConfigError("url, path", given, "one of the two: an under-store, or a directory of the namespace")
    if request.path and request.options:
        raise ConfigError("options", ", ".join(sorted(request.options)), "none for a directory of the namespace")
    if request.url and "://" not in request.url:
        raise ConfigError(
            "url", request.url.rpartition("@")[2], "a URL such as s3://BUCKET/PREFIX or file:///DIRECTORY"
        )
    context_bytes = len(msgspec.msgpack.encode(request.context))
    if context_bytes > _MOST_CONTEXT_BYTES:
        raise ConfigError("context", format_size(context_bytes), f"at most {format_size(_MOST_CONTEXT_BYTES)}")
    of_id = volume_id(request.name)
    return Volume(
        volume_id=of_id,
        name=request.name,
        path=normalise_mount_path(request.path, "path") if request.path else f"{VOLUMES_PATH}/{of_id}",
        url=request.url,
        options=request.options,
        quota_bytes=request.quota_bytes,
        sets_quota=False,
        context=request.context,
    )


def _check_same(known: Volume, wanted: Volume) -> None:
    """Raises ExistsError that names what differs, and of options only which."""
    differs = [
        f"{what} is {one}, not {other}"
        for what, one, other in (
            ("name", known.name, wanted.name),
            ("it", _kind(known), _kind(wanted)),
            ("url", without_credentials(known.url), without_credentials(wanted.url)),
            # That of an under-store follows from the name.
            ("path", "" if known.url else known.path, "" if wanted.url else wanted.path),
            ("quota", f"{known.quota_bytes} bytes", f"{wanted.quota_bytes} bytes"),
        )
        if one != other and one and other
    ]
    if known.url != wanted.url and without_credentials(known.url) == without_credentials(wanted.url):
        differs.append("the credentials in url")
    differs += [f"option {name}" for name in _different(known.options, wanted.options)]
    differs += [f"context {name}" for name in _different(known.context, wanted.context)]
    if differs:
        raise ExistsError(f"volume {wanted.name!r} exists ({known.volume_id}) and differs: {', '.join(differs)}")


def with_credentials(volume: Volume, given: Mapping[str, str]) -> dict[str, str]:
    """The options of a volume with other credentials. Raises ExistsError for other changes, naming the options only."""
    differs = sorted(name for name in given if not is_credential(name) and given[name] != volume.options.get(name))
    if differs:
        raise ExistsError(
            f"volume {volume.name!r} exists ({volume.volume_id}) and differs: "
            f"{', '.join(f'option {name}' for name in differs)}; only its credentials can be renewed"
        )
    options = {**volume.options, **given}
    if "key" in given and "token" not in given:
        # That of a session is of the key it came with.
        options.pop("token", None)
    return options


def _kind(volume: Volume) -> str:
    return "an under-store" if volume.url else "a directory"


def _different(one: dict[str, str], other: dict[str, str]) -> Sequence[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
