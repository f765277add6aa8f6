"""Decisions against models: SIEVE against a list, read-ahead against its promises; files in order."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.policy import FileOrder, FileOrderConfig, Neighbours, Promote, Readahead, ReadaheadConfig, Sieve, admits

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "visit", "remove", "pin", "unpin", "evict"]), st.integers(0, 8)), max_size=200
)


class ListSieve:
    """The paper's algorithm on a plain list, oldest first."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.pinned: set[int] = set()
        self.hand = 0

    def add(self, key: int) -> None:
        if key in self.pinned:
            return
        if key in self.queue:
            self.visited.add(key)
        else:
            self.queue.append(key)

    def visit(self, key: int) -> None:
        if key in self.queue:
            self.visited.add(key)

    def pin(self, key: int) -> None:
        if key in self.queue:
            self.remove(key)
            self.pinned.add(key)

    def unpin(self, key: int) -> None:
        if key in self.pinned:
            self.pinned.remove(key)
            self.add(key)

    def remove(self, key: int) -> None:
        self.pinned.discard(key)
        if key not in self.queue:
            return
        at = self.queue.index(key)
        self.queue.remove(key)
        self.visited.discard(key)
        if at < self.hand:
            self.hand -= 1
        if self.hand >= len(self.queue):
            # Past the newest it starts again at the oldest, also if something newer comes meanwhile.
            self.hand = 0

    def evict(self) -> int | None:
        if not self.queue:
            return None
        while True:
            if self.hand >= len(self.queue):
                self.hand = 0
            key = self.queue[self.hand]
            if key not in self.visited:
                self.remove(key)
                return key
            self.visited.discard(key)
            self.hand += 1


@given(ACTIONS)
def test_sieve_evicts_as_the_paper_says(actions: list[tuple[str, int]]) -> None:
    sieve: Sieve[int] = Sieve()
    model = ListSieve()
    for action, key in actions:
        if action == "evict":
            candidate = next(iter(sieve.candidates()), None)
            assert candidate == model.evict()
            if candidate is not None:
                sieve.remove(candidate)
        else:
            getattr(sieve, action)(key)
            getattr(model, action)(key)
        assert len(sieve) == len(model.queue) + len(model.pinned)
        assert all(each in sieve for each in (*model.queue, *model.pinned))
        assert {each for each in range(9) if sieve.is_pinned(each)} == model.pinned


@given(ACTIONS, st.sets(st.integers(0, 8)))
def test_sieve_offers_everything_once_when_nothing_may_go(actions: list[tuple[str, int]], keys: set[int]) -> None:
    sieve: Sieve[int] = Sieve()
    for key in keys:
        sieve.add(key)
    for action, key in actions:
        if action == "visit":
            sieve.visit(key)
    pinned = {key for action, key in actions if action == "pin" and sieve.pin(key)}
    assert sorted(sieve.candidates()) == sorted(keys - pinned), "what is pinned is never offered"
    assert len(sieve) == len(keys)


def test_readahead_grows_on_sequential_reads_up_to_its_limit() -> None:
    readahead = Readahead(100, ReadaheadConfig(min_pages=1, max_pages=8))
    windows = []
    fetched: list[int] = []
    for page in range(20):
        fetched += readahead.access(page, page + 1)
        windows.append(readahead.window)
    assert windows[:5] == [1, 2, 4, 8, 8]
    assert fetched == list(range(1, 28))


@given(st.lists(st.integers(0, 99), max_size=100))
def test_readahead_never_leaves_the_block_nor_repeats_itself(pages: list[int]) -> None:
    readahead = Readahead(100)
    since_jump: set[int] = set()
    for page in pages:
        ahead = readahead.access(page, page + 1)
        if readahead.window == 0:
            since_jump.clear()
        assert all(page < each < 100 for each in ahead)
        assert since_jump.isdisjoint(ahead)
        since_jump.update(ahead)


def test_readahead_stays_small_on_random_reads() -> None:
    readahead = Readahead(1000)
    ahead = sum(len(readahead.access(page, page + 1)) for page in (500, 3, 900, 77, 640, 12, 350))
    assert ahead == 0


@pytest.mark.parametrize(
    ("mode", "length", "free", "admitted"),
    [
        (Promote.ALWAYS, 10, 0, True),
        (Promote.ALWAYS, 26, 100, False),
        (Promote.IF_SPACE, 10, 10, True),
        (Promote.IF_SPACE, 10, 9, False),
        (Promote.NEVER, 1, 100, False),
    ],
)
def test_admission(mode: Promote, length: int, free: int, admitted: bool) -> None:
    assert admits(mode, block_length=length, capacity_bytes=100, free_bytes=free) is admitted


def test_admission_counts_what_may_be_reclaimed() -> None:
    assert admits(Promote.IF_SPACE, block_length=10, capacity_bytes=100, free_bytes=4, reclaimable_bytes=6)


@pytest.mark.parametrize(("pinned", "admitted"), [(0, True), (90, True), (91, False), (100, False)])
def test_beside_what_is_pinned_nothing_larger_than_the_rest_is_admitted(pinned: int, admitted: bool) -> None:
    for mode in (Promote.ALWAYS, Promote.IF_SPACE):
        assert admits(mode, block_length=10, capacity_bytes=100, free_bytes=50, pinned_bytes=pinned) is admitted


