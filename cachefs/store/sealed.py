"""The index of a tier's sealed blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from cachefs.model import BlockId
from cachefs.policy import Sieve
from cachefs.store.block_files import BlockFiles
from cachefs.store.idle import IdleBlocks
from cachefs.store.pinned import PinnedKeys
from cachefs.store.quota_book import QuotaBook
from cachefs.store.shared import SharedBlocks
from cachefs.store.space import Space

_COLD_AMONG = 4096
"""So many blocks are looked at for those that nobody read lately: it is done while others wait."""


class SealedBlocks:
    """The sealed blocks of a tier: what each takes, and in which order they would go. The tier's lock guards it.

    `on_removed` is called with each block that goes, with the lock held.
    """

    def __init__(
        self,
        files: BlockFiles,
        space: Space,
        book: QuotaBook,
        pinned: PinnedKeys,
        idle_after_s: float,
        on_removed: Callable[[BlockId], None],
    ) -> None:
        self.files = files
        self.idle = IdleBlocks(idle_after_s)
        self.shared = SharedBlocks(book)
        self.pinned_bytes = 0
        """What is taken by blocks that are never evicted."""
        self._space = space
        self._book = book
        self._pinned_keys = pinned
        self._on_removed = on_removed
        self._sizes: dict[BlockId, int] = {}
        """Allocated bytes."""
        self._sieve: Sieve[BlockId] = Sieve()

    # ---- what is here ----------------------------------------------------------------------------------------------

    def __contains__(self, block: BlockId) -> bool:
        return block in self._sizes

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def size(self, block: BlockId) -> int:
        """The bytes it takes, its checksums included; 0 if it is not here."""
        return self._sizes.get(block, 0)

    def sizes(self) -> list[tuple[BlockId, int]]:
        return list(self._sizes.items())

    def is_pinned(self, block: BlockId) -> bool:
        return self._sieve.is_pinned(block)

    def may_go(self, block: BlockId) -> bool:
        """It is here, and not pinned."""
        return block in self._sizes and not self._sieve.is_pinned(block)

    def idle_bytes(self) -> int:
        """What idle blocks take, as of a moment ago, and what is here of what is beyond a quota and not shared."""
        idle = [block for block in dict.fromkeys(self.idle.found()) if self.may_go(block)]
        return self._book.over_bytes(idle) + sum(self._sizes[block] for block in idle)

    def shared_bytes(self) -> int:
        """What shared blocks take, those that are pinned or idle left out."""
        if not self.shared:
            return 0
        return self.shared.bytes - sum(self._sizes[block] for block in self.idle.found() if block in self.shared)

    # ---- coming and going ------------------------------------------------------------------------------------------

    def add(self, block: BlockId, size: int) -> None:
        """Its files are in their place."""
        self._sizes[block] = size
        self._space.used += size
        self._sieve.add(block)
        self.idle.add(block, size)
        self._book.put(block, size, sealed=True)
        self.sort_by_pin(block)

    def remove(self, block: BlockId) -> None:
        """Its files are gone."""
        self.share(block, False)
        size = self._sizes.pop(block)
        self._space.used -= size
        if self._sieve.is_pinned(block):
            self.pinned_bytes -= size
        self._sieve.remove(block)
        self.idle.remove(block)
        self._book.put(block, 0)
        self._on_removed(block)

    def drop(self, block: BlockId) -> None:
        """Read by somebody or not: open descriptors keep working, nobody gets new ones. Raises OSError."""
        if block in self._sizes:
            self.files.remove(block)
            self.remove(block)

    def evict(self, block: BlockId, later: list[int] | None = None) -> bool:
        """Unless somebody reads it; whether it went. As `BlockFiles.remove_unread`."""
        gone = self.files.remove_unread(block, later)
        if gone:
            self.remove(block)
        return gone

    # ---- the order in which they go --------------------------------------------------------------------------------

    def visit(self, block: BlockId) -> None:
        """Somebody read it: evict others first."""
        self._sieve.visit(block)
        self.idle.use(block)
        self._book.visit(block)

    def retire(self, block: BlockId) -> None:
        """Nobody will ask for it again."""
        if block in self._sizes:
            self.idle.retire(block)

    def share(self, block: BlockId, shared: bool) -> None:
        """Other nodes hold it as well, or do not any more."""
        self.shared.remove(block)
        if shared and block in self._sizes:
            self.shared.add(block, self._sizes[block], pinned=self._sieve.is_pinned(block))

    def sort_by_pin(self, block: BlockId) -> None:
        """It may be pinned, or not be any more."""
        size = self._sizes.get(block)
        if size is None:
            return
        if block.key in self._pinned_keys:
            self.pinned_bytes += size if self._sieve.pin(block) else 0
        else:
            self.pinned_bytes -= size if self._sieve.unpin(block) else 0
        self._book.pin(block, self._sieve.is_pinned(block))
        self.share(block, self.shared.has(block))

    def sort_by_quota(self, block: BlockId) -> None:
        """It may count for others than before."""
        size = self._sizes.get(block)
        if size is not None:
            self._book.sort(block, size, sealed=True)
            self._book.pin(block, self._sieve.is_pinned(block))
            self._book.share(block, block in self.shared)

    def is_idle(self, block: BlockId, now: float) -> bool:
        """It is here, not pinned, and idle at that time of the monotonic clock."""
        return self.idle.is_idle(block, now) and self.may_go(block)

    def candidates(self) -> Iterator[BlockId]:
        """What is not pinned, as `Sieve.candidates`."""
        return self._sieve.candidates()

    def idle_candidates(self) -> Iterator[BlockId]:
        """What is idle and not pinned, as `IdleBlocks.candidates`."""
        return self.idle.candidates(self.may_go)

    def over_candidates(self) -> Iterator[BlockId]:
        """As `QuotaBook.over_candidates`."""
        return self._book.over_candidates()

    def unshared(self, blocks: Iterator[BlockId]) -> Iterator[BlockId]:
        """Of these, in their order, what no other node holds when its turn comes."""
        return (block for block in blocks if block not in self.shared)

    def cold_first(self, blocks: Callable[[], Iterator[BlockId]]) -> Iterator[BlockId]:
        """Of the first ones of these those that nobody read lately, then all of them: some come twice."""
        cold = (block for block in itertools.islice(blocks(), _COLD_AMONG) if not self._sieve.is_visited(block))
        return itertools.chain(cold, blocks())
