"""The same in arrays: all workers take a step at once. For thousands of workers and millions of blocks.

Only for readers that share an epoch. As each block is then read once before any is read twice, all first copies are
there before the first duplicate is made: that first copies displace duplicates makes no difference here, and is left
out.
What differs from `exact`: readers of one step do not see each other's evictions, homes are drawn by another hash, and a
block has at most COPIES copies at a time (`Caches.refused` counts the copies that were not made for that).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.simulate.workload import HOMES_TRIED, Scenario, Shares

Array = NDArray[Any]

COPIES = 4


class Caches:
    """Which workers hold which blocks. A copy is `block * COPIES + n`; `holder` says whose it is, or -1."""

    def __init__(self, scenario: Scenario) -> None:
        self.slots = scenario.slots
        self.holder = np.full(scenario.blocks * COPIES, -1, np.int16)
        self.used = np.zeros(scenario.workers, np.int64)
        """Slots of each worker that are taken."""
        self.refused = 0

    def find(self, readers: Array, blocks: Array) -> tuple[Array, Array]:
        """For each reader its own copy of the block it reads, and somebody's copy; -1 for none."""
        turn = (blocks + readers)[:, None]
        copies = blocks[:, None].astype(np.int64) * COPIES + (np.arange(COPIES) + turn) % COPIES
        holders = self.holder[copies]
        return _first(holders == readers[:, None], copies), _first(holders >= 0, copies)

    def add(self, rows: Array, blocks: Array) -> Array:
        """New copies for workers that have room; returns them. Blocks differ."""
        if not len(blocks):
            return blocks
        copies = blocks[:, None].astype(np.int64) * COPIES + np.arange(COPIES)
        new = _first(self.holder[copies] < 0, copies)
        self.refused += int((new < 0).sum())
        rows, new = rows[new >= 0], new[new >= 0]
        self.holder[new] = rows
        np.add.at(self.used, rows, 1)
        return new


class Queues(Caches):
    """With the order in which each worker evicts: a queue that begins with the oldest, holes in between, and a hand."""

    def __init__(self, scenario: Scenario, *, moves_up: bool) -> None:
        """`moves_up`: what is used becomes the newest, as in LRU; else it is passed over once, as in SIEVE."""
        super().__init__(scenario)
        self._moves_up = moves_up
        self._most_at_once = 2 * scenario.reader_count
        self._queue = np.full((scenario.workers, 2 * scenario.slots + self._most_at_once), -1, np.int32)
        self._end = np.zeros(scenario.workers, np.int64)
        self._hand = np.zeros(scenario.workers, np.int64)
        self._place = np.zeros(len(self.holder), np.int32)
        self._visited = np.zeros(len(self.holder), np.bool_)

    def use(self, copies: Array) -> None:
        """Copies that differ were read, by their holders or by others."""
        if self._moves_up:
            rows = self.holder[copies].astype(np.int64)
            self._queue[rows, self._place[copies]] = -1
            self._append(rows, copies, _rank(rows))
        else:
            self._visited[copies] = True

    def take(self, rows: Array, blocks: Array) -> None:
        """Workers that differ copy a block each, and evict where they are full."""
        self._evict(rows[self.used[rows] >= self.slots])
        new = self.add(rows, blocks)
        self._visited[new] = False
        self._append(self.holder[new].astype(np.int64), new, 0)

    def _append(self, rows: Array, copies: Array, rank: Array | int) -> None:
        if self._end.max() + self._most_at_once > self._queue.shape[1]:
            for row in range(len(self._queue)):
                self._compact(row)
        places = self._end[rows] + rank
        self._queue[rows, places] = copies
        self._place[copies] = places
        np.add.at(self._end, rows, 1)

    def _compact(self, row: int) -> None:
        queue = self._queue[row, : self._end[row]]
        kept = queue[queue >= 0]
        self._hand[row] = np.count_nonzero(queue[: self._hand[row]] >= 0)
        self._end[row] = len(kept)
        queue[: len(kept)] = kept
        queue[len(kept) :] = -1
        self._place[kept] = np.arange(len(kept))

    def _evict(self, rows: Array) -> None:
        """One of each."""
        looking = rows
        while len(looking):
            for row in looking[self._hand[looking] >= self._end[looking]].tolist():
                self._hand[row] = 0
                self._compact(row)
            copies = self._queue[looking, self._hand[looking]]
            passed_over = (copies >= 0) & self._visited[copies]
            self._visited[copies[passed_over]] = False
            goes = (copies >= 0) & ~passed_over
            self.holder[copies[goes]] = -1
            self._queue[looking[goes], self._hand[looking[goes]]] = -1
            self._hand[looking] += 1
            looking = looking[~goes]
        self.used[rows] -= 1


def _first(wanted: Array, values: Array) -> Array:
    """Of each row the first value that is wanted, or -1."""
    at = wanted.argmax(axis=1)
    row = np.arange(len(wanted))
    return np.where(wanted[row, at], values[row, at], -1)


def _rank(rows: Array) -> Array:
    """How many times each element occurs before."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    return rank


def _home(blocks: Array, number: int, workers: int) -> Array:
    """The worker that each block's `number`-th choice is: the mixing step of splitmix64."""
    mixed = (blocks.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number << 56)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(workers)).astype(np.int64)


def _keep_without_evicting(caches: Caches, readers: Array, blocks: Array, is_first: Array, workers: int | None) -> None:
    """Blocks go to their readers, which differ, where these have room; else, with `workers`, first copies to homes."""
    has_room = caches.used[readers] < caches.slots
    caches.add(readers[has_room], blocks[has_room])
    if not workers or caches.used.min() == caches.slots:
        return
    left = blocks[~has_room & is_first]
    for number in range(HOMES_TRIED):
        homes = _home(left, number, workers)
        has_room = caches.used[homes] + _rank(homes) < caches.slots
        caches.add(homes[has_room], left[has_room])
        left = left[~has_room]


def simulate(scenario: Scenario, policy: str) -> list[Shares]:
    """The shares of each epoch. Raises ValueError for readers that do not share an epoch."""
    if scenario.reads != "shard" or scenario.workers > np.iinfo(np.int16).max:
        raise ValueError("simulated in arrays: up to 32767 workers that read in shards")
    queues = Queues(scenario, moves_up=policy == "lru") if policy in ("lru", "sieve") else None
    caches = queues or Caches(scenario)
    homes_among = scenario.workers if policy == "last-copy" else None
    shares = []
    for epoch in range(scenario.epochs):
        counts = np.zeros(3, np.int64)
        for blocks in scenario.epoch(epoch):
            readers = np.arange(len(blocks))
            own, somebodys = caches.find(readers, blocks)
            is_away, is_nowhere = own < 0, somebodys < 0
            away, nowhere = np.count_nonzero(is_away), np.count_nonzero(is_nowhere)
            counts += (len(blocks) - away, away - nowhere, nowhere)
            if queues is not None:
                used = np.where(is_away, somebodys, own)
                queues.use(used[used >= 0])
                queues.take(readers[is_away], blocks[is_away])
            else:
                _keep_without_evicting(caches, readers[is_away], blocks[is_away], is_nowhere[is_away], homes_among)
        shares.append(Shares(*(counts / scenario.blocks).tolist()))
    return shares
