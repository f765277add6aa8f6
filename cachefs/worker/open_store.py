"""An under-store as a worker has it open: its credentials may be renewed while it is read from, and it is closed when
no mount uses it any more.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import trio

from cachefs.model import DeniedError, ObjectInfo, StaleError, UnavailableError
from cachefs.ufs import UnderStore
from cachefs.ufs.files import Claim, Data, Keep
from cachefs.wire.messages import StoreInfo

_MAY_BE_RENEWED = (DeniedError, UnavailableError)
"""With other credentials it may be read."""


class OpenStore:
    """What is known of objects names this, and stays as it is when the store is opened again. Closed, it raises
    StaleError for whatever it is asked.
    """

    def __init__(
        self,
        info: StoreInfo,
        ufs: UnderStore,
        close: Callable[[], None],
        is_renewed: Callable[[OpenStore, StoreInfo], Awaitable[bool]],
    ) -> None:
        """`close` is called once, when nobody reads from the store any more, and another one is in its place or it is
        closed for good. `is_renewed` is asked when it refuses or does not answer: whether there are other options than
        those, and if so they are in place.
        """
        self.info = info
        """Without URL and options when it is closed: they are nobody's any more."""
        self.origin = ufs.origin
        self.hidden_keys = 0  # workers list nothing
        self._is_renewed = is_renewed
        self._ufs: UnderStore | None = ufs
        self._close = close
        self._users = [0]
        """Of the store as it is open now."""
        self._used_at = trio.current_time()
        """When a read ended last."""
        self._unused = trio.Event()
        """Set when one ends and no other is under way."""

    @property
    def is_closed(self) -> bool:
        return self._ufs is None

    def reopened(self, info: StoreInfo, ufs: UnderStore, close: Callable[[], None]) -> None:
        """Read from this one from now on; of the same origin."""
        users, close_before = self._users, self._close
        self.info, self._ufs, self._close, self._users = info, ufs, close, [0]
        if not users[0]:
            close_before()

    async def close_when_unused(self, for_s: float) -> None:
        """For good, as soon as nobody has read from it for so many seconds."""
        while self._users[0] or trio.current_time() < self._used_at + for_s:
            if self._users[0]:
                self._unused = trio.Event()
                await self._unused.wait()
            else:
                await trio.sleep_until(self._used_at + for_s)
        self.info, self._ufs = StoreInfo(self.info.store_id, "", {}), None
        self._close()

    @contextmanager
    def _in_use(self) -> Iterator[UnderStore]:
        ufs, users, close = self._ufs, self._users, self._close
        if ufs is None:
            raise StaleError(f"{self.origin} belongs to no mount any more, and is closed on this worker")
        users[0] += 1
        try:
            yield ufs
        finally:
            users[0] -= 1
            self._used_at = trio.current_time()
            if not users[0]:
                self._unused.set()
                if self._users is not users:
                    close()

    async def stat(self, path: str) -> ObjectInfo:
        with self._in_use() as ufs:
            return await ufs.stat(path)

    @asynccontextmanager
    async def list_dir(self, path: str) -> AsyncGenerator[AsyncIterator[list[ObjectInfo]], None]:
        with self._in_use() as ufs:
            async with ufs.list_dir(path) as chunks:
                yield chunks

    async def read_range(self, info: ObjectInfo, offset: int, length: int) -> Data:
        before = self.info
        try:
            with self._in_use() as ufs:
                return await ufs.read_range(info, offset, length)
        except _MAY_BE_RENEWED:
            if not await self._is_renewed(self, before):
                raise
        with self._in_use() as ufs:
            return await ufs.read_range(info, offset, length)

    async def read_files(
        self, infos: Sequence[ObjectInfo], keep: Keep, at_once: int, claim: Claim
    ) -> list[Exception | None]:
        before = self.info
        with self._in_use() as ufs:
            outcomes = await ufs.read_files(infos, keep, at_once, claim)
        if any(isinstance(each, _MAY_BE_RENEWED) for each in outcomes):
            # For those that come next: these were claimed, and are read again when somebody needs them.
            await self._is_renewed(self, before)
        return outcomes
