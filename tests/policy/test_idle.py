"""What counts as free because the work it came for is over."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from cachefs.policy import IdleGroups

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "use", "remove", "wait"]), st.integers(0, 60), st.integers(0, 5)), max_size=200
)


@given(ACTIONS, st.sampled_from([1, 4, 256]))
def test_idle_is_what_is_here_and_was_not_used(actions: list[tuple[str, int, int]], max_group: int) -> None:
    """Sizes add up, nothing used of late is idle, and alone each key is idle exactly when it must be."""
    idle: IdleGroups[int] = IdleGroups(10, max_group)
    sizes: dict[int, int] = {}
    used_at: dict[int, int] = {}
    now = 0
    for action, key, number in actions:
        if action == "wait":
            now += number
        elif action == "add":
            idle.add(key, number, now)
            sizes.setdefault(key, number)
            used_at[key] = now
        elif action == "use":
            idle.use(key, now)
            if key in sizes:
                used_at[key] = now
        else:
            idle.remove(key)
            sizes.pop(key, None)
        keys = list(idle.candidates(now))
        assert len(idle) == len(sizes)
        assert len(set(keys)) == len(keys)
        assert set(keys) == {key for key in sizes if idle.is_idle(key, now)}
        assert idle.idle_bytes(now) == sum(sizes[key] for key in keys)
        for key in keys:
            assert used_at[key] <= now - 10
        if max_group == 1:
            assert set(keys) == {key for key in sizes if used_at[key] <= now - 10}


def test_a_running_job_keeps_what_it_reads_now_and_then() -> None:
    """A shuffled epoch over 1000 blocks takes 1000, and 250 without use is idle."""
    idle: IdleGroups[int] = IdleGroups(250)
    random = Random(5)
    for key in range(1000):
        idle.add(key, 1, float(key) / 1000)
    for now, key in enumerate(random.sample(range(1000), 1000)):
        idle.use(key, now)
        assert idle.idle_bytes(now) == 0
    assert idle.idle_bytes(1250) == 1000, "nobody reads it any more"


def test_a_new_job_does_not_revive_the_last_ones_blocks() -> None:
    idle: IdleGroups[str] = IdleGroups(100)
    for number in range(10):
        idle.add(f"old {number}", 1, 0)
    assert idle.idle_bytes(100) == 10
    for number in range(5):
        victim = next(idle.candidates(100))
        idle.remove(victim)
        idle.add(f"new {number}", 1, 100)
    assert idle.idle_bytes(100) == 5
    assert list(idle.candidates(150)) == [f"old {number}" for number in range(5, 10)]


def test_the_longest_idle_go_first_and_what_is_used_meanwhile_stays() -> None:
    idle: IdleGroups[str] = IdleGroups(10, max_group=1)
    for now, key in enumerate("abcd"):
        idle.add(key, 1, now)
    idle.use("a", 4)
    walk = idle.candidates(100)
    assert next(walk) == "b"
    idle.use("c", 100)
    idle.remove("d")
    assert list(walk) == ["a"]
