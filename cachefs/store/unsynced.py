"""Sealed blocks that may not have reached the medium."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable

from cachefs.model import BlockId
from cachefs.store.blame import is_of_the_process
from cachefs.store.layout import READ_FLAGS, data_name, sums_name

logger = logging.getLogger(__name__)


class Unsynced:
    """The blocks that were sealed since `sync` was called last. Callable from any thread.

    `drop` is called with a block that could not be written, after `on_write_failed` was told why.
    """

    def __init__(
        self, sealed_fd: int, drop: Callable[[BlockId], None], on_write_failed: Callable[[OSError], None]
    ) -> None:
        self._sealed_fd = sealed_fd
        self._drop = drop
        self._on_write_failed = on_write_failed
        self._waiting: deque[BlockId] = deque()

    def add(self, block: BlockId) -> None:
        self._waiting.append(block)

    def sync(self) -> list[BlockId]:
        """As `Tier.sync_sealed`."""
        lost = []
        while self._waiting:
            block = self._waiting.popleft()
            opened = False
            try:
                for name in (data_name(block), sums_name(block)):
                    opened = False
                    fd = os.open(name, READ_FLAGS, dir_fd=self._sealed_fd)
                    opened = True
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                if not opened and is_of_the_process(error):
                    # Next time. What fails while it is written is told only once, whatever the reason.
                    self._waiting.appendleft(block)
                    break
                logger.warning("block dropped, the disk failed to write it block=%s error=%s", block.filename, error)
                self._on_write_failed(error)
                self._drop(block)
                lost.append(block)
        return lost
