"""What a store counts for quotas, against a count of all that is there; and the packed keys against a dict."""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cachefs.model import BlockId, CapacityError, ContentKey
from cachefs.policy import Promote
from cachefs.store import (
    HealthConfig,
    Partial,
    QuotaKeys,
    Quotas,
    Rule,
    Store,
    TierConfig,
    TierState,
    open_store,
    page_checksum,
    quota_room,
)
from cachefs.store.space import estimate
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages, seal

NUMBERS = range(12)
CONTENTS = [content(number, (number % 4 + 1) * PAGE) for number in NUMBERS]
RULES = {1: Rule("/a", 0, 0), 2: Rule("/a/b", 0, 1), 3: Rule("/c", 0, 0), 4: Rule("/a/b/d", 0, 2)}
IDS = st.sampled_from([(), (), (1,), (2,), (3,), (4,), (2, 3), (4, 1)])
MAPPINGS = st.lists(IDS, min_size=len(NUMBERS), max_size=len(NUMBERS))


def key(number: int) -> ContentKey:
    return ContentKey(random.Random(number).randbytes(16))


def need(number: int) -> int:
    return estimate(len(CONTENTS[number]), GEOMETRY.page_count(len(CONTENTS[number])))


def tell(quotas: Quotas, counted: list[tuple[int, ...]], rules: dict[int, Rule]) -> None:
    quotas.keys.begin()
    for number, ids in enumerate(counted):
        for quota in ids:
            quotas.keys.collect(quota, block(number).key)
    quotas.keys.finish(quotas.keys.ordered())
    quotas.put_in_force(rules)


# ---- keys ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(MAPPINGS, st.lists(st.tuples(st.sampled_from(NUMBERS), st.integers(1, 4)))), max_size=4))
def test_keys_are_in_force_as_a_whole_with_what_was_added_meanwhile(
    rounds: list[tuple[list[tuple[int, ...]], list[tuple[int, int]]]],
) -> None:
    keys, expected = QuotaKeys(), [set[int]() for _ in NUMBERS]

    def check() -> None:
        assert [set(keys.of(key(number))) for number in NUMBERS] == expected

    for told, added in rounds:
        keys.begin()
        for number in sorted(NUMBERS, key=lambda each: each % 5):
            for quota in told[number]:
                keys.collect(quota, key(number))
        ordered = keys.ordered()
        for number, quota in added:
            keys.add(key(number), quota)
            expected[number].add(quota)
        check()
        keys.finish(ordered)
        expected = [set(ids) for ids in told]
        for number, quota in added:
            expected[number].add(quota)
        check()


