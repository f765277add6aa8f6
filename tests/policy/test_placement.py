"""Homes and nearness: what holds for any set of workers, and values that must be the same everywhere."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import BlockId, ConfigError, ContentKey
from cachefs.policy import (
    HomeCandidate,
    Place,
    Promote,
    admits,
    distance,
    equally_near,
    nearest,
    parse_labels,
    rank_homes,
    spread_pages,
)

BLOCKS = st.builds(BlockId, st.binary(min_size=16, max_size=16).map(ContentKey), st.integers(0, 2**40))
NAMES = st.text(min_size=1, max_size=20)
CAPACITIES = st.integers(1, 2**50)
WORKERS = st.dictionaries(NAMES, CAPACITIES, min_size=1, max_size=12)
LABELS = st.dictionaries(st.sampled_from(["host", "rack", "zone", "gpu"]), st.sampled_from("abc"))


def candidates(workers: dict[str, int]) -> list[HomeCandidate]:
    return [HomeCandidate(name, capacity) for name, capacity in workers.items()]


def block_of(number: int) -> BlockId:
    return BlockId(ContentKey(number.to_bytes(16, "big")), number % 3)


# ---- homes ---------------------------------------------------------------------------------------------------------


def test_the_homes_are_the_same_on_every_machine() -> None:
    """Values written down once: another result would move every block of a cluster that is being upgraded."""
    equal = [HomeCandidate(f"w{number}", 100) for number in range(5)]
    uneven = [HomeCandidate("small", 1 << 30), HomeCandidate("large", 3 << 30), HomeCandidate("größer", 4 << 30)]
    assert [rank_homes(block_of(number), equal) for number in range(3)] == [
        ["w2", "w0", "w3", "w1", "w4"],
        ["w1", "w0", "w4", "w2", "w3"],
        ["w3", "w2", "w0", "w1", "w4"],
    ]
    assert [rank_homes(block_of(1 << number), uneven) for number in (10, 70, 120)] == [
        ["größer", "large", "small"],
        ["größer", "large", "small"],
        ["large", "größer", "small"],
    ]


@given(BLOCKS, WORKERS, st.integers(0, 12), st.booleans())
def test_the_order_of_the_workers_is_of_no_importance(
    block: BlockId, workers: dict[str, int], most: int, backwards: bool
) -> None:
    ranked = rank_homes(block, candidates(workers))
    otherwise = sorted(candidates(workers), reverse=backwards)
    assert rank_homes(block, otherwise) == ranked
    assert sorted(ranked) == sorted(workers)
    assert rank_homes(block, otherwise, most) == ranked[:most]


@given(BLOCKS, WORKERS, NAMES, CAPACITIES)
def test_one_worker_more_or_less_changes_nothing_among_the_others(
    block: BlockId, workers: dict[str, int], name: str, capacity: int
) -> None:
    with_it = rank_homes(block, candidates({**workers, name: capacity}))
    workers.pop(name, None)
    assert rank_homes(block, candidates(workers)) == [each for each in with_it if each != name]


@given(BLOCKS, WORKERS, st.data())
def test_more_capacity_moves_blocks_to_that_worker_only(
    block: BlockId, workers: dict[str, int], data: st.DataObject
) -> None:
    grown = data.draw(st.sampled_from(sorted(workers)))
    before = rank_homes(block, candidates(workers))
    after = rank_homes(block, candidates({**workers, grown: 2 * workers[grown]}))
    assert after.index(grown) <= before.index(grown)
    assert [each for each in after if each != grown] == [each for each in before if each != grown]


def test_each_worker_is_home_to_its_share() -> None:
    capacities = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 0}
    blocks = 20_000
    random = Random(7)
    keys = [BlockId(ContentKey(random.randbytes(16)), 0) for _ in range(blocks)]
    homes = Counter(rank_homes(key, candidates(capacities), 1)[0] for key in keys)
    for name, capacity in capacities.items():
        share = capacity / 10
        # Five standard deviations.
        assert abs(homes[name] / blocks - share) <= 5 * (share * (1 - share) / blocks) ** 0.5, name


def test_the_blocks_of_one_file_have_different_homes() -> None:
    workers = candidates({f"w{number}": 1 for number in range(4)})
    key = ContentKey(bytes(16))
    homes = Counter(rank_homes(BlockId(key, index), workers)[0] for index in range(400))
    assert len(homes) == 4 and max(homes.values()) < 200


def test_without_workers_there_is_no_home() -> None:
    assert rank_homes(block_of(1), []) == []
    assert rank_homes(block_of(1), [HomeCandidate("full", 0)]) == []


# ---- pages of one block from several peers -------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 1000), unique=True, max_size=60),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10), max_size=6),
    st.integers(1, 8),
)
def test_pages_are_spread_evenly_and_never_beyond_the_limit(pages: list[int], busy: dict[str, int], most: int) -> None:
    spread = spread_pages(pages, list(busy), most, busy)
    given_out = [page for of_peer in spread.values() for page in of_peer]
    room = sum(max(0, most - count) for count in busy.values())
    assert sorted(given_out) == sorted(pages[: min(len(pages), room)])
    assert all(spread.values())
    loads = {peer: count + len(spread.get(peer, [])) for peer, count in busy.items()}
    assert all(loads[peer] <= most for peer in spread)
    for peer in spread:
        assert loads[peer] - 1 <= min(loads.values()), "who has less to do comes first"


def test_pages_are_dealt_in_turns() -> None:
    assert spread_pages(range(7), ["a", "b", "c"], 2) == {"a": [0, 3], "b": [1, 4], "c": [2, 5]}
    assert spread_pages(range(3), [], 2) == {}
    assert spread_pages(range(3), ["a", "b"], 3, {"a": 2}) == {"b": [0, 1], "a": [2]}


# ---- nearness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "far"),
    [
        ("host=a rack=1 zone=x", "host=a rack=1 zone=x", 0),
        ("host=a", "host=a", 0),
        ("host=a rack=1 zone=x", "host=b rack=1 zone=x", 1),
        ("host=a rack=1", "host=b rack=1 zone=x", 1),
        ("host=a rack=1 zone=x", "host=b rack=2 zone=x", 2),
        ("host=a rack=1 zone=x", "host=b zone=x", 2),
        ("host=a rack=1 zone=x", "host=a rack=1 zone=y", 3),
        ("host=a rack=1 zone=x", "host=a rack=2 zone=x", 2),
        ("host=a", "host=b", 3),
        ("", "", 3),
        ("host=a", "", 3),
        ("gpu=h100", "gpu=h100", 3),
    ],
)
def test_distance(mine: str, theirs: str, far: int) -> None:
    labels = [parse_labels("--label", text.split()) for text in (mine, theirs)]
    assert distance(labels[0], labels[1]) == far
    assert distance(labels[1], labels[0]) == far


@given(LABELS, st.lists(LABELS, max_size=8), st.none() | BLOCKS)
def test_the_nearest_come_first(mine: dict[str, str], theirs: list[dict[str, str]], block: BlockId | None) -> None:
    asker = Place("me", mine)
    places = [Place(f"w{number}", labels) for number, labels in enumerate(theirs)]
    ordered = nearest(asker, places, block)
    far = [distance(mine, place.labels) for place in ordered]
    assert far == sorted(far)
    assert nearest(asker, reversed(places), block) == ordered
    assert equally_near(asker, places, block) == ordered[: far.count(far[0]) if far else 0]


def test_equals_are_chosen_equally_often() -> None:
    """By many askers of one block, and by one asker of many blocks."""
    places = [Place(f"w{number}", {"rack": "1"}) for number in range(4)]
    by_asker = Counter(nearest(Place(f"m{n}", {"rack": "1"}), places, block_of(5))[0].name for n in range(1000))
    by_block = Counter(nearest(Place("m", {"rack": "1"}), places, block_of(n))[0].name for n in range(1000))
    for chosen in (by_asker, by_block):
        assert len(chosen) == 4 and all(180 <= count <= 320 for count in chosen.values()), chosen


def test_labels_are_parsed() -> None:
    assert parse_labels("--label", ["host=n17", "rack=r=2", "zone=Zürich West"]) == {
        "host": "n17",
        "rack": "r=2",
        "zone": "Zürich West",
    }
    assert parse_labels("--label", ["host=a", "host=a"]) == {"host": "a"}
    assert parse_labels("--label", []) == {}


@pytest.mark.parametrize(
    "text",
    ["host", "", "=a", "Host=a", "ho st=a", f"{'h' * 64}=a", "host=", "host=a\nb", "host=a\x00", f"host={'a' * 256}"],
)
def test_what_is_no_label_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_labels("--label", ["rack=1", text])
    assert raised.value.key == "--label" and raised.value.value == text


def test_a_label_has_one_value() -> None:
    with pytest.raises(ConfigError, match="'a' already"):
        parse_labels("--label", ["host=a", "host=b"])


# ---- last copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_copy", "free", "reclaimable", "shared", "admitted"),
    [
        (True, 0, 0, 10, True),
        (False, 0, 0, 10, False),
        (True, 3, 3, 4, True),
        (True, 3, 3, 3, False),
        (False, 5, 5, 0, True),
        (False, 10, 0, 90, True),
    ],
)
def test_first_copies_displace_duplicates(
    first_copy: bool, free: int, reclaimable: int, shared: int, admitted: bool
) -> None:
    for mode, expected in ((Promote.IF_SPACE, admitted), (Promote.ALWAYS, True), (Promote.NEVER, False)):
        decision = admits(
            mode,
            block_length=10,
            capacity_bytes=100,
            free_bytes=free,
            reclaimable_bytes=reclaimable,
            shared_bytes=shared,
            first_copy=first_copy,
        )
        assert decision is expected, mode


def test_a_first_copy_displaces_nothing_that_is_pinned() -> None:
    assert not admits(
        Promote.IF_SPACE, block_length=10, capacity_bytes=100, free_bytes=0, shared_bytes=20, pinned_bytes=91
    )