# ---- files in the order of their directory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remembered", "files", "most_requests", "most_brought"), [(1000, 900, 200, 4000), (100, 10_000, 20_000, 30_000)]
)
def test_neighbours_are_asked_for_where_they_are_used(
    remembered: int, files: int, most_requests: int, most_brought: int
) -> None:
    """Two shuffled epochs. All that is learned can be kept, or a hundredth of it."""
    neighbours, random = Neighbours(), Random(1)
    known: dict[int, bool] = {}
    requests = brought = 0
    for _ in range(2):
        for wanted in random.sample(range(files), files):
            if wanted not in known:
                requests += 1
                neighbours.asked()
                for each in range(wanted, min(files, wanted + neighbours.count)):
                    brought += 1
                    known.setdefault(each, False)
                known[wanted] = True
                while len(known) > remembered:
                    was_used = known.pop(next(iter(known)))
                    if not was_used:
                        neighbours.wasted()
            elif not known[wanted]:
                known[wanted] = True
                neighbours.used()
    assert requests <= most_requests and brought <= most_brought


def opens(order: FileOrder[str], positions: Iterable[int], directory: str = "d") -> list[tuple[int, int]]:
    """(position, files) for each time that files were to be fetched ahead; each time all of them are."""
    asked = []
    for position in positions:
        run = order.asked(directory, position)
        if run is not None:
            asked.append((position, run.window))
            run.took(run.after + run.window, run.after + run.window // 2)
    return asked


def test_files_opened_in_order_are_fetched_ahead_more_and_more() -> None:
    order: FileOrder[str] = FileOrder(FileOrderConfig(steps=3, min_files=4, max_files=16))
    asked = opens(order, range(100, 180))
    assert asked[:4] == [(103, 4), (105, 8), (111, 16), (123, 16)]


@pytest.mark.parametrize("step", [2, 3, 4])
def test_gaps_do_not_matter(step: int) -> None:
    assert opens(FileOrder(), range(0, 40 * step, step))


def test_opens_that_are_never_heard_of_do_not_matter() -> None:
    """Those of what was fetched ahead are not: the next one heard of is just behind it."""
    order: FileOrder[str] = FileOrder()
    last, asked = 0, 0
    for position in (1, 2, 3, 4):
        run = order.asked("d", position)
    while run is not None and asked < 10:
        asked += 1
        last = run.after + run.window
        run.took(last, last)
        run = order.asked("d", last + 1)
    assert asked == 10


def test_what_is_heard_late_moves_on_and_never_back() -> None:
    order: FileOrder[str] = FileOrder(FileOrderConfig(min_files=64, max_files=64))
    opens(order, [1, 2, 3])
    run = order.asked("d", 4)
    assert run is not None
    run.took(68, 36)
    assert [order.passed("d", position) for position in (20, 10, 69)] == [None, None, None]
    assert order.passed("d", 40) is run and run.after == 68 and not run.over


def test_two_who_share_the_work_are_one_run() -> None:
    mixed = [position for start in range(0, 200, 4) for position in (start + 2, start, start + 3, start + 1)]
    assert opens(FileOrder(), mixed)


@given(st.integers(0, 2**32), st.integers(2, 12))
def test_many_who_share_the_work_are_one_run(seed: int, readers: int) -> None:
    """Each reads every so-manieth file, and waits for it now and then longer than the others for theirs."""
    random = Random(seed)
    shares = [list(range(reader, 600, readers)) for reader in range(readers)]
    order: FileOrder[str] = FileOrder()
    fetched, asked = 0, 0
    while any(shares):
        behind = min(share[0] for share in shares if share)
        share = random.choice([share for share in shares if share and share[0] < behind + 3 * readers])
        position = share.pop(0)
        asked += 1
        for _, window in opens(order, [position]):
            fetched += window
    assert asked == 600 and fetched >= 300


@given(st.integers(0, 2**32), st.sampled_from([(1000, 1), (100, 10), (10, 100), (50, 20)]))
def test_shuffled_opens_fetch_next_to_nothing_ahead(seed: int, shape: tuple[int, int]) -> None:
    directories, files = shape
    order: FileOrder[str] = FileOrder()
    names = [(str(directory), file) for directory in range(directories) for file in range(files)]
    Random(seed).shuffle(names)
    fetched = sum(window for directory, file in names for _, window in opens(order, [file], directory))
    assert fetched <= 40


def test_a_jump_ends_the_run_and_what_was_for_it() -> None:
    order: FileOrder[str] = FileOrder()
    opens(order, [1, 2, 3])
    run = order.asked("d", 4)
    assert run is not None
    order.asked("d", 5000)
    assert run.over
    assert opens(order, [5001, 5002, 5003])


def test_no_more_directories_are_remembered_than_that() -> None:
    order: FileOrder[str] = FileOrder(FileOrderConfig(directories=2))
    opens(order, [1, 2, 3])
    run = order.asked("d", 4)
    for name in ("e", "f"):
        order.asked(name, 1)
    assert run is not None and run.over
    assert len(order._runs) == 2
