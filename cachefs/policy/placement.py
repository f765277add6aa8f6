"""Which workers are the homes of a block: all who ask find the same ones, and nobody keeps a table.

Rendezvous hashing: each worker draws a number for each block, and the highest is the block's home. A worker that joins
takes over only what it draws highest for, one that leaves gives up only its own; everything else stays where it is.
The logarithmic method makes the draws follow the capacities: worker i is home to the share c_i / sum(c) of the blocks,
and changing one capacity moves blocks only to or from that worker.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from xxhash import xxh3_128_intdigest

from cachefs.model import BlockId

_DRAW_BITS = 52


class HomeCandidate(NamedTuple):
    """A worker that takes blocks. Draining and dead ones are none."""

    name: str
    capacity_bytes: int
    """Only the proportions count. 0 or less: home to nothing."""


def draw(block: BlockId, name: str) -> float:
    """A number that looks uniform in (0, 1), the same in every process and on every machine."""
    index = block.block_index.to_bytes(8, "big")
    digest = xxh3_128_intdigest(b"".join((block.key, index, name.encode())))
    # Of so many bits and a half, every value is exact and none is 0 or 1.
    return ((digest >> (128 - _DRAW_BITS)) + 0.5) / (1 << _DRAW_BITS)


def rank_homes(block: BlockId, workers: Iterable[HomeCandidate], most: int | None = None) -> list[str]:
    """The names of the workers, or of `most` of them, the block's home first and then who takes its place.

    Does not depend on the order of `workers`, whose names differ. O(workers): a microsecond each.
    """
    scored = (
        (worker.capacity_bytes / -math.log(draw(block, worker.name)), worker.name)
        for worker in workers
        if worker.capacity_bytes > 0
    )
    ranked = sorted(scored, reverse=True) if most is None else heapq.nlargest(most, scored)
    return [name for _, name in ranked]


def spread_pages(
    pages: Iterable[int], peers: Sequence[str], most_per_peer: int, in_flight: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """Which of `pages` to ask of whom: each goes to the peer with the least to do, so in turns if all have the same.

    No peer is given more than `most_per_peer` pages, those `in_flight` to it included; pages beyond that are left out,
    and are to be spread again when answers have come. Peers without pages are not in the result.
    """
    busy = [((in_flight or {}).get(peer, 0), turn, peer) for turn, peer in enumerate(peers)]
    heapq.heapify(busy)
    spread: dict[str, list[int]] = {}
    for page in pages:
        if not busy or busy[0][0] >= most_per_peer:
            break
        pages_there, turn, peer = busy[0]
        heapq.heapreplace(busy, (pages_there + 1, turn, peer))
        spread.setdefault(peer, []).append(page)
    return spread
