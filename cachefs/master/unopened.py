"""Under-stores that could not be opened when the master started: a file server of this machine that hangs, say."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress

import trio

from cachefs.master.mounted import Holder, MountedStore
from cachefs.model import CachefsError, ObjectInfo, UnavailableError
from cachefs.ufs.files import Claim, Keep

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


class UnopenedStore:
    """In the place of one that could be opened when it was added, and cannot now: what is known of it is served."""

    def __init__(self, origin: str, reason: Exception) -> None:
        self.origin = origin
        self.hidden_keys = 0
        self._reason = reason

    def _error(self) -> UnavailableError:
        return UnavailableError(f"{self.origin} could not be opened: {self._reason}")

    async def stat(self, path: str) -> ObjectInfo:
        raise self._error()

    def list_dir(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[list[ObjectInfo]]]:
        raise self._error()

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> bytes | bytearray | memoryview:
        raise self._error()

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        raise self._error()


def open_when_they_answer(nursery: trio.Nursery, holder: Holder, mounted: Iterable[MountedStore]) -> None:
    """Have those of them opened in the background that could not be."""
    for each in mounted:
        if isinstance(each.ufs, UnopenedStore):
            nursery.start_soon(_open_when_it_answers, holder, each)


async def _open_when_it_answers(holder: Holder, mounted: MountedStore) -> None:
    """Put the store in the place of the `UnopenedStore` once it can be opened. Returns then, or when it was removed or
    opened with other options meanwhile. Cancelling is safe.

    What hangs costs a thread for as long as it hangs; it is not tried again beside that.
    """
    unopened, pause_s = mounted.ufs, _FIRST_PAUSE_S
    while True:
        await trio.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
        if mounted.is_gone or mounted.ufs is not unopened:
            return
        url, options = mounted.url, mounted.options
        try:
            ufs, close = await holder.open(url, options)
        except CachefsError as error:
            logger.debug("under-store cannot be opened yet origin=%s error=%s", mounted.mount.origin, error)
            continue
        if mounted.is_gone or mounted.ufs is not unopened:
            close()
            return
        if ufs.origin != mounted.mount.origin:
            # A link that leads elsewhere now, or just now: what is known is not of that.
            logger.warning("under-store is another one now origin=%s found=%s", mounted.mount.origin, ufs.origin)
            close()
            continue
        mounted.reopened(url, options, ufs, close)
        logger.info("under-store could be opened mount=%s origin=%s", mounted.mount.path, ufs.origin)
        with suppress(CachefsError), mounted.looking():
            await ufs.stat("")
        return
