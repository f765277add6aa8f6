"""One read after the other, decided by the code that workers run."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random

from bench.simulate.workload import HOMES_TRIED, Scenario, Shares
from cachefs.model import BlockId, ContentKey
from cachefs.policy import HomeCandidate, IdleGroups, Promote, Sieve, admits, rank_homes


class Cache:
    """One worker's."""

    def __init__(self, slots: int, idle: IdleGroups[int]) -> None:
        self.slots = slots
        self.shared = 0
        """Blocks here that another worker holds too."""
        self.recent: OrderedDict[int, None] = OrderedDict()
        """All blocks here, in the order in which they were last used."""
        self.sieve: Sieve[int] = Sieve()
        self.idle = idle

    def add(self, block: int, now: float) -> None:
        self.recent[block] = None
        self.sieve.add(block)
        self.idle.add(block, 1, now)

    def use(self, block: int, now: float) -> None:
        self.recent.move_to_end(block)
        self.sieve.visit(block)
        self.idle.use(block, now)

    def remove(self, block: int) -> None:
        del self.recent[block]
        self.sieve.remove(block)
        self.idle.remove(block)


class Cluster:
    """The workers' caches under one policy, see the package."""

    def __init__(
        self, scenario: Scenario, policy: str, idle_after: float = math.inf, *, in_groups: bool = True
    ) -> None:
        self._policy = policy
        self._mode = Promote.ALWAYS if policy in ("lru", "sieve") else Promote.IF_SPACE
        idle = partial(IdleGroups[int], idle_after) if in_groups else partial(IdleGroups[int], idle_after, max_group=1)
        self.caches = [Cache(scenario.slots, idle()) for _ in range(scenario.workers)]
        self._holders: defaultdict[int, list[int]] = defaultdict(list)
        self._candidates = [HomeCandidate(str(number), scenario.slots) for number in range(scenario.workers)]
        self._homes: dict[int, list[int]] = {}
        self._random = Random(scenario.seed)

    def read(self, worker: int, block: int, now: float) -> str:
        """Where the bytes came from, as a field of Shares."""
        holders = self._holders[block]
        if worker in holders:
            self.caches[worker].use(block, now)
            return "local"
        if holders:
            self.caches[self._random.choice(holders)].use(block, now)
            self._take(worker, block, now)
            return "peer"
        if not self._take(worker, block, now) and self._policy == "last-copy":
            any(self._take(home, block, now) for home in self._homes_of(block))
        return "under_store"

    def _homes_of(self, block: int) -> list[int]:
        if block not in self._homes:
            key = BlockId(ContentKey(block.to_bytes(16, "big")), 0)
            self._homes[block] = [int(name) for name in rank_homes(key, self._candidates, HOMES_TRIED)]
        return self._homes[block]

    def _take(self, worker: int, block: int, now: float) -> bool:
        cache, holders = self.caches[worker], self._holders[block]
        free = cache.slots - len(cache.recent)
        is_admitted = admits(
            self._mode,
            block_length=1,
            capacity_bytes=cache.slots,
            free_bytes=free,
            reclaimable_bytes=0 if free else cache.idle.idle_bytes(now),
            # Idle duplicates are counted twice, which makes no difference to whether there is one at all.
            shared_bytes=cache.shared if self._policy == "last-copy" else 0,
            first_copy=not holders,
        )
        if not is_admitted:
            return False
        if not free:
            self._evict(worker, next(self._victims(cache, now)))
        cache.add(block, now)
        holders.append(worker)
        self._count_shared(worker, holders, +1)
        return True

    def _victims(self, cache: Cache, now: float) -> Iterator[int]:
        if self._policy == "lru":
            yield from cache.recent
        yield from cache.idle.candidates(now)
        for block in cache.sieve.candidates():
            if self._mode is Promote.ALWAYS or len(self._holders[block]) > 1:
                yield block

    def _evict(self, worker: int, block: int) -> None:
        holders = self._holders[block]
        self._count_shared(worker, holders, -1)
        holders.remove(worker)
        self.caches[worker].remove(block)

    def _count_shared(self, worker: int, holders: list[int], step: int) -> None:
        """The worker's copy was made (+1), or goes now (-1): `holders` contains it."""
        if len(holders) == 2:
            for holder in holders:
                self.caches[holder].shared += step
        elif len(holders) > 2:
            self.caches[worker].shared += step


def simulate(
    scenario: Scenario,
    policy: str,
    *,
    idle_after: float = math.inf,
    in_groups: bool = True,
    data_sets: Sequence[int] | None = None,
) -> list[Shares]:
    """The shares of each epoch. `data_sets` tells which data set each epoch reads, all of the same size; without
    `in_groups` each block is idle by itself, however much is read of what came with it.
    """
    cluster = Cluster(scenario, policy, idle_after, in_groups=in_groups)
    shares = []
    for epoch, data_set in enumerate(data_sets or [0] * scenario.epochs):
        steps = math.ceil(scenario.blocks / (scenario.reader_count if scenario.reads == "shard" else 1))
        sources: Counter[str] = Counter()
        for step, blocks in enumerate(scenario.epoch(epoch)):
            now = epoch + step / steps
            for reader, block in enumerate(blocks.tolist()):
                sources[cluster.read(reader, data_set * scenario.blocks + block, now)] += 1
        shares.append(Shares(**{field: sources[field] / sources.total() for field in Shares._fields}))
    return shares
