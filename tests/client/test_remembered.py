"""The packed memory of names and attributes, against plain dictionaries; and what it weighs."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachefs.client.remembered import Known, Name, Remembered
from cachefs.model import NO_INO, Attr, ContentKey, Ino, Kind

INOS = st.sampled_from([Ino(1), Ino(7), Ino(2**32 + 1), Ino(2**63 - 1)])
NAMES = st.sampled_from(["a", "b", "näme", "x" * 255, "\n", "a\x01"])
TIMES = st.floats(-1, 1e9, allow_nan=False)
GENERATIONS = st.integers(0, 2**32 - 1)


@st.composite
def attrs(draw: Any, ino: Ino) -> Attr:
    kind = draw(st.sampled_from(Kind))
    key = draw(st.sampled_from([b"", b"k" * 16])) if kind is Kind.FILE else b""
    size, mtime = draw(st.integers(0, 2**63 - 1)), draw(st.integers(-(2**63), 2**63 - 1))
    owner = st.sampled_from([0, 1000, 2**32 - 1])
    return Attr(ino, kind, size, mtime, draw(st.integers(0, 0o7777)), draw(owner), draw(owner), ContentKey(key))


class Model(RuleBasedStateMachine):
    """Everything fits here: what is put is found, until something else is said of it."""

    def __init__(self) -> None:
        super().__init__()
        self.real = Remembered(1000)
        self.known: dict[Ino, Known] = {}
        self.believed: dict[Ino, tuple[float, int]] = {}
        self.names: dict[tuple[Ino, str], Ino] = {}
        self.missing: dict[tuple[Ino, str], tuple[float, int]] = {}

    @rule(data=st.data(), ino=INOS, superseded=st.booleans(), expires=TIMES, generation=GENERATIONS)
    def put(self, data: Any, ino: Ino, superseded: bool, expires: float, generation: int) -> None:
        attr = data.draw(attrs(ino))
        self.real.put(attr, superseded=superseded, expires=expires, generation=generation)
        self.known[ino] = Known(attr, superseded, expires, generation)

    @rule(parent=INOS, name=NAMES, ino=INOS, expires=TIMES, generation=GENERATIONS)
    def put_name(self, parent: Ino, name: str, ino: Ino, expires: float, generation: int) -> None:
        self.real.put_name(parent, name, ino, expires=expires, generation=generation)
        self.missing.pop((parent, name), None)
        self.names[parent, name] = ino
        if ino in self.known:
            self.believed[ino] = expires, generation

    @rule(parent=INOS, name=NAMES, expires=TIMES, generation=GENERATIONS)
    def put_missing(self, parent: Ino, name: str, expires: float, generation: int) -> None:
        self.real.put_missing(parent, name, expires=expires, generation=generation)
        self.names.pop((parent, name), None)
        self.missing[parent, name] = expires, generation

    @rule(ino=INOS)
    def supersede(self, ino: Ino) -> None:
        self.real.supersede(ino)
        if ino in self.known:
            self.known[ino] = self.known[ino]._replace(superseded=True)

    @rule(ino=INOS)
    def forget(self, ino: Ino) -> None:
        assert self.real.forget(ino) == self.known.pop(ino, None)
        self.believed.pop(ino, None)

    @rule(parent=INOS, name=NAMES)
    def forget_name(self, parent: Ino, name: str) -> None:
        expected = self.name(parent, name)
        assert self.real.forget_name(parent, name) == expected
        self.names.pop((parent, name), None)
        self.missing.pop((parent, name), None)

    def name(self, parent: Ino, name: str) -> Name | None:
        ino = self.names.get((parent, name))
        if ino is not None:
            return Name(ino, *self.believed.get(ino, (-1.0, 0)))
        missing = self.missing.get((parent, name))
        return None if missing is None else Name(NO_INO, *missing)

    @invariant()
    def the_same(self) -> None:
        for ino in (1, 7, 2**32 + 1, 2**63 - 1):
            assert self.real.known(Ino(ino)) == self.known.get(Ino(ino))
        for parent, name in {*self.names, *self.missing, (Ino(7), "never")}:
            assert self.real.name(parent, name) == self.name(parent, name)
        assert sorted(self.real.names()) == sorted([*self.names, *self.missing])
        assert not self.real.has_forgotten


Model.TestCase.settings = settings(stateful_step_count=30, max_examples=100)
TestModel = Model.TestCase


@pytest.mark.parametrize("limit", [1, 4, 10, 100])
def test_what_was_put_longest_ago_makes_room(limit: int) -> None:
    memory = Remembered(limit)
    for number in range(1, 1001):
        attr = Attr(Ino(number), Kind.FILE, number, 0, 0o644, 0, 0, ContentKey(b""))
        memory.put(attr, superseded=False, expires=1.0, generation=0)
        memory.put_name(Ino(1), str(number), Ino(number), expires=1.0, generation=0)
        memory.put_missing(Ino(1), f"no {number}", expires=1.0, generation=0)
        found = memory.known(Ino(number))
        assert found is not None and found.attr == attr
        # No more than the limit, and no fewer as long as there is more to hold.
        assert len(memory) == min(limit, number)
        assert len(memory.names()) == 2 * min(limit, number)
    assert memory.has_forgotten and memory.known(Ino(1)) is None and memory.name(Ino(1), "1") is None
    kept = [number for number in range(1, 1001) if memory.known(Ino(number)) is not None]
    assert kept == list(range(1001 - limit, 1001))


@pytest.mark.parametrize("limit", [1, 2, 5, 40])
def test_one_makes_room_for_one_whatever_became_younger_or_went(limit: int) -> None:
    memory, random_ = Remembered(limit), random.Random(limit)
    held: set[Ino] = set()
    for _ in range(5000):
        ino = Ino(random_.randrange(1, 3 * limit + 2))
        if random_.random() < 0.2:
            assert (memory.forget(ino) is not None) == (ino in held)
            held.discard(ino)
        else:
            attr = Attr(ino, Kind.FILE, 1, 0, 0o644, 0, 0, ContentKey(b""))
            memory.put(attr, superseded=False, expires=1.0, generation=0)
            is_full = len(held) == limit and ino not in held
            now = {each for each in (*held, ino) if memory.known(each) is not None}
            assert ino in now and len(held - now) == is_full
            held = now
        assert len(memory) == len(held) <= limit


def test_more_kinds_of_owners_than_there_are_numbers_for() -> None:
    memory = Remembered(200_000)
    for number in range(70_000):
        attr = Attr(Ino(number + 1), Kind.FILE, 0, 0, 0o644, number, 0, ContentKey(b""))
        memory.put(attr, superseded=False, expires=1.0, generation=0)
        found = memory.known(attr.ino)
        assert found is not None and found.attr.uid == number
    first = memory.known(Ino(1))
    assert first is None or first.attr.uid == 0


WEIGH = """
import os
from cachefs.client.remembered import Remembered
from cachefs.model import Attr, ContentKey, Ino, Kind

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

