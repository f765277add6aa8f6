"""What the contents below paths with a quota take on the tiers of a worker, and what they may take.

Which contents count for which quotas is told by the master (`QuotaKeys`), and so is what this worker may take of each.
Here it is counted, block by block, as tiers take them in and give them up. With no quota nothing is counted, and
`Quotas.active` is all that is ever looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cachefs.model import BlockId, ContentKey, format_size
from cachefs.store.quota_keys import Ids, QuotaKeys


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
