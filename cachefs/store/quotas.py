"""What the contents below paths with a quota take on the tiers of a worker, and what they may take.

Which contents count for which quotas is told by the master (`QuotaKeys`), and so is what this worker may take of each.
Here it is counted, block by block, as tiers take them in and give them up. With no quota nothing is counted, and
`Quotas.active` is all that is ever looked at.
"""

from __future__ import annotations

import sys
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from cachefs.model import BlockId, ContentKey, format_size
from cachefs.policy import Sieve

_SLOT_BITS = 12
_SLOT = (1 << _SLOT_BITS) - 1
MOST_SLOTS = 1 << _SLOT_BITS

Ids = tuple[int, ...]
"""Quotas that a content counts for, the innermost of each of its paths; what they lie below it counts for too."""


class Rule(NamedTuple):
    path: str
    limit_bytes: int
    outer: int
    """The quota that it lies below; 0: none."""


class Use(NamedTuple):
    """Of one quota on this worker."""

    used_bytes: int
    granted_bytes: int
    refused: int


class QuotaKeys:
    """Which contents count for which quotas: eight bytes for each, in order.

    52 bits of a key tell it from others well enough, the other 12 say which quota: that one of a million contents
    that count for none is taken for one of a million that do has a chance of 1 in 4,500, and it is counted then.

    Changed from one thread, looked at from any.
    """

    def __init__(self) -> None:
        self._known: tuple[array[int], list[int]] = array("Q"), []
        """Ascending, and which quota each slot stands for. Never changed: another pair takes its place."""
        self._more: dict[int, Ids] = {}
        self._collected, self._slots = array("Q"), dict[int, int]()
        self._since: dict[int, Ids] = {}
        """What was added since `begin`."""

    def of(self, key: ContentKey) -> Ids:
        """None, as a rule; several for a content that is at several paths."""
        part = _part(key)
        known, slots = self._known
        at = bisect_left(known, part)
        found = self._more.get(part, ()) if self._more else ()
        while at < len(known) and known[at] & ~_SLOT == part:
            quota = slots[known[at] & _SLOT]
            if quota not in found:
                found = (*found, quota)
            at += 1
        return found

    def add(self, key: ContentKey, quota: int) -> None:
        """One more. It outlives the set that is being collected."""
        part = _part(key)
        for more in (self._since, self._more):
            ids = more.get(part, ())
            if quota not in ids:
                more[part] = (*ids, quota)

    def begin(self) -> None:
        """Another set is going to be told, in portions: until `finish`, the one before is in force."""
        self._collected, self._slots = array("Q"), {}
        self._since = {}

    def collect(self, quota: int, packed: bytes) -> None:
        """Keys of 16 bytes, one after the other. Of at most `MOST_SLOTS` quotas."""
        slot = self._slots.setdefault(quota, len(self._slots))
        if slot < MOST_SLOTS:
            self._collected.extend((half & ~_SLOT) | slot for half in memoryview(packed).cast("Q")[1::2].tolist())

    def ordered(self) -> array[int]:
        """What was collected, for `finish`. Takes a second for some millions: to be called in a thread."""
        return array("Q", sorted(self._collected))

    def finish(self, ordered: array[int]) -> None:
        """That is in force from now on, with what was added since `begin`."""
        self._collected = array("Q")
        # In this order: who looks in between finds too much, not too little.
        self._known = ordered, list(self._slots)
        self._more = dict(self._since)


def _part(key: ContentKey) -> int:
    return int.from_bytes(key[8:], sys.byteorder) & ~_SLOT


