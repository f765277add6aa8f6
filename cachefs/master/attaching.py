"""Under-stores of the namespace: those the master is told at its start, and those that come and go while it runs."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import NamedTuple

import msgspec
import trio

from cachefs.master.mount_table import Along, MountTable
from cachefs.master.mounted import Holder, MountedStore
from cachefs.master.unopened import UnopenedStore
from cachefs.meta import Added, MetaStore, is_below, normalise_mount_path
from cachefs.model import (
    VOLUMES_PATH,
    CachefsError,
    CapacityError,
    ConfigError,
    ExistsError,
    MiB,
    NotFoundError,
    UnavailableError,
    UnderStoreError,
    format_size,
    without_credentials,
)
from cachefs.ufs import UnderStore, at_most, likely_origin
from cachefs.wire.messages import StoreInfo

logger = logging.getLogger(__name__)

FIRST_CONTACT_S = 8.0
"""How long an under-store may take to answer at first; later requests have their store's deadline."""

_OPEN_S = 30.0
"""How long opening one may take: it asks nobody, but a path of this machine may be on a file server that hangs."""
_MARGIN_S = 2.0
"""For requests that have deadlines to end by themselves, and to say why."""

_OPENED_AT_ONCE = 32
"""At the start: there is a store for each volume, and each that is away takes as long."""

MOST_TOLD_BYTES = 3 * MiB // 4
"""Of URLs and options of all under-stores: workers are told all of them in one answer, which takes 1 MiB at most."""


async def open_mounts(
    store: MetaStore, told: tuple[tuple[str, str], ...], options: dict[str, str], holder: Holder
) -> list[MountedStore]:
    """Open and attach what the master is told at its start, as (path, URL), and what was added by hand before.

    Raises ConfigError; NotFoundError, DeniedError, UnavailableError when a store that it is told does not answer; one
    that was mounted before may be unavailable. Those added by hand never keep it from starting: without it, nobody
    could remove them. In the place of one that cannot be opened is an `UnopenedStore`.
    """
    gone = store.removed_mounts()
    opened: dict[str, tuple[str, dict[str, str], UnderStore, Callable[[], None], CachefsError | None]] = {}
    pairs = []
    for path, url in told:
        path = normalise_mount_path(path)
        try:
            ufs, close = await _open(holder, url, options)
        except UnavailableError as refusal:
            origin = likely_origin(url)
            if origin is None or not store.is_attached(path, origin):
                raise
            logger.warning(
                "under-store cannot be opened yet, serving what is known origin=%s error=%s", origin, refusal
            )
            pairs.append((path, origin))
            opened[path] = (url, options, UnopenedStore(origin, refusal), lambda: None, refusal)
            continue
        pairs.append((path, ufs.origin))
        if (path, ufs.origin) in gone:
            logger.warning(
                "not attached, it was removed by hand path=%s origin=%s hint=%r", path, ufs.origin, "cachefs ufs add"
            )
            close()
        else:
            failure = await _first_contact(ufs, is_known=store.is_attached(path, ufs.origin))
            opened[path] = (url, options, ufs, close, failure)

    async def open_added(added: Added) -> None:
        async with limiter:
            ufs, close, failure = await _open_added(added.url, added.options, added.origin, holder)
        opened[added.path] = (added.url, added.options, ufs, close, failure)

    limiter = trio.CapacityLimiter(_OPENED_AT_ONCE)
    async with trio.open_nursery() as nursery:
        for added in store.added_mounts():
            if added.path not in opened:
                nursery.start_soon(open_added, added)
    by_hand = {added.path for added in store.added_mounts()}.difference(path for path, _ in pairs)
    attached = []
    for mount in store.attach(pairs):
        url, its_options, ufs, close, error = opened[mount.path]
        mounted = MountedStore(mount, url, its_options, ufs, mount.path in by_hand, close, is_told=error is not None)
        if error is not None:
            mounted.health.failed(error)
        attached.append(mounted)
    return attached


async def _open(holder: Holder, url: str, options: dict[str, str]) -> tuple[UnderStore, Callable[[], None]]:
    """Raises ConfigError, UnavailableError."""
    with _in_time(_OPEN_S, without_credentials(url)):
        return await holder.open(url, options)


@contextmanager
def _in_time(seconds: float, what: str) -> Iterator[None]:
    """Whatever hangs in the block is left alone after so long, and a margin. Raises UnavailableError."""
    with trio.move_on_after(seconds + _MARGIN_S) as scope:
        yield
    if scope.cancelled_caught:
        raise UnavailableError(f"{what}: no answer within {seconds + _MARGIN_S:g} s, of the system or a file server")


async def _open_added(
    url: str, options: dict[str, str], origin: str, holder: Holder
) -> tuple[UnderStore, Callable[[], None], CachefsError | None]:
    """With why it does not answer."""
    try:
        ufs, close = await _open(holder, url, options)
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
        with _in_time(FIRST_CONTACT_S, ufs.origin), at_most(FIRST_CONTACT_S):
            await ufs.stat("")
        return None
    except UnavailableError as error:
        if not is_known:
            raise UnavailableError(f"cannot mount {ufs.origin}: {error}") from error
        logger.warning("under-store is away, serving what is known origin=%s error=%s", ufs.origin, error)
        return error
    except (NotFoundError, UnderStoreError) as error:
        raise type(error)(f"cannot mount {ufs.origin}: {error}") from error


