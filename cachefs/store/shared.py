"""Which sealed blocks of a tier other nodes hold as well."""

from __future__ import annotations

from collections.abc import Iterator

from cachefs.model import BlockId
from cachefs.store.quota_book import QuotaBook


class SharedBlocks:
    """Sealed blocks that other nodes hold as well: these go first, and by agreement only. The tier's lock guards it.

    What is pinned is known to be shared for the time when it is not pinned any more, and counts for nothing here.
    """

    def __init__(self, book: QuotaBook) -> None:
        self._book = book
        self._sizes: dict[BlockId, int] = {}
        self._pinned: set[BlockId] = set()
        self.bytes = 0

    def __contains__(self, block: BlockId) -> bool:
        """Of those that are not pinned, as all that follows."""
        return block in self._sizes

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def has(self, block: BlockId) -> bool:
        """Pinned or not."""
        return block in self._sizes or block in self._pinned

    def add(self, block: BlockId, size: int, *, pinned: bool) -> None:
        """One that is not here."""
        if pinned:
            self._pinned.add(block)
        else:
            self._sizes[block] = size
            self.bytes += size
            self._book.share(block, True)

    def remove(self, block: BlockId) -> None:
        if block in self._sizes:
            self.bytes -= self._sizes.pop(block)
            self._book.share(block, False)
        self._pinned.discard(block)

    def clear(self) -> None:
        self._sizes.clear()
        self._pinned.clear()
        self.bytes = 0
        self._book.unshare_all()
