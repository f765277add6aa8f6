"""Memory of large bodies that is used again, but never while somebody reads it."""

from __future__ import annotations

from cachefs.wire.bodies import Bodies

LARGE = 1 << 20


def test_memory_is_used_again_once_its_views_are_gone() -> None:
    bodies = Bodies()
    first = bodies.take(LARGE)
    address = id(first)
    view = memoryview(first)[10:]
    bodies.give(first)
    del first
    second = bodies.take(LARGE)
    assert id(second) != address
    view.release()
    assert id(bodies.take(LARGE)) == address


def test_what_is_read_never_changes() -> None:
    bodies = Bodies()
    views = []
    for number in range(10):
        body = bodies.take(LARGE + number)
        body[:] = bytes([number]) * len(body)
        views.append(memoryview(body))
        bodies.give(body)
    for number, view in enumerate(views):
        assert view == bytes([number]) * (LARGE + number)


def test_lengths_are_exact() -> None:
    bodies = Bodies()
    for length in (LARGE, LARGE + 7, LARGE + 3, LARGE, LARGE + 4000, 2 * LARGE, 5, 0, LARGE + 1):
        body = bodies.take(length)
        assert len(body) == length
        bodies.give(body)


def test_little_is_kept() -> None:
    bodies = Bodies(kept=1)
    first, second = bodies.take(LARGE), bodies.take(LARGE)
    addresses = id(first), id(second)
    bodies.give(first)
    bodies.give(second)
    small = bytearray(100)
    bodies.give(small)
    assert id(bodies.take(LARGE)) == addresses[1]
    assert id(bodies.take(100)) != id(small)