class Tried(NamedTuple):
    """An under-store that answers as it should, open, and where it is to be attached."""

    path: str
    """Normalised."""
    url: str
    options: dict[str, str]
    """May hold credentials."""
    ufs: UnderStore
    keep: Callable[[], Callable[[], None]]
    """It stays open from now on; returns what closes it."""


class Attaching:
    """One change at a time, or two that do not fit together could both be checked before either is made."""

    def __init__(self, mounts: MountTable, holder: Holder) -> None:
        self._mounts = mounts
        self._holder = holder
        self._lock = trio.Lock()

    async def add(self, path: str, url: str, options: dict[str, str]) -> MountedStore:
        """Attach one more store, for good, once it is seen to open and to list.

        Raises as `tried` and `attach`: nothing is changed then.
        """
        async with self.tried(path, url, options) as tried:
            return await self.attach(tried)

    @asynccontextmanager
    async def tried(self, path: str, url: str, options: dict[str, str]) -> AsyncGenerator[Tried, None]:
        """A store to be attached within the block. Others are not kept waiting while it does not answer.

        Raises ConfigError for a path or URL that will not do; NotFoundError, UnderStoreError and its kinds when the
        store does not answer as it should.
        """
        path = await self._mounts.check_free(path)
        ufs, close = await _open(self._holder, url, options)
        with ExitStack() as stack:
            stack.callback(close)
            await _try_out(ufs)
            yield Tried(path, url, options, ufs, lambda: stack.pop_all().close)

    async def attach(self, tried: Tried, along: Along | None = None) -> MountedStore:
        """Raises ConfigError, UnderStoreError when the path is not free any more; CapacityError for too many stores."""
        async with self._lock:
            path = await self._mounts.check_free(tried.path)
            self._check_fits(tried)
            mounted = await self._mounts.attach(path, tried.url, tried.options, tried.ufs, tried.keep, along=along)
        logger.info("under-store attached path=%s origin=%s", path, tried.ufs.origin)
        return mounted

    @asynccontextmanager
    async def tried_again(self, path: str, url: str, options: dict[str, str]) -> AsyncGenerator[Tried, None]:
        """As `tried`, for one that is attached there and gets other options within the block.

        Raises ExistsError when they make another store of it.
        """
        origin = self._mounts.at(path).mount.origin
        ufs, close = await self._holder.open(url, options)
        with ExitStack() as stack:
            stack.callback(close)
            if ufs.origin != origin:
                raise ExistsError(f"{path} is {origin}, and with these options it is {ufs.origin}")
            await _try_out(ufs)
            yield Tried(path, url, options, ufs, lambda: stack.pop_all().close)

    async def reopen(self, tried: Tried, along: Along) -> None:
        """Raises ConfigError, StaleError when it was removed meanwhile; CapacityError."""
        async with self._lock:
            self._check_fits(tried)
            mounted = self._mounts.at(tried.path)
            await self._mounts.reopen(mounted, tried.url, tried.options, tried.ufs, tried.keep(), along)
        logger.info("under-store has other options path=%s origin=%s", tried.path, tried.ufs.origin)

    def _check_fits(self, tried: Tried) -> None:
        known = [
            StoreInfo(each.mount.mount_id, each.url, each.options)
            for each in self._mounts.all()
            if each.mount.path != tried.path
        ]
        told = [*known, StoreInfo(0, tried.url, tried.options)]
        if sum(len(msgspec.msgpack.encode(each)) for each in told) > MOST_TOLD_BYTES:
            raise CapacityError(
                f"{tried.path}: {len(known)} under-stores are attached; with this one, their URLs and options take more"
                f" than the {format_size(MOST_TOLD_BYTES)} that can be told to workers. Nothing was changed"
            )

    async def remove(
        self, path: str, *, dry_run: bool, even_last: bool = False, along: Along | None = None
    ) -> MountedStore:
        """Detach a store, for good. Nothing in it is touched, and what is cached of it stays.

        Raises ConfigError for a path that has none, for the last one (but `even_last`), and for one that others are
        attached in.
        """
        async with self._lock:
            mounted = self._mounts.at(path)
            others = [each.mount.path for each in self._mounts.all() if each is not mounted]
            path = mounted.mount.path
            # What is attached in /volumes does not need what is attached around that.
            inside = [
                other
                for other in others
                if is_below(other, path) and (is_below(path, VOLUMES_PATH) or not is_below(other, VOLUMES_PATH))
            ]
            if inside:
                raise ConfigError("PATH", path, f"one that nothing else is attached in: remove {inside[0]} first")
            if not others and not even_last:
                raise ConfigError("PATH", path, "one of several: without the last one there is nothing left to serve")
            if not dry_run:
                await self._mounts.detach(mounted, along)
                logger.info("under-store removed path=%s origin=%s", path, mounted.mount.origin)
        return mounted


async def _try_out(ufs: UnderStore) -> None:
    """Raises NotFoundError, UnderStoreError and its kinds."""
    try:
        with _in_time(FIRST_CONTACT_S, ufs.origin), at_most(FIRST_CONTACT_S):
            await ufs.stat("")
            async with ufs.list_dir("") as chunks:
                async for _ in chunks:
                    break
    except (NotFoundError, UnderStoreError) as error:
        raise type(error)(f"cannot attach {ufs.origin}: {error}") from error
