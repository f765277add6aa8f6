"""When a tier takes new blocks, and when it is served: as its disk fails and comes back."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachefs.model import BlockId, CapacityError, ContentKey, MiB
from cachefs.store import HealthConfig, Store, TierConfig, TierState, open_store, page_checksum
from cachefs.store.health import Health
from cachefs.store.layout import running_boot_id
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages, read, seal, some
from cachefs.testing.disks import broken, small_disk

HEALTHY, LIMITED, PROBING, DOWN = TierState.HEALTHY, TierState.LIMITED, TierState.PROBING, TierState.DOWN


def after_probes(health: Health, now: float, *outcomes: bool | None) -> list[TierState]:
    states = []
    for number, good in enumerate(outcomes):
        health.probed(good, now + number)
        states.append(health.state)
    return states


def test_an_error_limits_and_good_probes_heal() -> None:
    health = Health()
    health.write_failed(0)
    assert health.state is LIMITED and health.is_served and not health.takes_new
    assert after_probes(health, 5, True, True, True) == [LIMITED, LIMITED, HEALTHY]
    assert health.takes_new


def test_bad_probes_take_it_out_and_good_ones_bring_it_back() -> None:
    health = Health()
    health.write_failed(0)
    assert after_probes(health, 5, True, False, False, False) == [LIMITED, LIMITED, LIMITED, DOWN]
    assert not health.is_served
    assert after_probes(health, 20, False, True, False, True, True, True) == [
        DOWN,
        PROBING,
        DOWN,
        PROBING,
        PROBING,
        HEALTHY,
    ]
    assert health.is_served


def test_some_failed_reads_take_it_out_if_they_come_together() -> None:
    health = Health(HealthConfig(failed_reads=3, reads_within_s=60))
    for now in (0, 50, 100):
        health.read_failed(now)
    assert health.state is LIMITED
    health.read_failed(109)
    assert health.state is DOWN


def test_who_fails_again_soon_has_to_pass_more_probes() -> None:
    health = Health(HealthConfig(good_probes=2, most_good_probes=4, relapse_within_s=100))

    def probes_needed(failed_at: float) -> int:
        health.write_failed(failed_at)
        count = 0
        while health.state is not HEALTHY:
            count += 1
            health.probed(True, failed_at)
        return count

    assert [probes_needed(now) for now in (0, 50, 100, 150, 300, 310)] == [2, 4, 4, 4, 2, 4]


def test_one_that_is_down_is_tried_less_and_less_often() -> None:
    health = Health(HealthConfig(probe_every_s=5, longest_pause_s=30))
    health.cannot_remove(0)
    tried, now = [], 0.0
    while len(tried) < 5:
        if health.probe_due(now):
            tried.append(now)
            health.probed(False, now)
        now += 1
    assert tried == [5, 15, 35, 65, 95]


class HealthModel(RuleBasedStateMachine):
    """Whatever happens in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.config = HealthConfig()
        self.health = Health(self.config)
        self.now = 0.0
        self.good = 0
        """Probes since the last bad news."""

    @rule(seconds=st.floats(0, 1000))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(reading=st.booleans())
    def an_error(self, reading: bool) -> None:
        before = self.health.state
        (self.health.read_failed if reading else self.health.write_failed)(self.now)
        self.good = 0
        if before in (DOWN, PROBING):
            assert self.health.state is before
            return
        if not reading:
            assert self.health.state is LIMITED
        elif before is LIMITED:
            assert self.health.state in (LIMITED, DOWN)

    @rule()
    def damage_stays(self) -> None:
        before = self.health.state
        self.health.cannot_remove(self.now)
        self.good = 0
        assert self.health.state is (PROBING if before is PROBING else DOWN)

    @precondition(lambda self: self.health.probe_due(self.now))
    @rule(good=st.sampled_from([True, True, True, False, None]))
    def a_probe(self, good: bool | None) -> None:
        before = self.health.state
        self.health.probed(good, self.now)
        self.good = 0 if good is False else self.good + bool(good)
        assert not self.health.probe_due(self.now)
        if good is None:
            assert self.health.state is before
        if self.health.state is HEALTHY:
            assert good and self.good >= self.config.good_probes
            self.good = 0
        if before is DOWN:
            assert self.health.state is (PROBING if good else DOWN)

    @invariant()
    def what_is_not_served_takes_nothing(self) -> None:
        assert self.health.takes_new == (self.health.state is HEALTHY)
        assert self.health.is_served == (self.health.state in (HEALTHY, LIMITED))
        if self.health.state is not HEALTHY:
            assert self.health.probe_due(self.now + self.config.longest_pause_s)


TestHealthModel = HealthModel.TestCase


# ---- a real disk ---------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk of its own")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def probe(store: Store, clock: Clock) -> list[TierState]:
    """Try every tier that is due, after a pause that makes any due."""
    clock.now += 60
    for tier in store.to_probe():
        try:
            tier.try_disk()
        except OSError as error:
            store.probed(tier, False, error)
        else:
            store.probed(tier, True)
    return [store.state(tier) for tier in store.tiers]