class Quotas:
    """Of all tiers of a worker. Callable from any thread, by tiers with their own lock held."""

    def __init__(self) -> None:
        self.keys = QuotaKeys()
        self.active = False
        """Whether there are any."""
        self.serial = 0
        """Of what the master told last."""
        self._lock = threading.Lock()
        self._rules: Mapping[int, Rule] = {}
        self._chains: dict[Ids, Ids] = {}
        self._own: dict[Ids, int] = {}
        """What is taken, by the quotas that contents count for."""
        self._used: dict[int, int] = {}
        """The same, for each quota with those that lie below it."""
        self._expected: dict[BlockId, tuple[Ids, int]] = {}
        """Blocks that were admitted and are not begun yet, with all their quotas and what they will take."""
        self._expected_bytes: dict[int, int] = {}
        self._granted: dict[int, int] = {}
        self._refused: dict[int, int] = {}
        self._asked: set[int] = set()
        """Those that something was admitted to, or refused for, since the last report, and before that."""
        self._asked_before: set[int] = set()

    def put_in_force(self, rules: Mapping[int, Rule]) -> None:
        """These are all quotas now."""
        with self._lock:
            self._rules = dict(rules)
            self._chains = {}
            self._used = {}
            for ids, size in self._own.items():
                for quota in self._chain(ids):
                    self._used[quota] = self._used.get(quota, 0) + size
            self._granted = {quota: size for quota, size in self._granted.items() if quota in rules}
            self._refused = {quota: count for quota, count in self._refused.items() if quota in rules}
            self.active = bool(rules)

    def reset(self) -> None:
        """There are none, and no tier counts anything any more."""
        with self._lock:
            self._own, self._used, self._asked, self._asked_before = {}, {}, set(), set()

    def _chain(self, ids: Ids) -> Ids:
        """All that these and those they lie below are, as far as they are in force; the innermost first."""
        chain = self._chains.get(ids)
        if chain is None:
            found: dict[int, None] = {}
            for quota in ids:
                while quota in self._rules and quota not in found:
                    found[quota] = None
                    quota = self._rules[quota].outer
            chain = self._chains[ids] = tuple(found)
        return chain

    def chain(self, ids: Ids) -> Ids:
        with self._lock:
            return self._chain(ids)

    def of(self, key: ContentKey) -> Ids:
        """All quotas that bind a content."""
        ids = self.keys.of(key) if self.active else ()
        return self.chain(ids) if ids else ()

    def charge(self, ids: Ids, size: int) -> None:
        """So many bytes more, or less, are taken by contents that count for these."""
        with self._lock:
            own = self._own[ids] = self._own.get(ids, 0) + size
            if not own:
                del self._own[ids]
            for quota in self._chain(ids):
                self._used[quota] = self._used.get(quota, 0) + size

    def used_bytes(self, quota: int) -> int:
        return self._used.get(quota, 0)

    def used(self) -> list[int]:
        """Quotas that anything is taken of."""
        with self._lock:
            return [quota for quota, size in self._used.items() if size]

    def lacking(self, quota: int, need: int, block: BlockId | None = None) -> int:
        """What `need` bytes more, for that block, would be over what may be taken; 0 or less: nothing."""
        with self._lock:
            self._asked.add(quota)
            used = self._used.get(quota, 0)
            quotas, own = self._expected.get(block, ((), 0)) if block is not None else ((), 0)
            expected = self._expected_bytes.get(quota, 0) - (own if quota in quotas else 0)
            # Before the first answer of the master what is here may be replaced, and not become more.
            return used + expected + need - self._granted.get(quota, used)

    def expect(self, block: BlockId, need: int) -> None:
        """It was admitted: until it is begun, or given up, no other one gets its room."""
        quotas = self.of(block.key)
        with self._lock:
            if quotas and block not in self._expected:
                self._expected[block] = quotas, need
                for quota in quotas:
                    self._expected_bytes[quota] = self._expected_bytes.get(quota, 0) + need

    def settle(self, block: BlockId) -> None:
        """It is counted as it is from now on, or is not to come."""
        if block not in self._expected:
            return
        with self._lock:
            quotas, need = self._expected.pop(block, ((), 0))
            for quota in quotas:
                self._expected_bytes[quota] -= need

    def is_over(self, quota: int) -> bool:
        used = self._used.get(quota, 0)
        return used > self._granted.get(quota, used)

    def over(self) -> dict[int, int]:
        """What is taken beyond what may be, by quota; not of those that lie below another such one."""
        with self._lock:
            over = {
                quota: used - self._granted[quota]
                for quota, used in self._used.items()
                if quota in self._granted and used > self._granted[quota]
            }
            return {quota: size for quota, size in over.items() if not over.keys() & set(self._chain((quota,))[1:])}

    def refused(self, quotas: Iterable[int]) -> None:
        """A block was not kept because of these."""
        with self._lock:
            for quota in quotas:
                self._refused[quota] = self._refused.get(quota, 0) + 1

    def describe(self, quota: int) -> str:
        """For people."""
        rule = self._rules.get(quota)
        return f"the quota of {rule.path}, {format_size(rule.limit_bytes)}," if rule is not None else "a quota"

    # ---- what the master is told, and tells ------------------------------------------------------------------------

    def to_report(self, *, gives_back: bool) -> dict[int, Use]:
        """Of quotas that there is something to tell of. `gives_back`, as every second: half of what is not used of
        grants, or all of it where nothing was admitted lately. What was promised to blocks not begun yet stays.
        """
        with self._lock:
            found = {}
            kept = self._asked | self._asked_before
            for quota in self._rules:
                used, granted = self._used.get(quota, 0), self._granted.get(quota, 0)
                needed = used + self._expected_bytes.get(quota, 0)
                if gives_back and granted > needed:
                    granted = self._granted[quota] = needed + ((granted - needed) // 2 if quota in kept else 0)
                refused = self._refused.get(quota, 0)
                if used or granted or refused:
                    found[quota] = Use(used, granted, refused)
            if gives_back:
                self._asked_before, self._asked = self._asked, set()
            return found

    def grant(self, grants: Mapping[int, int]) -> None:
        """What may be taken of each from now on."""
        with self._lock:
            self._granted.update((quota, size) for quota, size in grants.items() if quota in self._rules)


class QuotaBook:
    """What blocks of one tier take of quotas, and in which order those of each are given up. The tier's lock guards it.

    Memory: two hundred bytes for each block that counts for a quota, and nothing for others.
    """

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._charged: dict[BlockId, tuple[Ids, int]] = {}
        self._sieves: dict[Ids, Sieve[BlockId]] = {}
        """Of sealed blocks, by what they count for."""
        self._unpinned_bytes: dict[Ids, int] = {}
        """Of those."""
        self._shared: dict[Ids, dict[BlockId, None]] = {}
        """Those of them that are not pinned and that other nodes hold as well."""
        self._shared_bytes: dict[Ids, int] = {}

    def ids(self, block: BlockId) -> Ids:
        """As of `QuotaKeys`, as it was counted."""
        charged = self._charged.get(block)
        return charged[0] if charged is not None else ()

    def held(self, block: BlockId) -> int:
        """What it is counted with."""
        charged = self._charged.get(block)
        return charged[1] if charged is not None else 0

    def put(self, block: BlockId, size: int, *, sealed: bool = False) -> None:
        """It takes so many bytes now; 0: it is gone."""
        charged = self._charged.get(block)
        if charged is None:
            ids, before = self._quotas.keys.of(block.key) if size else (), 0
        else:
            ids, before = charged
        if not ids:
            return
        self.share(block, False)
        sieve = self._sieves.get(ids)
        if sieve is not None and block in sieve:
            self._add_unpinned(ids, 0 if sieve.is_pinned(block) else -before)
            sieve.remove(block)
        if size:
            self._charged[block] = ids, size
        else:
            del self._charged[block]
        self._quotas.charge(ids, size - before)
        if size:
            self._quotas.settle(block)
        if sealed:
            self._sieves.setdefault(ids, Sieve()).add(block)
            self._add_unpinned(ids, size)

    def _add_unpinned(self, ids: Ids, size: int) -> None:
        self._unpinned_bytes[ids] = self._unpinned_bytes.get(ids, 0) + size

    def clear(self) -> None:
        """Nothing here counts any more."""
        taken: dict[Ids, int] = {}
        for ids, size in self._charged.values():
            taken[ids] = taken.get(ids, 0) + size
        self._charged, self._sieves, self._unpinned_bytes = {}, {}, {}
        self.unshare_all()
        for ids, size in taken.items():
            self._quotas.charge(ids, -size)

    def sort(self, block: BlockId, size: int, *, sealed: bool) -> None:
        """It may count for others than before."""
        ids = self._quotas.keys.of(block.key) if self._quotas.active else ()
        if ids != self.ids(block):
            self.put(block, 0)
            self.put(block, size, sealed=sealed)

    def visit(self, block: BlockId) -> None:
        charged = self._charged.get(block)
        if charged is not None and charged[0] in self._sieves:
            self._sieves[charged[0]].visit(block)

    def pin(self, block: BlockId, pinned: bool) -> None:
        charged = self._charged.get(block)
        if charged is not None and charged[0] in self._sieves:
            ids, size = charged
            if pinned:
                self._add_unpinned(ids, -size if self._sieves[ids].pin(block) else 0)
            else:
                self._add_unpinned(ids, size if self._sieves[ids].unpin(block) else 0)

    def share(self, block: BlockId, shared: bool) -> None:
        """Other nodes hold it as well, and it is sealed and not pinned; or no more."""
        charged = self._charged.get(block)
        if charged is None:
            return
        ids, size = charged
        blocks = self._shared.setdefault(ids, {})
        if shared is not (block in blocks):
            if shared:
                blocks[block] = None
            else:
                del blocks[block]
            self._shared_bytes[ids] = self._shared_bytes.get(ids, 0) + (size if shared else -size)

    def unshare_all(self) -> None:
        self._shared, self._shared_bytes = {}, {}

    def shared(self, quota: int) -> Iterator[BlockId]:
        """Of a quota."""
        for ids in self._parts(quota):
            yield from self._shared.get(ids, ())

    def shared_bytes(self, quota: int) -> int:
        return sum(self._shared_bytes.get(ids, 0) for ids in self._parts(quota))

    def over_bytes(self, idle: Iterable[BlockId]) -> int:
        """What is sealed here of what is beyond quotas, once those are gone which are idle: what is pinned, or others
        hold as well, is left out.
        """
        over = self._quotas.over()
        if not over:
            return 0
        loose = {ids: size - self._shared_bytes.get(ids, 0) for ids, size in self._unpinned_bytes.items()}
        for block in idle:
            if block in self._charged:
                ids, size = self._charged[block]
                for quota in over.keys() & set(self._quotas.chain(ids)):
                    over[quota] -= size
                if block not in self._shared.get(ids, ()):
                    loose[ids] -= size
        found = 0
        for quota, size in over.items():
            for ids in self._parts(quota):
                # What counts for several of them is there once.
                part = max(0, min(size, loose[ids]))
                loose[ids] -= part
                found += part
                size -= part
        return found

    def _parts(self, quota: int) -> list[Ids]:
        return [ids for ids in self._sieves if quota in self._quotas.chain(ids)]

    def counts_for(self, block: BlockId) -> Ids:
        """All quotas that a block here counts for."""
        charged = self._charged.get(block)
        return self._quotas.chain(charged[0]) if charged is not None else ()

    def candidates(self, quota: int) -> Iterator[BlockId]:
        """Sealed blocks of a quota that are not pinned, in the order to give them up; the largest part of it first."""
        for ids in sorted(self._parts(quota), key=lambda ids: len(self._sieves[ids]), reverse=True):
            yield from self._sieves[ids].candidates()
