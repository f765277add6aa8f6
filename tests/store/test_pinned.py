"""The packed set of pinned contents against a set."""

from __future__ import annotations

import random
import sys

from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import ContentKey
from cachefs.store import PinnedKeys

NUMBERS = st.sets(st.integers(0, 30))


def key(number: int) -> ContentKey:
    return ContentKey(random.Random(number).randbytes(16))


def found(keys: PinnedKeys) -> set[int]:
    return {number for number in range(31) if key(number) in keys}


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=4))
def test_a_set_is_in_force_as_a_whole_with_what_was_added_meanwhile(rounds: list[tuple[set[int], ...]]) -> None:
    keys, expected = PinnedKeys(), set[int]()
    for told, before, during in rounds:
        for number in before:
            keys.add(key(number))
        expected |= before
        keys.begin()
        for number in sorted(told, key=lambda each: each % 7):
            keys.collect(key(number))
        ordered = keys.ordered()
        for number in during:
            keys.add(key(number))
        expected |= during
        assert found(keys) == expected, "the one before, until the other one is complete"
        keys.finish(ordered)
        expected = told | during
        assert found(keys) == expected


def test_a_hundred_thousand_keys_take_eight_bytes_each() -> None:
    keys = PinnedKeys()
    keys.begin()
    packed = random.Random(1).randbytes(16 * 100_000)
    for start in range(0, len(packed), 1 << 16):
        keys.collect(packed[start : start + (1 << 16)])
    keys.finish(keys.ordered())
    assert sys.getsizeof(keys.ordered()) < 100
    assert sys.getsizeof(keys._known) < 9 * 100_000
    for start in range(0, len(packed), 16 * 997):
        assert ContentKey(packed[start : start + 16]) in keys
    assert ContentKey(bytes(16)) not in keys
