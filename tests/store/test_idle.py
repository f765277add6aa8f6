"""Which sealed blocks count as free."""

from __future__ import annotations

import time

import pytest

from cachefs.model import BlockId, ContentKey
from cachefs.store.idle import IdleBlocks

IDLE_AFTER_S = 100.0
A, B, C = (BlockId(ContentKey(bytes([number]) * 16), 0) for number in range(3))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_what_is_retired_goes_first_and_the_rest_once_nobody_read_any_of_it(clock: list[float]) -> None:
    idle = IdleBlocks(IDLE_AFTER_S)
    for block in (A, B, C):
        idle.add(block, 1)
    assert list(idle.found()) == []
    idle.retire(C)
    idle.retire(C)
    assert list(idle.candidates(lambda block: True)) == [C]
    clock[0] += IDLE_AFTER_S
    assert list(idle.found()) == [C, A, B]
    idle.use(A)
    assert list(idle.candidates(lambda block: True)) == [C]


def test_what_is_left_alone_is_offered_again_and_what_may_not_go_is_not(clock: list[float]) -> None:
    idle = IdleBlocks(IDLE_AFTER_S)
    for block in (A, B, C):
        idle.add(block, 1)
    clock[0] += IDLE_AFTER_S
    for block in idle.candidates(lambda block: block != B):
        if block == A:
            idle.remove(A)
    assert list(idle.candidates(lambda block: True)) == [C]
    clock[0] += IDLE_AFTER_S
    assert list(idle.candidates(lambda block: True)) == [B, C]
