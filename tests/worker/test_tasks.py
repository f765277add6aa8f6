"""Tasks of workers, and jobs made of them: queues, rates, walks that go on, and what counts for good."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs.master.progress import Progress
from cachefs.master.tasks import MOST_BYTES, MOST_WAITING, TaskQueues
from cachefs.master.walks import Position, Walk
from cachefs.meta import Found, MetaStore, open_meta_store
from cachefs.model import ROOT_INO, BlockId, ContentKey, Ino, Kind, ObjectInfo
from cachefs.policy import Rate
from cachefs.wire.control import TASKS_AT_ONCE, TaskOutcome, Tasks

pytestmark = pytest.mark.anyio


def block(number: int) -> BlockId:
    return BlockId(ContentKey(number.to_bytes(16, "big")), 0)


class Asked:
    """Tasks that wait for their outcomes."""

    def __init__(self, queues: TaskQueues, nursery: trio.Nursery) -> None:
        self.queues = queues
        self.nursery = nursery
        self.outcomes: dict[int, TaskOutcome | None] = {}

    async def ask(self, count: int, length: int = 1, worker: str = "w") -> None:
        async def one(number: int) -> None:
            self.outcomes[number] = await self.queues.run(worker, "load", block(number), length)

        for number in range(count):
            self.nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked()


async def given(stream: AsyncGenerator[Tasks, None]) -> list[int]:
    """What comes next."""
    with trio.fail_after(60):
        return [task.task_id for task in (await stream.__anext__()).tasks]


async def test_a_worker_is_given_so_much_at_once_and_more_when_it_tells_of_that() -> None:
    queues = TaskQueues(lambda name: True)
    async with trio.open_nursery() as nursery, aclosing(queues.watch("w")) as stream:
        asked = Asked(queues, nursery)
        await asked.ask(MOST_WAITING + 2 * TASKS_AT_ONCE)
        # Of those, some wait outside of the queue.
        assert len(queues) == MOST_WAITING
        first = await given(stream)
        assert len(first) == TASKS_AT_ONCE
        await trio.testing.wait_all_tasks_blocked()
        assert len(queues) == MOST_WAITING + TASKS_AT_ONCE
        queues.ended(
            "w", [TaskOutcome(first[0], "done", 5), TaskOutcome(first[0], "failed"), TaskOutcome(9999, "done")]
        )
        assert len(await given(stream)) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert list(asked.outcomes.values()) == [TaskOutcome(first[0], "done", 5)]
        nursery.cancel_scope.cancel()
    assert len(queues) == 0


async def test_large_blocks_are_given_a_few_at_a_time_and_one_that_is_larger_than_all_alone() -> None:
    queues = TaskQueues(lambda name: True)
    async with trio.open_nursery() as nursery, aclosing(queues.watch("w")) as stream:
        asked = Asked(queues, nursery)
        await asked.ask(5, MOST_BYTES // 2)
        first = await given(stream)
        assert len(first) == 2
        queues.ended("w", [TaskOutcome(each, "done") for each in first])
        second = await given(stream)
        queues.ended("w", [TaskOutcome(each, "done") for each in second])
        last = await given(stream)
        assert (len(second), len(last)) == (2, 1)
        await asked.ask(2, 8 * MOST_BYTES)
        queues.ended("w", [TaskOutcome(last[0], "done")])
        assert len(await given(stream)) == 1
        nursery.cancel_scope.cancel()


async def test_what_was_not_told_of_is_given_again_and_is_lost_with_a_worker_that_dies() -> None:
    alive = {"w"}
    queues = TaskQueues(alive.__contains__)
    async with trio.open_nursery() as nursery:
        asked = Asked(queues, nursery)
        await asked.ask(3)
        async with aclosing(queues.watch("w")) as stream:
            first = await given(stream)
        async with aclosing(queues.watch("w")) as stream:
            assert await given(stream) == first
            queues.ended("w", [TaskOutcome(first[1], "held")])
            alive.clear()
            queues.lost("w")
            await trio.testing.wait_all_tasks_blocked()
            outcomes = list(asked.outcomes.values())
            assert (len(outcomes), outcomes.count(None)) == (3, 2)
            assert TaskOutcome(first[1], "held") in outcomes
            # It was only slow, and tells late: nobody waits for that any more.
            queues.ended("w", [TaskOutcome(first[0], "done")])
            alive.add("w")
            await asked.ask(1)
            assert len(await given(stream)) == 1
            nursery.cancel_scope.cancel()
    assert await TaskQueues(lambda name: False).run("w", "load", block(1), 1) is None


def test_a_rate_holds_over_time_whatever_the_sizes_are() -> None:
    rate, now_s, sent = Rate(100.0, 0.0), 0.0, 0
    for size in [10, 1, 350, 30, 500, 2, 2, 100] * 10:
        now_s += rate.take(size, now_s)
        sent += size
        # What is on its way is owed: never more than that before its time.
        assert sent - size <= 100.0 * now_s + 100
    assert now_s >= (sent - 500) / 100.0 - 1
    before = now_s
    rate.take(10_000, now_s)
    rate.give_back(10_000)
    assert rate.take(1, now_s) <= before
    assert Rate(0, 0.0).take(1 << 60, 0.0) == 0.0


def tree(store: MetaStore, paths: list[str]) -> None:
    store.attach([("/", "s3://e/b")])
    for path in paths:
        parent = store.get(ROOT_INO)
        *above, name = path.rstrip("/").split("/")
        for each in above:
            assert parent is not None
            parent = store.child(parent.attr.ino, each)
        assert parent is not None
        kind = Kind.DIRECTORY if path.endswith("/") else Kind.FILE
        info = ObjectInfo(path, kind, 5, 0, "" if kind is Kind.DIRECTORY else "e")
        store.put_child(parent, "s3://e/b", Found(name, info))


def test_a_walk_goes_on_from_every_place_it_was_at(tmp_path: Path) -> None:
    files = ["a/1", "a/b/2", "a/b/3", "a/c/d/4", "a/5", "e/6", "7", "z/8"]
    with open_meta_store(str(tmp_path)) as store:
        tree(store, ["a/", "a/1", "a/b/", "a/b/2", "a/b/3", "a/c/", "a/c/d/", "a/c/d/4", "a/5", "e/", "e/6", "7", "z/"])
        tree_z = store.child(ROOT_INO, "z")
        assert tree_z is not None
        store.put_child(tree_z, "s3://e/b", Found("8", ObjectInfo("z/8", Kind.FILE, 5, 0, "e")))

        def path(ino: Ino) -> str:
            inode = store.get(ino)
            assert inode is not None
            return store.path(inode)[1:]

        for paths, wanted in (
            (["/"], files),
            (["/7", "/gone", "/a"], ["7", "a/1", "a/b/2", "a/b/3", "a/c/d/4", "a/5"]),
        ):
            walk, found = Walk(store, paths), list[str]()
            while not walk.ended:
                found += [path(each.ino) for each in walk.next()]
                assert found + rest(store, paths, walk.position, path) == wanted
            assert found == wanted


def rest(store: MetaStore, paths: list[str], position: Position, path: object) -> list[str]:
    walk, found = Walk(store, paths, position), list[str]()
    while not walk.ended:
        found += [path(each.ino) for each in walk.next()]  # type: ignore[operator]
    return found


def test_progress_counts_for_good_what_is_done_with_all_before_it() -> None:
    progress = Progress()
    first, second = progress.begin(Position(1)), progress.begin(Position(2))
    second.counts.done, second.open = 5, 0
    second.failures.append(("/b", "gone"))
    first.counts.done = 1
    progress.settle()
    assert (progress.base.done, progress.position) == (0, None)
    assert (progress.counts().done, progress.failures()) == (6, [("/b", "gone")])
    first.open = 0
    progress.settle()
    assert (progress.base.done, progress.position, progress.base_failures) == (6, Position(2), [("/b", "gone")])
    assert progress.counts().done == 6
