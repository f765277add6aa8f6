"""Under-stores of the namespace: those the master is told at its start, and those that come and go while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from cachefs.master.mounted import Holder, MountedStore, UnopenedStore
from cachefs.master.namespace import Namespace
from cachefs.meta import MetaStore, is_below, normalise_mount_path
from cachefs.model import CachefsError, ConfigError, NotFoundError, UnavailableError, UnderStoreError
from cachefs.ufs import UnderStore, at_most

logger = logging.getLogger(__name__)

FIRST_CONTACT_S = 8.0
"""How long an under-store may take to answer at first; later requests have their store's deadline."""


async def open_mounts(
    store: MetaStore, told: tuple[tuple[str, str], ...], options: dict[str, str], holder: Holder
) -> list[MountedStore]:
    """Open and attach what the master is told at its start, as (path, URL), and what was added by hand before.

    Raises ConfigError; NotFoundError, DeniedError, UnavailableError when a store that it is told does not answer; one
    that was mounted before may be unavailable. Those added by hand never keep it from starting: without it, nobody
    could remove them.
    """
    gone = store.removed_mounts()
    opened: dict[str, tuple[str, dict[str, str], UnderStore, Callable[[], None], CachefsError | None]] = {}
    pairs = []
    for path, url in told:
        ufs, close = await holder.open(url, options)
        path = normalise_mount_path(path)
        pairs.append((path, ufs.origin))
        if (path, ufs.origin) in gone:
            logger.warning(
                "not attached, it was removed by hand path=%s origin=%s hint=%r", path, ufs.origin, "cachefs ufs add"
            )
            close()
        else:
            failure = await _first_contact(ufs, is_known=store.is_attached(path, ufs.origin))
            opened[path] = (url, options, ufs, close, failure)
    for added in store.added_mounts():
        if added.path not in opened:
            ufs, close, failure = await _open_added(added.url, added.options, added.origin, holder)
            opened[added.path] = (added.url, added.options, ufs, close, failure)
    by_hand = {added.path for added in store.added_mounts()}.difference(path for path, _ in pairs)
    attached = []
    for mount in store.attach(pairs):
        url, its_options, ufs, close, error = opened[mount.path]
        mounted = MountedStore(mount, url, its_options, ufs, mount.path in by_hand, close, is_told=error is not None)
        if error is not None:
            mounted.health.failed(error)
        attached.append(mounted)
    return attached


async def _open_added(
    url: str, options: dict[str, str], origin: str, holder: Holder
) -> tuple[UnderStore, Callable[[], None], CachefsError | None]:
    """With why it does not answer."""
    try:
        ufs, close = await holder.open(url, options)
    except CachefsError as error:
        logger.warning("under-store cannot be opened, serving what is known origin=%s error=%s", origin, error)
        return UnopenedStore(origin, error), lambda: None, error
    try:
        return ufs, close, await _first_contact(ufs, is_known=True)
    except CachefsError as error:
        logger.warning("under-store is away, serving what is known origin=%s error=%s", origin, error)
        return ufs, close, error


async def _first_contact(ufs: UnderStore, *, is_known: bool) -> CachefsError | None:
    """A wrong name, endpoint or key is told now, to the person who typed it and waits, and not to a reader later.

    One that was mounted before may be away for now: what is known of it is worth serving. Returns why it did not
    answer, if so. Raises NotFoundError, UnderStoreError.
    """
    try:
        with at_most(FIRST_CONTACT_S):
            await ufs.stat("")
        return None
    except UnavailableError as error:
        if not is_known:
            raise UnavailableError(f"cannot mount {ufs.origin}: {error}") from error
        logger.warning("under-store is away, serving what is known origin=%s error=%s", ufs.origin, error)
        return error
    except (NotFoundError, UnderStoreError) as error:
        raise type(error)(f"cannot mount {ufs.origin}: {error}") from error


class Attaching:
    """One change at a time, or two that do not fit together could both be checked before either is made."""

    def __init__(self, namespace: Namespace, holder: Holder) -> None:
        self._namespace = namespace
        self._holder = holder
        self._lock = trio.Lock()

    async def add(self, path: str, url: str, options: dict[str, str]) -> MountedStore:
        """Attach one more store, for good, once it is seen to open and to list.

        Raises ConfigError for a path or URL that will not do; NotFoundError, UnderStoreError and its kinds when the
        store does not answer as it should: nothing is changed then.
        """
        async with self._lock:
            path = await self._namespace.check_free(path)
            ufs, close = await self._holder.open(url, options)
            try:
                await _try_out(ufs)
            except BaseException:
                close()
                raise
            mounted = await self._namespace.attach(path, url, options, ufs, close)
        logger.info("under-store attached path=%s origin=%s", path, ufs.origin)
        return mounted

    async def remove(self, path: str, *, dry_run: bool) -> MountedStore:
        """Detach a store, for good. Nothing in it is touched, and what is cached of it stays.

        Raises ConfigError for a path that has none, for the last one, and for one that others are attached in.
        """
        async with self._lock:
            mounted = self._namespace.mounted_at(path)
            others = [each.mount.path for each in self._namespace.mounted() if each is not mounted]
            path = mounted.mount.path
            inside = [other for other in others if is_below(other, path)]
            if inside:
                raise ConfigError("PATH", path, f"one that nothing else is attached in: remove {inside[0]} first")
            if not others:
                raise ConfigError("PATH", path, "one of several: without the last one there is nothing left to serve")
            if not dry_run:
                await self._namespace.detach(mounted)
                logger.info("under-store removed path=%s origin=%s", path, mounted.mount.origin)
        return mounted


async def _try_out(ufs: UnderStore) -> None:
    """Raises NotFoundError, UnderStoreError and its kinds."""
    try:
        with at_most(FIRST_CONTACT_S):
            await ufs.stat("")
            async with ufs.list_dir("") as chunks:
                async for _ in chunks:
                    break
    except (NotFoundError, UnderStoreError) as error:
        raise type(error)(f"cannot attach {ufs.origin}: {error}") from error
