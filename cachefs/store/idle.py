"""Which sealed blocks of a tier count as free, though they are there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from cachefs.model import BlockId
from cachefs.policy import IdleGroups

_EVERY_S = 5.0


class IdleBlocks:
    """Of all sealed blocks of a tier, those that were retired, or came with others of which none was read for long.

    The tier's lock guards it.
    """

    def __init__(self, idle_after_s: float) -> None:
        self._groups: IdleGroups[BlockId] = IdleGroups(idle_after_s)
        """By the monotonic clock."""
        self._retired: dict[BlockId, None] = {}
        """Blocks that nobody will ask for."""
        self._found: deque[BlockId] = deque()
        self._look_again = 0.0

    def add(self, block: BlockId, size: int) -> None:
        """It was sealed."""
        self._groups.add(block, size, time.monotonic())

    def remove(self, block: BlockId) -> None:
        """It is sealed no more."""
        self._groups.remove(block)
        self._retired.pop(block, None)

    def use(self, block: BlockId) -> None:
        """Somebody read it."""
        self._groups.use(block, time.monotonic())

    def retire(self, block: BlockId) -> None:
        """Nobody will ask for it again: it is the first that counts as free."""
        if block not in self._retired:
            self._retired[block] = None
            self._found.appendleft(block)

    def is_idle(self, block: BlockId, now: float) -> bool:
        """Whether it counts as free at that time of the monotonic clock."""
        return block in self._retired or self._groups.is_idle(block, now)

    def found(self) -> deque[BlockId]:
        """All of them, longest idle first; looked for now and then only, since that looks at all blocks.

        Some may have been read or have gone since. Not to be changed.
        """
        now = time.monotonic()
        if now >= self._look_again:
            idle = (block for block in self._groups.candidates(now) if block not in self._retired)
            self._found = deque([*self._retired, *idle])
            self._look_again = now + _EVERY_S
        return self._found

    def candidates(self, may_go: Callable[[BlockId], bool]) -> Iterator[BlockId]:
        """Those that still are idle, and may go, in the order to give them up; what is left alone is offered again by a
        later walk. What may not go is not, until it is looked for again.
        """
        found = self.found()
        now = time.monotonic()
        for _ in range(len(found)):
            block = found.popleft()
            if self.is_idle(block, now) and may_go(block):
                yield block
                if block in self._groups:
                    found.append(block)
