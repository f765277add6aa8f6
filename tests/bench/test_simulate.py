"""The simulations against each other, against what is known, and the promises that the policies make."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from bench.simulate import exact, large
from bench.simulate.workload import POLICIES, Scenario


def under_store(scenario: Scenario, policy: str) -> list[float]:
    return [epoch.under_store for epoch in exact.simulate(scenario, policy)]


@pytest.mark.parametrize(
    "scenario",
    [
        Scenario(20, 4000, 0.5, epochs=3),
        Scenario(20, 4000, 1.0, epochs=3),
        Scenario(20, 4000, 1.5, epochs=3),
        Scenario(20, 4000, 0.9, epochs=3, readers=10),
    ],
    ids=lambda scenario: f"{scenario.fraction}-{scenario.reader_count}",
)
def test_both_simulations_agree(scenario: Scenario) -> None:
    for policy in POLICIES:
        pairs = zip(exact.simulate(scenario, policy), large.simulate(scenario, policy), strict=True)
        for epoch, (one, other) in enumerate(pairs):
            assert one == pytest.approx(other, abs=0.02), (policy, epoch)
            assert sum(one) == pytest.approx(1) and sum(other) == pytest.approx(1)


def test_one_worker_reads_what_theory_says() -> None:
    """At half LRU misses 0.847 of a shuffled epoch, (1 - x)(1 - ln(1 - x)) with x = 0.5, and never-evict 0.5."""
    scenario = Scenario(1, 2000, 0.5, epochs=3)
    assert under_store(scenario, "lru")[1:] == pytest.approx([0.847, 0.847], abs=0.03)
    sieve = under_store(scenario, "sieve")
    assert 0.55 < sieve[2] < sieve[1] < 0.9
    for policy in ("if-space", "last-copy"):
        assert under_store(scenario, policy) == [1.0, 0.5, 0.5]


def test_caches_that_hold_the_data_together_read_it_once() -> None:
    """Four workers with 30 % each that all read everything: who comes first must not decide what is kept."""
    scenario = Scenario(4, 1000, 1.2, epochs=3, reads="all")
    ours, if_space, lru = (under_store(scenario, policy) for policy in ("last-copy", "if-space", "lru"))
    assert ours[0] == pytest.approx(0.25, abs=0.01), "each byte once, by one of four"
    assert max(ours[1:]) <= 0.02
    assert min(if_space[1:]) > 0.1 and min(lru[1:]) > 0.3


def test_homes_use_the_caches_of_workers_that_read_nothing() -> None:
    scenario = Scenario(8, 2000, 1.1, epochs=2, readers=2)
    assert under_store(scenario, "last-copy")[1] <= 0.02
    assert under_store(scenario, "if-space")[1] > 0.6


def test_a_second_job_gets_its_share_and_the_first_one_kept_its_own() -> None:
    """Half of an epoch without use is common while a job runs: a block idle by itself must not count as free."""
    scenario, jobs = Scenario(1, 2000, 0.5), [0, 0, 0, 1, 1]
    in_groups, each_alone, never = (
        [epoch.under_store for epoch in exact.simulate(scenario, "last-copy", data_sets=jobs, **settings)]
        for settings in ({"idle_after": 0.25}, {"idle_after": 0.25, "in_groups": False}, {})
    )
    assert max(in_groups[2], in_groups[4]) <= 0.6
    assert each_alone[2] > 0.8
    assert never[4] == 1.0


@pytest.mark.parametrize("policy", POLICIES)
def test_caches_never_overflow_and_know_what_they_share(policy: str) -> None:
    scenario = Scenario(4, 40, 1.2)
    cluster = exact.Cluster(scenario, policy, idle_after=50)
    random = Random(3)
    for now in range(2000):
        # What is asked for moves on, so that something becomes idle.
        cluster.read(random.randrange(4), now // 500 * 20 + random.randrange(40), now)
        copies = Counter(block for cache in cluster.caches for block in cache.recent)
        for cache in cluster.caches:
            assert len(cache.recent) <= scenario.slots
            assert cache.shared == sum(copies[block] > 1 for block in cache.recent)
            assert len(cache.sieve) == len(cache.recent) == len(cache.idle)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fraction": 0.001}, "admits none"),
        ({"readers": 9}, "1 to 4"),
        ({"reads": "some"}, "shard"),
        ({"blocks": 3}, "one block"),
    ],
)
def test_what_cannot_be_simulated_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenario(**{"workers": 4, "blocks": 1000, "fraction": 0.5, **wrong})  # type: ignore[arg-type]


def test_reading_everything_is_not_simulated_in_arrays() -> None:
    with pytest.raises(ValueError, match="shards"):
        large.simulate(Scenario(2, 100, 0.5, reads="all"), "lru")


def test_the_command_prints_both() -> None:
    command = [sys.executable, "-m", "bench.simulate", "--workers", "2", "--blocks", "100", "--epochs", "2"]
    command += ["--fraction", "0.5"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "2 workers, 100 blocks" in table and "0.50" in table
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300, check=True).stdout
    rows = {row["policy"]: row["epochs"] for row in json.loads(printed)["rows"]}
    assert list(rows) == list(POLICIES) and rows["last-copy"][1][2] == 0.5
