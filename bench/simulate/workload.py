"""What is simulated, and what comes out: shared by both simulations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cachefs.policy.admission import MAX_SHARE_OF_TIER

POLICIES = ("lru", "sieve", "if-space", "last-copy")
HOMES_TRIED = 3


class Shares(NamedTuple):
    """Of the bytes read in one epoch; the sum is 1."""

    local: float
    peer: float
    under_store: float


@dataclass(frozen=True)
class Scenario:
    """Raises ValueError for what cannot be simulated."""

    workers: int
    blocks: int
    fraction: float
    """All caches together / the data."""
    epochs: int = 4
    seed: int = 1
    readers: int | None = None
    """So many of the workers read; None: all."""
    reads: str = "shard"
    """`shard`: the readers share each epoch; `all`: each of them reads everything."""

    def __post_init__(self) -> None:
        if self.reads not in ("shard", "all"):
            raise ValueError(f"reads: {self.reads!r} is neither 'shard' nor 'all'")
        if not 1 <= self.reader_count <= self.workers:
            raise ValueError(f"readers: {self.reader_count} is not 1 to {self.workers}, the workers")
        if self.blocks < self.workers or self.epochs < 1:
            raise ValueError("there must be at least one block for each worker, and one epoch")
        if self.slots < MAX_SHARE_OF_TIER:
            raise ValueError(f"a cache of {self.slots} blocks admits none: take more blocks or a larger fraction")

    @property
    def reader_count(self) -> int:
        return self.workers if self.readers is None else self.readers

    @property
    def slots(self) -> int:
        """Blocks that one worker's cache takes."""
        return round(self.fraction * self.blocks / self.workers)

    def epoch(self, number: int) -> Iterator[NDArray[np.int32]]:
        """For each step the blocks that readers 0, 1, ... read; in the last step some may have none left."""
        random = np.random.default_rng([self.seed, number])
        if self.reads == "shard":
            order = random.permutation(np.arange(self.blocks, dtype=np.int32))
            for start in range(0, self.blocks, self.reader_count):
                yield order[start : start + self.reader_count]
        else:
            everything = np.tile(np.arange(self.blocks, dtype=np.int32), (self.reader_count, 1))
            yield from np.ascontiguousarray(random.permuted(everything, axis=1).T)
