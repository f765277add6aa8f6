"""Origin leases against a model: at any time at most one worker that is alive may read a block from the under-store."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachefs.master.leases import LEASE_S, Leases
from cachefs.model import BlockId, ContentKey

WORKERS = ["a", "b", "c"]
BLOCKS = [BlockId(ContentKey(bytes([n]) * 16), 0) for n in range(2)]
worker, block = st.sampled_from(WORKERS), st.sampled_from(BLOCKS)


class LeasesModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.dead: set[str] = set()
        self.leases = Leases(lambda name: name not in self.dead)
        self.model: dict[BlockId, tuple[str, float]] = {}

    def holder(self, which: BlockId) -> str:
        name, until = self.model.get(which, ("", 0.0))
        return name if name not in self.dead and until >= self.now else ""

    @rule(seconds=st.floats(0, 2 * LEASE_S))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(asker=worker, which=block, without=st.sets(worker))
    def take(self, asker: str, which: BlockId, without: set[str]) -> None:
        self.dead.discard(asker)
        holder = self.holder(which)
        got = self.leases.take(which, asker, self.now, without)
        expected = holder if holder and holder != asker and holder not in without else asker
        assert got == expected
        if got == asker:
            self.model[which] = asker, self.now + LEASE_S

    @rule(name=worker, which=block)
    def renew(self, name: str, which: BlockId) -> None:
        self.dead.discard(name)
        holder = self.holder(which)
        lost = self.leases.renew(name, [which], self.now)
        if holder not in ("", name):
            assert lost == [which]
        if lost == []:
            self.model[which] = name, self.now + LEASE_S

    @rule(name=worker, which=block)
    def end(self, name: str, which: BlockId) -> None:
        self.leases.end(name, [which])
        if self.model.get(which, ("",))[0] == name:
            del self.model[which]

    @rule(name=worker)
    def dies(self, name: str) -> None:
        self.dead.add(name)
        self.leases.end_all(name)
        self.model = {each: held for each, held in self.model.items() if held[0] != name}

    @invariant()
    def none_is_kept_for_long(self) -> None:
        """Workers report every second."""
        self.leases.renew("nobody", [], self.now)
        assert len(self.leases) == sum(until >= self.now for _, until in self.model.values())

    @invariant()
    def both_say_the_same(self) -> None:
        assert [self.leases.holder(each, self.now) for each in BLOCKS] == [self.holder(each) for each in BLOCKS]


TestLeases = LeasesModel.TestCase


def test_whoever_lost_one_is_told_once() -> None:
    leases = Leases(lambda name: True)
    (one, two) = BLOCKS
    assert leases.take(one, "a", 0) == leases.take(two, "a", 0) == "a"
    assert leases.take(one, "b", 1) == "a"
    assert leases.take(one, "b", 1, {"a"}) == "b"
    assert leases.renew("a", [one, two], 2) == [one]
    assert leases.renew("a", [two], 3) == [] and leases.renew("b", [one], 3) == []


def test_a_master_that_was_restarted_takes_over_what_is_in_use() -> None:
    leases = Leases(lambda name: True)
    assert leases.renew("a", BLOCKS, 0) == []
    assert leases.take(BLOCKS[0], "b", 1) == "a"


def test_those_that_nobody_reports_or_asks_for_are_forgotten() -> None:
    leases = Leases(lambda name: True)
    blocks = [BlockId(ContentKey(n.to_bytes(16, "big")), 0) for n in range(1000)]
    for block in blocks:
        assert leases.take(block, "a", 0) == "a"
    assert leases.renew("a", blocks[:10], LEASE_S) == [] and len(leases) == 1000
    assert leases.renew("a", blocks[:5], LEASE_S + 0.1) == [] and len(leases) == 10
    assert leases.renew("b", [], 2 * LEASE_S + 0.05) == [] and len(leases) == 5
