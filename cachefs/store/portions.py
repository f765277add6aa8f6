"""Many blocks in portions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cachefs.model import BlockId

_AT_ONCE = 1000


def portions(blocks: Iterable[BlockId]) -> Iterator[list[BlockId]]:
    """The blocks, so many at once that whoever takes the tier's lock for each portion keeps nobody waiting for long."""
    waiting = list(blocks)
    for start in range(0, len(waiting), _AT_ONCE):
        yield waiting[start : start + _AT_ONCE]
