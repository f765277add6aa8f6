"""The partials of a tier that nobody has open."""

from __future__ import annotations

from collections.abc import Iterator

from cachefs.model import BlockId
from cachefs.store.block_files import BlockFiles
from cachefs.store.quota_book import QuotaBook
from cachefs.store.space import Space


class Dormant:
    """Partials that lie on the disk until somebody fills them on, or others need their room.

    The tier's lock guards it.
    """

    def __init__(self, files: BlockFiles, space: Space, book: QuotaBook) -> None:
        self._files = files
        self._space = space
        self._book = book
        self._sizes: dict[BlockId, int] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._sizes

    def __iter__(self) -> Iterator[BlockId]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def size(self, block: BlockId) -> int:
        """The bytes it takes; 0 if it is not here."""
        return self._sizes.get(block, 0)

    def add(self, block: BlockId, size: int) -> None:
        """Its files are in their place. For quotas it counts once `QuotaBook.put` is told."""
        self._sizes[block] = size
        self._space.used += size

    def take(self, block: BlockId) -> int:
        """Somebody fills it on: the bytes it took, or 0 if it is not here."""
        size = self._sizes.pop(block, 0)
        self._space.used -= size
        return size

    def evict(self, block: BlockId, later: list[int] | None = None) -> bool:
        """Remove one that is here, unless somebody reads it; whether it went. As `BlockFiles.remove_unread`."""
        gone = self._files.remove_unread(block, later)
        if gone:
            self.take(block)
            self._book.put(block, 0)
        return gone

    def sort_by_quota(self, block: BlockId) -> None:
        """It may count for others than before."""
        if block in self._sizes:
            self._book.sort(block, self._sizes[block], sealed=False)
