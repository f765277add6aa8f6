"""An under-store as a worker has it open: its credentials may be renewed while it is read from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager

from cachefs.model import DeniedError, ObjectInfo, UnavailableError
from cachefs.ufs import UnderStore
from cachefs.ufs.files import Claim, Data, Keep
from cachefs.wire.messages import StoreInfo

_MAY_BE_RENEWED = (DeniedError, UnavailableError)
"""With other credentials it may be read."""


class OpenStore:
    """What is known of objects names this, and stays as it is when the store is opened again."""

    def __init__(
        self,
        info: StoreInfo,
        ufs: UnderStore,
        close: Callable[[], None],
        is_renewed: Callable[[OpenStore, StoreInfo], Awaitable[bool]],
    ) -> None:
        """`close` is called once, when another one is in place and nobody reads from this one any more. `is_renewed`
        is asked when it refuses or does not answer: whether there are other options than those, and if so they are in
        place.
        """
        self.info = info
        self.origin = ufs.origin
        self.hidden_keys = 0  # workers list nothing
        self._is_renewed = is_renewed
        self._ufs = ufs
        self._close = close
        self._users = [0]
        """Of the store as it is open now."""

    def reopened(self, info: StoreInfo, ufs: UnderStore, close: Callable[[], None]) -> None:
        """Read from this one from now on; of the same origin."""
        users, close_before = self._users, self._close
        self.info, self._ufs, self._close, self._users = info, ufs, close, [0]
        if not users[0]:
            close_before()

    @contextmanager
    def _in_use(self) -> Iterator[UnderStore]:
        users, close = self._users, self._close
        users[0] += 1
        try:
            yield self._ufs
        finally:
            users[0] -= 1
            if not users[0] and self._users is not users:
                close()

    async def stat(self, path: str) -> ObjectInfo:
        with self._in_use() as ufs:
            return await ufs.stat(path)

    def list_dir(self, path: str) -> AbstractAsyncContextManager[AsyncIterator[list[ObjectInfo]]]:
        return self._ufs.list_dir(path)

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
