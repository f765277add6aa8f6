"""Making room by giving up blocks that other workers hold as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from cachefs.model import BlockId, CachefsError
from cachefs.store import Store
from cachefs.wire.cluster import ASKED_AT_ONCE, AskDrops
from cachefs.wire.messages import block_ids, block_names
from cachefs.worker.counters import Counters
from cachefs.worker.master_link import MasterLink

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 3.0


class Drops:
    """The master grants each drop, so that two holders never give up "the other copy" at once. `on_kept` is called with
    each block, and its bytes, that was granted and could not be given up: it is to be reported again.
    """

    def __init__(
        self, store: Store, link: MasterLink, counters: Counters, on_kept: Callable[[BlockId, int], None]
    ) -> None:
        self._store = store
        self._link = link
        self._counters = counters
        self._on_kept = on_kept
        self._one = trio.Lock()
        self._disk = trio.CapacityLimiter(1)

    async def make_room(self, length: int, block: BlockId) -> None:
        """Give up shared blocks until one of `length` bytes fits, in the tiers and in the quotas of `block`, as far as
        they and the master allow.
        """
        async with self._one:
            found = dict.fromkeys([*self._store.to_give_up(length), *self._store.quotas.to_give_up(block, length)])
            blocks = list(found)[:ASKED_AT_ONCE]
            if not blocks:
                return
            try:
                with trio.fail_after(_ANSWER_TIMEOUT_S):
                    asked = AskDrops(block_names(blocks))
                    granted = (await self._link.call_now(asked)).message.blocks
            except (CachefsError, trio.TooSlowError) as error:
                logger.info("no drops granted error=%r", error)
                return
            await trio.to_thread.run_sync(self._give_up, block_ids(granted), limiter=self._disk)

    def _give_up(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            size = self._store.held_bytes(block)
            if self._store.evict(block):
                self._counters.drops += 1
            elif size:
                trio.from_thread.run_sync(self._on_kept, block, size)