@needs_root
@pytest.mark.expect_warnings("a disk that fails is told")
def test_a_disk_that_breaks_is_taken_out_and_comes_back(tmp_path: Path) -> None:
    clock, gone, back = Clock(), list[BlockId](), dict[BlockId, int]()
    with small_disk(tmp_path, 64 * MiB) as disk:
        configs = [TierConfig("ssd", str(path), 32 * MiB) for path in (disk / "tier", tmp_path / "other")]
        with open_store(configs, GEOMETRY, CLUSTER, clock=clock) as store:
            store.on_evicted, store.on_restored = gone.append, back.__setitem__
            for number in range(4):
                seal(store, block(number), content(number, 3 * PAGE))
            assert store.sync_sealed() == []
            # One is on the other disk too.
            store.tiers[0].copy_to(block(3), store.tiers[1], evict=False)
            with broken(disk):
                # One bad sector costs the block that has it, and nothing else.
                assert not store.check(block(0)) and store.state(store.tiers[0]) is HEALTHY
                assert not store.check(block(1))
                assert probe(store, clock) == [LIMITED, HEALTHY]
                assert store.is_sealed(block(1)) and gone == []
                # Nothing new goes there.
                seal(store, block(10), content(10, PAGE))
                assert store.tiers[1].is_sealed(block(10))
                assert [probe(store, clock)[0] for _ in range(3)] == [LIMITED, DOWN, DOWN]
                assert sorted(gone) == [block(0), block(1), block(2)]
                assert store.down == [configs[0].path]
                assert sorted(found for found, _ in store.blocks()) == [block(3), block(10)]
                store.drop(block(1))
            assert [probe(store, clock)[0] for _ in range(3)] == [PROBING, PROBING, HEALTHY]
            # It is known again once it is verified.
            assert store.down == [] and not store.is_sealed(block(0)) and back == {}
            assert all(store.restore(number) for number in store.suspects())
            assert sorted(back) == [block(number) for number in range(4)] and min(back.values()) >= 3 * PAGE
            for number in range(4):
                assert read(store.paths, block(number), 3 * PAGE) == content(number, 3 * PAGE)
            seal(store, block(11), content(11, PAGE))
            assert store.tiers[0].is_sealed(block(11))


@needs_root
@pytest.mark.expect_warnings("a disk that fails is told")
def test_reads_that_fail_one_after_the_other_take_it_out(tmp_path: Path) -> None:
    with small_disk(tmp_path, 64 * MiB) as disk:
        config = TierConfig("ssd", str(disk / "tier"), 32 * MiB)
        with open_store([config], GEOMETRY, CLUSTER) as store:
            for number in range(4):
                seal(store, block(number), content(number, PAGE))
            store.sync_sealed()
            with broken(disk):
                for number in range(3):
                    assert not store.check(block(number))
                assert store.blocks() == [] and store.state(store.tiers[0]) is DOWN
                with pytest.raises(CapacityError):
                    store.open_partial(block(9), PAGE)


@needs_root
def test_a_full_disk_does_not_fail(tmp_path: Path) -> None:
    with small_disk(tmp_path, 64 * MiB) as disk:
        config = TierConfig("ssd", str(disk / "tier"), 32 * MiB)
        with open_store([config], GEOMETRY, CLUSTER) as store:
            with (disk / "filler").open("wb", buffering=0) as filler:
                for size in (MiB, 4096):
                    with pytest.raises(OSError, match="No space"):
                        while True:
                            filler.write(bytes(size))
                    # What is promised to it becomes what it takes, which is less.
                    os.fsync(filler.fileno())
            with pytest.raises(CapacityError):
                store.tiers[0].try_disk()
            with pytest.raises(CapacityError):
                seal(store, block(1), content(1, 100 * PAGE))
            assert store.state(store.tiers[0]) is HEALTHY


def use_up_inodes(disk: Path) -> Path:
    """What then fails is making a directory, or a file. The file whose end gives one back."""
    with pytest.raises(OSError, match="No space"):
        for number in itertools.count():
            (disk / f"filler{number}").touch()
    return disk / "filler0"


@needs_root
def test_what_was_written_before_the_disk_was_full_is_sealed_when_it_is_not(tmp_path: Path) -> None:
    """The first block that goes to a directory of sealed ones needs room for that."""
    data = content(1, 3 * PAGE)
    with small_disk(tmp_path, 16 * MiB) as disk:
        config = TierConfig("ssd", str(disk / "tier"), 8 * MiB)
        with open_store([config], GEOMETRY, CLUSTER) as store:
            partial = some(store.open_partial(block(1), len(data)))
            for number, page in enumerate(pages(data)):
                partial.write_page(number, page, page_checksum(page))
            filler = use_up_inodes(disk)
            with pytest.raises(CapacityError):
                store.seal(partial)
            assert read(store.paths, block(1), len(data)) is None
            filler.unlink()
            store.seal(partial)
            store.close(partial)
            assert read(store.paths, block(1), len(data)) == data


@needs_root
def test_a_worker_starts_after_a_reboot_also_on_a_full_disk(tmp_path: Path) -> None:
    data = content(1, 3 * PAGE)
    blocks = [BlockId(ContentKey(bytes([number]) * 16), 0) for number in range(6)]
    with small_disk(tmp_path, 16 * MiB) as disk:
        config = TierConfig("ssd", str(disk / "tier"), 8 * MiB)
        with open_store([config], GEOMETRY, CLUSTER) as store:
            for each in blocks:
                seal(store, each, data)
        facts = disk / "tier" / "tier.json"
        facts.write_text(facts.read_text().replace(running_boot_id(), "an earlier one"))
        use_up_inodes(disk).unlink()  # one for the new tier.json
        with open_store([config], GEOMETRY, CLUSTER) as store:
            assert set(store.suspects()) == set(blocks)
            # One of which the directory cannot be made goes, and makes room for the next.
            kept = [each for each in blocks if store.restore(each)]
            assert 0 < len(kept) < len(blocks)
            assert {each for each in blocks if read(store.paths, each, len(data)) == data} == set(kept)
            assert store.state(store.tiers[0]) is HEALTHY
