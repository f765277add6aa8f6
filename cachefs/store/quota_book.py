"""What the blocks of one tier take of quotas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cachefs.model import BlockId
from cachefs.policy import Sieve
from cachefs.store.quota_keys import Ids
from cachefs.store.quotas import Quotas


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
        self.counts = True
        """Whether what is here counts at all."""
        self._copies: set[BlockId] = set()
        """Of what is to go from another tier, and counts there until then."""

    @property
    def active(self) -> bool:
        """Whether there are any quotas, and what is here counts for them."""
        return self._quotas.active and self.counts

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
        if self.active and block not in self._copies:
            self._put(block, size, sealed=sealed)

    def _put(self, block: BlockId, size: int, *, sealed: bool) -> None:
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

    def restart(self, counts: bool) -> None:
        """Nothing counts until it is sorted anew; if it does not count, not even then."""
        self.counts = counts
        taken: dict[Ids, int] = {}
        for ids, size in self._charged.values():
            taken[ids] = taken.get(ids, 0) + size
        self.forget()
        for ids, size in taken.items():
            self._quotas.charge(ids, -size)

    def forget(self) -> None:
        """There are no quotas any more, which know themselves what that means for them."""
        self._charged, self._sieves, self._unpinned_bytes = {}, {}, {}
        self.unshare_all()

    def begin_copy(self, block: BlockId) -> None:
        """What is made of it here counts for nothing until `end_copy`."""
        self.put(block, 0)
        self._copies.add(block)

    def end_copy(self, block: BlockId) -> bool:
        """Whether it was one; if so, it is to be sorted now."""
        if block not in self._copies:
            return False
        self._copies.discard(block)
        return True

    def sort(self, block: BlockId, size: int, *, sealed: bool) -> None:
        """It may count for others than before."""
        if not self.counts or block in self._copies:
            return
        ids = self._quotas.keys.of(block.key) if self._quotas.active else ()
        if ids != self.ids(block):
            self._put(block, 0, sealed=False)
            self._put(block, size, sealed=sealed)

    def visit(self, block: BlockId) -> None:
        """Somebody read it."""
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
        over = self._quotas.over() if self._quotas.active else {}
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
        # Of what is forgotten meanwhile, the rest is offered still.
        for sieve in sorted((self._sieves[ids] for ids in self._parts(quota)), key=len, reverse=True):
            yield from sieve.candidates()

    def over_candidates(self) -> Iterator[BlockId]:
        """Sealed blocks of quotas that more is taken of than may be, as `candidates`, for as long as that is so."""
        for quota in self._quotas.over() if self._quotas.active else ():
            for block in self.candidates(quota):
                if not self._quotas.is_over(quota):
                    break
                yield block
