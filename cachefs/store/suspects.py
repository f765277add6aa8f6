"""The blocks of a tier that were sealed once, and may not be served until they were compared."""

from __future__ import annotations

import logging
import threading

from cachefs.model import BlockId, CapacityError
from cachefs.store.block_files import BlockFiles
from cachefs.store.diskfull import capacity_errors
from cachefs.store.partials import Partials
from cachefs.store.portions import portions
from cachefs.store.sealed import SealedBlocks
from cachefs.store.space import Space

logger = logging.getLogger(__name__)


class Suspects:
    """Blocks sealed in an earlier boot, or on a disk that failed since: each is sealed again once it was compared.

    Callable from any thread: it takes the tier's lock. Its room counts as used.
    """

    def __init__(
        self, lock: threading.Lock, space: Space, files: BlockFiles, sealed: SealedBlocks, partials: Partials
    ) -> None:
        self._lock = lock
        self._space = space
        self._files = files
        self._sealed = sealed
        self._partials = partials
        self._sizes: dict[BlockId, int] = {}
        """Allocated bytes."""

    def __contains__(self, block: BlockId) -> bool:
        return block in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def blocks(self) -> list[BlockId]:
        with self._lock:
            return list(self._sizes)

    def add(self, block: BlockId, size: int) -> None:
        """One that was found at the start; the lock is not taken."""
        self._sizes[block] = size
        self._space.used += size

    def restore(self, block: BlockId) -> bool:
        """As `Tier.restore`."""
        with self._lock:
            size = self._sizes.pop(block, None)
        if size is None:
            return block in self._sealed
        try:
            good = self._files.is_good(block)
        except OSError as error:
            logger.info("suspect still block=%s error=%s", block.filename, error)
            with self._lock:
                self._sizes[block] = size
            return False
        with self._lock:
            self._space.used -= size
            if not good or block in self._partials or block in self._sealed:
                if not good:
                    logger.warning("block dropped, it is damaged since the last boot block=%s", block.filename)
                self._files.remove(block)
                return block in self._sealed
            try:
                with capacity_errors():
                    self._files.publish(block, self._sealed.files)
            except CapacityError as error:
                logger.info("block dropped, it cannot be put back block=%s error=%s", block.filename, error)
                for files in (self._files, self._sealed.files):
                    files.remove(block)
                return False
            self._sealed.add(block, size)
            return True

    def distrust(self) -> None:
        """As `Tier.distrust`."""
        with self._lock:
            sealed = list(self._sealed)
        for portion in portions(sealed):
            with self._lock:
                for block in portion:
                    if block in self._sealed:
                        size = self._sealed.size(block)
                        self._sealed.files.withdraw(block, self._files)
                        self._sealed.remove(block)
                        self.add(block, size)