count = 1_000_000
memory, before = Remembered(count), resident()
for number in range(2 * count):  # the second million pushes the first out
    ino = Ino(5_000_000_000 + number)
    attr = Attr(ino, Kind.FILE, 110_000 + number, 1_700_000_000_000_000_000 + number, 0o644, 0, 0, os.urandom(16))
    memory.put(attr, superseded=False, expires=1e5 + number, generation=1)
    memory.put_name(Ino(77), f"image_{number:010}.jpg", ino, expires=1e5 + number, generation=1)
assert len(memory) == len(memory.names()) == count
print((resident() - before) / len(memory))
"""


def test_a_million_entries_take_at_most_350_bytes_each() -> None:
    done = subprocess.run([sys.executable, "-c", WEIGH], capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) <= 350


# ---- for somebody else ---------------------------------------------------------------------------------------------


def attr_of(number: int, size: int = 10) -> Attr:
    return Attr(Ino(number), Kind.FILE, size, 5, 0o600 + number % 8, number % 3, 0, ContentKey(b"k" * 16))


def test_what_is_copied_is_recalled_without_being_believed_or_replacing_what_is_known() -> None:
    first = Remembered(1000)
    for number in range(2, 102):
        first.put(attr_of(number), superseded=number == 7, expires=1e9, generation=3)
        first.put_name(Ino(1), f"n{number}", Ino(number), expires=1e9, generation=3)
    first.put_missing(Ino(1), "absent", expires=1e9, generation=3)
    copied = first.copy(1000)
    second = Remembered(1000)
    second.put(attr_of(9, size=99), superseded=False, expires=50.0, generation=1)
    second.put_name(Ino(1), "absent", Ino(9), expires=50.0, generation=1)
    for _ in second.recall(copied):
        pass
    for number in range(2, 102):
        known = second.known(Ino(number))
        if number == 9:
            assert known == Known(attr_of(9, size=99), False, 50.0, 1)
        else:
            assert known == Known(attr_of(number), number == 7, -1.0, 0)
            assert second.name(Ino(1), f"n{number}") == Name(Ino(number), -1.0, 0)
    assert second.name(Ino(1), "absent") == Name(Ino(9), 50.0, 1)
    # Of too many, the newest; and the newest stay the newest.
    newest = first.copy(10)
    assert sorted(ino for ino, _ in newest.records) == list(range(92, 102)) and len(newest.names) == 10
    small = Remembered(5)
    for _ in small.recall(first.copy(1000)):
        pass
    assert small.known(Ino(101)) is not None and small.known(Ino(2)) is None and len(small) == 5


def test_what_is_no_copy_is_refused() -> None:
    whole = Remembered(10)
    whole.put(attr_of(2), superseded=False, expires=1.0, generation=0)
    copied = whole.copy(10)
    for wrong in (copied._replace(layout="<Q"), copied._replace(records=[(2, b"short")]), copied._replace(shapes=[])):
        with pytest.raises((ValueError, IndexError)):
            for _ in Remembered(10).recall(wrong):
                pass