def test_a_hundred_thousand_keys_of_many_quotas_take_eight_bytes_each() -> None:
    keys = QuotaKeys()
    keys.begin()
    packed = random.Random(1).randbytes(16 * 100_000)
    for number, start in enumerate(range(0, len(packed), 1600)):
        keys.collect(10**12 + number, packed[start : start + 1600])
    keys.finish(keys.ordered())
    known, _ = keys._known
    assert sys.getsizeof(known) < 9 * 100_000
    for start in range(0, len(packed), 16 * 997):
        assert keys.of(ContentKey(packed[start : start + 16])) == (10**12 + start // 1600,)
    assert keys.of(ContentKey(bytes(16))) == ()


# ---- counting ------------------------------------------------------------------------------------------------------


@contextmanager
def scene(directory: Path, capacity: int = 1000 * PAGE) -> Iterator[Store]:
    config = TierConfig("ssd", str(directory / "tier"), capacity, free_floor_bytes=0)
    with open_store([config], GEOMETRY, CLUSTER) as store:
        yield store


class Counting(RuleBasedStateMachine):
    """Whatever comes and goes, and whatever counts for what: each quota is charged with what is there."""

    directory: Path
    """Of all examples: a tier has 768 directories."""

    def __init__(self) -> None:
        super().__init__()
        for pattern in ("*/*/00/*", "*/tier.json"):
            for path in self.directory.glob(pattern):
                path.unlink()
        self.counted: list[tuple[int, ...]] = [() for _ in NUMBERS]
        self.rules: dict[int, Rule] = {}
        self.open: dict[int, Partial] = {}
        self.quotas = Quotas()
        self.start()

    def start(self) -> None:
        self.part = ExitStack()
        capacities = (40, 30)
        configs = [
            TierConfig("ssd", str(self.directory / str(number)), capacity * PAGE, free_floor_bytes=0)
            for number, capacity in enumerate(capacities)
        ]
        tell(self.quotas, self.counted, self.rules)
        self.store = self.part.enter_context(open_store(configs, GEOMETRY, CLUSTER, quotas=self.quotas))
        self.store.quotas.apply()

    @rule(number=st.sampled_from(NUMBERS))
    def begin(self, number: int) -> None:
        if number not in self.open:
            try:
                partial = self.store.open_partial(block(number), len(CONTENTS[number]))
            except CapacityError:
                return
            if partial is not None:
                self.open[number] = partial

    @rule(number=st.sampled_from(NUMBERS), pages_written=st.integers(0, 4))
    def write(self, number: int, pages_written: int) -> None:
        if number in self.open:
            for page, data in list(enumerate(pages(CONTENTS[number])))[:pages_written]:
                self.open[number].write_page(page, data, page_checksum(data))

    @rule(number=st.sampled_from(NUMBERS))
    def end(self, number: int) -> None:
        partial = self.open.pop(number, None)
        if partial is not None:
            if partial.complete:
                self.store.seal(partial)
            self.store.close(partial)

    @rule(number=st.sampled_from(NUMBERS))
    def keep(self, number: int) -> None:
        self.begin(number)
        self.write(number, 4)
        self.end(number)

    @rule(number=st.sampled_from(NUMBERS))
    def give_up(self, number: int) -> None:
        partial = self.open.pop(number, None)
        if partial is not None:
            self.store.give_up(partial)
            self.store.close(partial)

    @rule(number=st.sampled_from(NUMBERS))
    def evict(self, number: int) -> None:
        self.store.evict(block(number))

    @rule(number=st.sampled_from(NUMBERS))
    def pin(self, number: int) -> None:
        self.store.pin([block(number)])

    @rule(numbers=st.sets(st.sampled_from(NUMBERS)), shared=st.booleans())
    def share(self, numbers: set[int], shared: bool) -> None:
        self.store.share([block(number) for number in numbers], shared)

    @rule()
    def unshare_all(self) -> None:
        self.store.unshare_all()

    @rule()
    def move_down(self) -> None:
        self.store.move_down(Promote.ALWAYS)

    @rule(number=st.sampled_from(NUMBERS), quota=st.integers(1, 4))
    def learn(self, number: int, quota: int) -> None:
        if quota not in self.counted[number]:
            self.counted[number] += (quota,)
            self.store.quotas.add([block(number)], quota)

    @rule(counted=MAPPINGS, some=st.sets(st.integers(1, 4)))
    def tell(self, counted: list[tuple[int, ...]], some: set[int]) -> None:
        self.counted = counted
        self.rules = {quota: rule for quota, rule in RULES.items() if quota in some}
        tell(self.quotas, counted, self.rules)
        self.store.quotas.apply()

    @rule()
    def restart(self) -> None:
        for number in list(self.open):
            self.end(number)
        self.part.close()
        self.quotas = Quotas()
        self.start()

    @invariant()
    def each_is_charged_with_what_is_there(self) -> None:
        expected = dict.fromkeys(self.rules, 0)
        for number, ids in enumerate(self.counted):
            chain: set[int] = set()
            for quota in ids:
                while quota in self.rules:
                    chain.add(quota)
                    quota = self.rules[quota].outer
            for tier in self.store.tiers:
                size = tier.held_bytes(block(number))
                if number in self.open and self.store.tier_of(self.open[number]) is tier:
                    assert not size
                    size = need(number)
                for quota in chain:
                    expected[quota] += size
        assert {quota: self.quotas.used_bytes(quota) for quota in self.rules} == expected
        for tier, quota in itertools.product(self.store.tiers, self.rules):
            shared = [each for each in tier._sealed.shared if quota in tier._book.counts_for(each)]
            assert sorted(tier._book.shared(quota)) == sorted(shared)
            assert tier._book.shared_bytes(quota) == sum(tier.held_bytes(each) for each in shared)
            parts = [ids for ids in tier._book._sieves if quota in self.quotas.chain(ids)]
            mine = [each for each, _ in tier.blocks() if quota in tier._book.counts_for(each)]
            assert sum(tier._book._unpinned_bytes[ids] for ids in parts) == sum(
                tier.held_bytes(each) for each in mine if not self.store.is_pinned(each)
            )
        if not self.rules:
            assert not self.quotas._own and not any(tier._book._charged for tier in self.store.tiers)

    def teardown(self) -> None:
        for number in list(self.open):
            self.end(number)
        self.part.close()


def test_each_quota_is_charged_with_what_is_there(tmp_path: Path) -> None:
    run_state_machine_as_test(
        type("CountingHere", (Counting,), {"directory": tmp_path}),
        settings=settings(
            max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---- admitting -----------------------------------------------------------------------------------------------------


def test_room_that_was_promised_to_one_block_is_no_others(tmp_path: Path) -> None:
    with scene(tmp_path) as store:
        quotas = store.quotas.book
        tell(quotas, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        quotas.grant({1: need(3) + need(2)})
        assert store.quotas.full(block(3), len(CONTENTS[3]), Promote.IF_SPACE) == []
        quotas.expect(block(3), need(3))
        assert store.quotas.full(block(2), len(CONTENTS[2]), Promote.IF_SPACE) == []
        assert store.quotas.full(block(7), len(CONTENTS[7]), Promote.IF_SPACE) == [1]
        # Its own promise is not in its way.
        seal(store, block(3), CONTENTS[3])
        assert store.quotas.full(block(2), len(CONTENTS[2]), Promote.IF_SPACE) == []
        quotas.expect(block(2), need(2))
        assert store.quotas.full(block(0), len(CONTENTS[0]), Promote.IF_SPACE) == [1]
        quotas.settle(block(2))
        assert store.quotas.full(block(0), len(CONTENTS[0]), Promote.IF_SPACE) == []
        # What is promised is not given back, and what nobody asked for since is.
        quotas.expect(block(2), need(2))
        for _ in range(3):
            assert quotas.to_report(gives_back=True)[1].granted_bytes == need(3) + need(2)
        quotas.settle(block(2))
        assert quotas.to_report(gives_back=True)[1] == (need(3), need(3), 0)


def test_what_is_not_used_of_a_grant_is_given_back_by_halves_and_at_rest_as_a_whole() -> None:
    quotas = Quotas()
    tell(quotas, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
    quotas.grant({1: 1000})
    quotas.charge((1,), 200)

    def kept() -> int:
        return quotas.to_report(gives_back=True)[1].granted_bytes

    for expected in (600, 400, 300):
        assert quotas.lacking(1, 10) < 0 and kept() == expected
    assert quotas.to_report(gives_back=False)[1].granted_bytes == 300
    assert [kept(), kept()] == [250, 200] and quotas.lacking(1, 1) == 1


def test_a_full_quota_evicts_its_own_in_the_order_of_sieve_and_never_what_is_pinned(tmp_path: Path) -> None:
    with scene(tmp_path) as store:
        tell(store.quotas.book, [(1,)] * 8 + [()] * 4, {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        total = sum(need(number) for number in range(8))
        store.quotas.book.grant({1: total})
        for number in NUMBERS:
            if number != 7:
                seal(store, block(number), CONTENTS[number])
        store.pin([block(0)])
        store.visited(block(1))
        store.quotas.book.grant({1: total - need(7)})
        seal(store, block(7), CONTENTS[7])
        here = [number for number in NUMBERS if store.is_sealed(block(number))]
        assert here == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11], "2 and 3 are the oldest that nobody read"
        store.quotas.book.grant({1: need(0)})
        with pytest.raises(CapacityError, match="the quota of /a, 0 B, has no room"):
            store.open_partial(block(2), len(CONTENTS[2]))
        here = [number for number in NUMBERS if store.is_sealed(block(number))]
        assert here == [0, 8, 9, 10, 11], "what is pinned stays, and so do others"


def test_parts_make_room_before_what_is_whole_but_for_those_that_are_wanted(tmp_path: Path) -> None:
    with scene(tmp_path) as store:
        tell(store.quotas.book, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: 2 * need(3) + need(0)})
        seal(store, block(0), CONTENTS[0])
        for number in (3, 7):
            partial = store.open_partial(block(number), len(CONTENTS[number]))
            assert partial is not None
            data = pages(CONTENTS[number])[0]
            partial.write_page(0, data, page_checksum(data))
            store.close(partial)
        store.quotas.book.grant({1: need(3) + need(0)})
        partial = store.open_partial(block(3), len(CONTENTS[3]), Promote.IF_SPACE)
        assert partial is not None and partial.recall(0), "it goes on where it was"
        store.close(partial)
        assert store.is_sealed(block(0)) and not store.tiers[0].holds(block(7))


def test_what_is_beyond_a_quota_counts_as_free_for_others(tmp_path: Path) -> None:
    capacity = sum(need(number) for number in range(8))
    with scene(tmp_path, capacity) as store:
        tell(store.quotas.book, [(1,)] * 8 + [()] * 4, {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: capacity})
        for number in range(8):
            seal(store, block(number), CONTENTS[number])
        assert not store.admits(len(CONTENTS[8]), Promote.IF_SPACE)
        store.quotas.book.grant({1: capacity - need(8)})
        assert store.admits(len(CONTENTS[8]), Promote.IF_SPACE)
        partial = store.open_partial(block(8), len(CONTENTS[8]), Promote.IF_SPACE)
        assert partial is not None
        store.close(partial)
        assert store.quotas.book.used_bytes(1) <= capacity - need(8)
        assert not store.admits(len(CONTENTS[11]), Promote.IF_SPACE)


@contextmanager
def full_quota(directory: Path, numbers: Sequence[int]) -> Iterator[tuple[Store, int]]:
    """These are sealed and count for quota 1, which they fill with so many bytes; everything else counts for it too."""
    with scene(directory) as store:
        tell(store.quotas.book, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        total = sum(need(number) for number in numbers)
        store.quotas.book.grant({1: total})
        for number in numbers:
            seal(store, block(number), CONTENTS[number])
        yield store, total


def sealed(store: Store) -> list[int]:
    return [number for number in NUMBERS if store.is_sealed(block(number))]


def test_each_call_gives_up_what_is_idle_and_forgets_none_of_it(tmp_path: Path) -> None:
    with full_quota(tmp_path, range(8)) as (store, total):
        for number in range(4):
            store.retire(block(number))
        for number in range(4):
            total -= need(number)
            store.quotas.book.grant({1: total})
            store.quotas.trim()
            assert sealed(store) == list(range(number + 1, 8))


def test_files_are_freed_without_the_lock_that_others_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_quota(tmp_path, range(8)) as (store, total):
        partial = store.open_partial(block(7), len(CONTENTS[7]))
        assert partial is None
        waited: list[bool] = []
        real = os.close

        def close(fd: int) -> None:
            if os.fstat(fd).st_nlink == 0:
                waited.append(store.tiers[0]._lock.locked())
            real(fd)

        store.quotas.book.grant({1: total - need(0) - need(1) - need(2)})
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            partial = store.open_partial(block(8), len(CONTENTS[8]))
        assert partial is not None
        store.close(partial)
        assert sealed(store) == [4, 5, 6, 7] and waited == [False] * 4


def test_no_more_is_given_up_for_one_block_than_is_bounded_by_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_room, "_EXTRA_BYTES", 0)
    with full_quota(tmp_path, range(12)) as (store, total):
        store.drop(block(0))
        store.quotas.book.grant({1: 2 * need(3)})
        left = total - need(0)
        while left > 2 * need(3):
            before = left
            try:
                partial = store.open_partial(block(0), len(CONTENTS[0]))
            except CapacityError:
                partial = None
            left = sum(need(number) for number in sealed(store))
            assert before - 2 * need(0) - need(3) < left < before
            if partial is not None:
                store.close(partial)
                break
        assert store.quotas.book.used_bytes(1) <= 2 * need(3)


def test_of_what_is_beyond_a_quota_that_counts_as_free_which_can_go(tmp_path: Path) -> None:
    with full_quota(tmp_path, range(8)) as (store, total):
        tier = store.tiers[0]
        store.quotas.book.grant({1: total - need(3) - need(2)})
        assert tier.idle_bytes() == need(3) + need(2)
        store.retire(block(0))
        assert tier.idle_bytes() == need(3) + need(2), "what is idle goes first, and then less is beyond it"
        for number in (1, 3, 4, 5, 6):
            store.pin([block(number)])
        assert tier.idle_bytes() == need(3) + need(2)
        store.share([block(2)], True)
        store.pin([block(7)])
        assert tier.idle_bytes() == need(0), "the rest is pinned or held by others as well"


def test_what_others_hold_as_well_is_given_up_though_a_quota_is_exceeded(tmp_path: Path) -> None:
    capacity = sum(need(number) for number in range(8))
    with scene(tmp_path, capacity) as store:
        tell(store.quotas.book, [(1,)] * 8 + [()] * 4, {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: capacity})
        for number in range(8):
            seal(store, block(number), CONTENTS[number])
        store.share([block(number) for number in range(8)], True)
        store.quotas.book.grant({1: 0})
        assert store.admits(len(CONTENTS[8]), Promote.IF_SPACE)
        given_up = store.to_give_up(len(CONTENTS[8]))
        assert given_up and all(store.evict(each) for each in given_up)
        partial = store.open_partial(block(8), len(CONTENTS[8]), Promote.IF_SPACE)
        assert partial is not None
        store.close(partial)


def test_shared_blocks_of_a_quota_are_found_without_a_look_at_all_others(tmp_path: Path) -> None:
    with scene(tmp_path) as store:
        tell(store.quotas.book, [()] * 8 + [(1,)] * 4, {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: 1000 * PAGE})
        for number in NUMBERS:
            seal(store, block(number), CONTENTS[number])
        store.share([block(number) for number in range(10)], True)
        tier, looked = store.tiers[0], []
        assert tier.quotas.free_bytes(1) == (0, need(8) + need(9))

        class Watched(dict[BlockId, int]):
            def __iter__(self) -> Iterator[BlockId]:
                looked.append(1)
                return super().__iter__()

        tier._sealed.shared._sizes = Watched(tier._sealed.shared._sizes)
        store.visited(block(8))
        assert tier.quotas.to_give_up(1, 1) == [block(9)] and looked == []
        assert tier.quotas.to_give_up(1, need(9) + 1) == [block(9), block(8)]
        tier.quotas.look_again()
        store.pin([block(9)])
        assert tier.quotas.free_bytes(1) == (0, need(8)) and looked == []


def test_what_moves_down_counts_once_all_the_while(tmp_path: Path) -> None:
    configs = [
        TierConfig("ssd", str(tmp_path / name), size * PAGE, free_floor_bytes=0)
        for name, size in (("upper", 24), ("lower", 90))
    ]
    with open_store(configs, GEOMETRY, CLUSTER) as store:
        upper, lower = store.tiers
        tell(store.quotas.book, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        numbers = [number for number in range(8) if number != 7]
        total = sum(need(number) for number in numbers)
        store.quotas.book.grant({1: total})
        for number in numbers:
            seal(store, block(number), CONTENTS[number])
        assert not lower.blocks()
        found: list[tuple[int, bool]] = []

        def look(*_: object) -> None:
            found.append((store.quotas.book.lacking(1, 0), bool(store.quotas.book.over())))

        def seal_and_look(partial: Partial) -> None:
            sealing(partial)
            look()

        sealing, lower.seal, upper.on_evicted = lower.seal, seal_and_look, look  # type: ignore[method-assign]
        assert store.move_down(Promote.IF_SPACE) > 0
        moved = [each for each, _ in lower.blocks()]
        assert moved and found == [(0, False)] * 2 * len(moved)
        assert store.quotas.book.used_bytes(1) == total and store.quotas.book.lacking(1, 0) == 0
        assert all(lower.quotas.held_bytes(each) and not upper.quotas.held_bytes(each) for each in moved)
        store.quotas.book.grant({1: 0})
        assert {*lower._book.candidates(1)} == {*moved}


def test_a_copy_that_fails_half_way_counts_with_what_is_left_of_it(tmp_path: Path) -> None:
    configs = [TierConfig("ssd", str(tmp_path / name), 60 * PAGE, free_floor_bytes=0) for name in ("upper", "lower")]
    with open_store(configs, GEOMETRY, CLUSTER) as store:
        upper, lower = store.tiers
        tell(store.quotas.book, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: 2 * need(3)})
        seal(store, block(3), CONTENTS[3])

        def failing(partial: Partial) -> None:
            raise CapacityError("full")

        lower.seal = failing  # type: ignore[method-assign]
        assert not store._move(block(3), upper, 0, Promote.IF_SPACE)
        assert lower.quotas.held_bytes(block(3)) == lower.held_bytes(block(3)) > 0
        assert store.quotas.book.used_bytes(1) == need(3) + lower.held_bytes(block(3))


# ---- a tier that is down --------------------------------------------------------------------------------------------


@pytest.mark.expect_warnings("a disk that fails is told")
def test_a_tier_that_is_down_counts_for_nothing_and_is_not_waited_for(tmp_path: Path) -> None:
    configs = [TierConfig("ssd", str(tmp_path / name), 60 * PAGE, free_floor_bytes=0) for name in ("upper", "lower")]
    health = HealthConfig(probe_every_s=0.0, good_probes=1, failed_reads=2)
    with open_store(configs, GEOMETRY, CLUSTER, health=health) as store:
        upper = store.tiers[0]
        tell(store.quotas.book, [(1,)] * len(NUMBERS), {1: Rule("/a", 0, 0)})
        store.quotas.apply()
        store.quotas.book.grant({1: need(3) + need(2)})
        seal(store, block(3), CONTENTS[3])
        began = store.open_partial(block(2), len(CONTENTS[2]))
        assert began is not None and store.tier_of(began) is upper
        assert store.quotas.full(block(7), len(CONTENTS[7]), Promote.IF_SPACE) == [1]
        for _ in range(2):
            upper.on_failed(OSError(errno.EIO, "broken"), True)
        assert store.state(upper) is TierState.DOWN and store.quotas.book.used_bytes(1) == 0
        # As if its disk hung.
        with upper._lock:
            seal(store, block(7), CONTENTS[7])
            partial = store.open_partial(block(11), len(CONTENTS[11]))
            assert partial is not None and not store.is_sealed(block(7)), "it made room in the quota, the other did not"
            store.close(partial)
            assert store.quotas.idle_bytes() == {} and store.quotas.to_give_up(block(11), len(CONTENTS[11])) == []
            store.quotas.add([block(11)], 1)
        store.probed(upper, True)
        store.probed(upper, True)
        assert store.state(upper) is TierState.HEALTHY
        assert store.quotas.book.used_bytes(1) == need(2) and upper.quotas.held_bytes(block(2)) == need(2)
        assert store.restore(block(3)) and store.quotas.book.used_bytes(1) == need(2) + need(3)
        store.close(began)
