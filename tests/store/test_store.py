"""Several tiers: where blocks go and what moves down; failing disks; and being killed at every step."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cachefs.model import BlockId, CapacityError, ConfigError, MiB
from cachefs.policy import Promote
from cachefs.store import HealthConfig, Store, TierConfig, TierState, block_files, open_store, page_checksum
from cachefs.store.layout import unlink_if_exists
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, read, seal, sealed_path, some
from cachefs.testing.disks import lying_disk, read_only, small_disk

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting disks needs root")


@contextmanager
def opened(*configs: TierConfig) -> Iterator[Store]:
    with open_store(configs, GEOMETRY, CLUSTER) as store:
        yield store


@pytest.fixture
def two(tmp_path: Path) -> tuple[TierConfig, TierConfig]:
    return (
        TierConfig("ssd", str(tmp_path / "fast"), 64 * PAGE),
        TierConfig("ssd", str(tmp_path / "large"), 256 * PAGE),
    )


def where(store: Store, which: BlockId) -> list[int]:
    return [number for number, tier in enumerate(store.tiers) if tier.is_sealed(which)]


# ---- where blocks go -----------------------------------------------------------------------------------------------


def test_the_first_tier_fills_first_then_the_next_and_nothing_is_evicted(two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        for number in range(8):
            assert store.admits(14 * PAGE, Promote.IF_SPACE)
            seal(store, block(number), content(number, 14 * PAGE))
        assert [where(store, block(number)) for number in range(8)] == [[0]] * 4 + [[1]] * 4
        assert sorted(found for found, _ in store.blocks()) == [block(number) for number in range(8)]
        for number in range(8):
            assert read(store.paths, block(number), 14 * PAGE) == content(number, 14 * PAGE)


def test_evicting_is_done_in_the_last_tier(two: tuple[TierConfig, ...]) -> None:
    gone: list[BlockId] = []
    with opened(*two) as store:
        store.on_evicted = gone.append
        for number in range(30):
            seal(store, block(number), content(number, 14 * PAGE))
        assert [where(store, block(number)) for number in range(4)] == [[0]] * 4
        assert gone and set(gone).isdisjoint(found for found, _ in store.blocks())
        assert not store.admits(14 * PAGE, Promote.IF_SPACE)
        with pytest.raises(CapacityError):
            store.open_partial(block(99), 14 * PAGE, Promote.IF_SPACE)


def test_what_is_coldest_moves_down_before_the_first_tier_is_full(two: tuple[TierConfig, ...]) -> None:
    gone: list[BlockId] = []
    with opened(*two) as store:
        store.on_evicted = gone.append
        for number in range(4):
            seal(store, block(number), content(number, 14 * PAGE))
        store.visited(block(0))
        assert store.move_down(Promote.IF_SPACE) == 1
        assert [where(store, block(number)) for number in range(4)] == [[0], [1], [0], [0]]
        assert store.move_down(Promote.IF_SPACE) == 0
        assert read(store.paths, block(1), 14 * PAGE) == content(1, 14 * PAGE)
        assert not gone, "it only moved"


def test_what_is_read_stays_where_it_is(two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        for number in range(4):
            seal(store, block(number), content(number, 14 * PAGE))
        partials = [os.open(sealed_path(store.paths[0], block(number)), os.O_RDONLY) for number in range(4)]
        try:
            for fd in partials:
                fcntl.flock(fd, fcntl.LOCK_SH)
            assert store.move_down(Promote.ALWAYS) == 0
        finally:
            for fd in partials:
                os.close(fd)
        assert store.move_down(Promote.ALWAYS) == 1


@pytest.mark.expect_warnings("a damaged block is told")
def test_what_is_damaged_does_not_move(two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        for number in range(4):
            seal(store, block(number), content(number, 14 * PAGE))
        with sealed_path(store.paths[0], block(0)).open("r+b") as file:
            file.write(b"rotten")
        store.move_down(Promote.IF_SPACE)
        assert where(store, block(0)) == [] and read(store.paths, block(0), 14 * PAGE) is None


def test_a_block_in_two_tiers_is_one_after_a_restart(two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        seal(store, block(1), content(1, 3 * PAGE))
        store.tiers[0].copy_to(block(1), store.tiers[1], evict=False)
        assert where(store, block(1)) == [0, 1]
    with opened(*two) as store:
        assert where(store, block(1)) == [0]


def test_a_partial_is_resumed_where_it_is(two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        for number in range(4):
            seal(store, block(number), content(number, 14 * PAGE))
        data = content(9, 3 * PAGE + 20)
        partial = some(store.open_partial(block(9), len(data), Promote.IF_SPACE))
        partial.write_page(0, data[:PAGE], page_checksum(data[:PAGE]))
        home = next(tier for tier in store.tiers if tier.holds(block(9)))
        store.close(partial)
        store.drop(block(0))
        again = some(store.open_partial(block(9), len(data), Promote.IF_SPACE))
        assert home.holds(block(9)) and again.recall(0)
        store.close(again)


def test_each_tier_has_its_directory(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)
    with pytest.raises(ConfigError, match="--tier"), opened(tier, tier):
        pass


# ---- failing disks -------------------------------------------------------------------------------------------------


@needs_root
def test_a_full_disk_is_no_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, 16 * MiB) as disk:
        tier = TierConfig("ssd", str(disk / "tier"), 64 * MiB)
        with opened(tier) as store:
            kept = 0
            with pytest.raises(CapacityError):
                for number in itertools.count():
                    seal(store, block(number), content(number, 40 * PAGE))
                    kept += 1
            assert kept > 1
            for number in range(kept):
                assert read(store.paths, block(number), 40 * PAGE) == content(number, 40 * PAGE)
            store.drop(block(0))
            seal(store, block(99), content(99, 20 * PAGE))


@needs_root
@pytest.mark.expect_warnings("a failing tier is told once")
def test_a_tier_that_cannot_be_written_is_left_alone(tmp_path: Path, two: tuple[TierConfig, ...]) -> None:
    with opened(*two) as store:
        seal(store, block(1), content(1, PAGE))
        with read_only(Path(store.paths[0])):
            pass
        # A directory that disappears under the worker is a disk that went away.
        partial_directory = Path(store.paths[0], "partial")
        for fan in partial_directory.iterdir():
            fan.rmdir()
        partial_directory.rmdir()
        seal(store, block(2), content(2, 4 * PAGE))
        assert where(store, block(2)) == [1]
        assert read(store.paths, block(1), PAGE) == content(1, PAGE)


@needs_root
@pytest.mark.expect_warnings("what the disk did not write is told")
def test_what_the_disk_failed_to_write_is_dropped(tmp_path: Path) -> None:
    gone: list[BlockId] = []
    with lying_disk(tmp_path, 4 * MiB) as disk:
        tier = TierConfig("ssd", str(disk / "tier"), 40 * MiB)
        with opened(tier) as store:
            store.on_evicted = gone.append
            count = 10
            for number in range(count):
                seal(store, block(number), content(number, 200 * PAGE))
            lost = store.sync_sealed()
            assert 0 < len(lost) < count and gone == lost
            for number in range(count):
                assert (read(store.paths, block(number), 200 * PAGE) is None) == (block(number) in lost)


# ---- being killed --------------------------------------------------------------------------------------------------

_STEPS = ("open", "pwrite", "rename", "unlink", "ftruncate", "fsync")


def run_and_die(step: int, work: Callable[[Callable[[], None]], None]) -> bool:
    """Do the work in a process killed right before its `step`th change of the file system; whether it got there.

    Steps are counted from where the work calls what it is given. A write is cut in half, as a crash may do.
    """
    pid = os.fork()
    if pid == 0:
        try:
            work(lambda: _arm(step))
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _arm(step: int) -> None:
    left = itertools.count(step, -1)

    def wrap(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if (name != "open" or args[1] & os.O_CREAT) and next(left) == 0:
                if name == "pwrite":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in _STEPS:
        setattr(os, name, wrap(name))


@pytest.mark.expect_warnings("a reboot that loses a page is told")
@pytest.mark.parametrize("reboot", [False, True], ids=["same-boot", "reboot"])
def test_killed_at_every_step_nothing_wrong_is_ever_read(tmp_path: Path, reboot: bool) -> None:
    """Filling, sealing, evicting, moving down and syncing; then a successor goes on. A reboot loses a page too."""
    lengths = {number: (number % 3 + 1) * 2 * PAGE + 100 for number in range(1, 11)}
    tiers = (
        TierConfig("ssd", str(tmp_path / "fast"), 32 * PAGE),
        TierConfig("ssd", str(tmp_path / "large"), 32 * PAGE),
    )

    def work(arm: Callable[[], None]) -> None:
        with opened(*tiers) as store:
            for number in lengths:
                store.restore(block(number))
                store.drop(block(number))
            arm()
            for number, length in lengths.items():
                seal(store, block(number), content(number, length))
                store.move_down(Promote.ALWAYS)
            store.sync_sealed()

    def check(store: Store) -> None:
        for number, length in lengths.items():
            if store.is_suspect(block(number)):
                store.restore(block(number))
            found = read(store.paths, block(number), length)
            assert found in (None, content(number, length))
            assert (found is not None) == store.is_sealed(block(number))

    # The first two blocks step by step; then the pattern repeats, with more and more evicted and moved.
    for step in itertools.chain(range(40), itertools.count(40, 11)):
        killed = run_and_die(step, work)
        if reboot:
            for tier in tiers:
                _another_boot(Path(tier.path))
            _lose_a_page(Path(tiers[step % 2].path))
        with opened(*tiers) as store:
            check(store)
            for number, length in lengths.items():
                if not store.is_sealed(block(number)):
                    seal(store, block(number), content(number, length))
            check(store)
            for tier in store.tiers:
                status = tier.status()
                assert status.reserved_bytes == 0 and 0 <= status.used_bytes <= status.capacity_bytes
        if not killed:
            assert step > 100
            return


def test_killed_while_it_looks_at_an_earlier_boot_s_blocks(tmp_path: Path) -> None:
    tier = TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)

    def work(arm: Callable[[], None]) -> None:
        arm()
        with opened(tier) as store:
            for which in store.suspects():
                store.restore(which)

    for step in itertools.count():
        with opened(tier) as store:
            for number in range(4):
                if not store.restore(block(number)):
                    seal(store, block(number), content(number, 2 * PAGE))
        _another_boot(tmp_path / "tier")
        killed = run_and_die(step, work)
        with opened(tier) as store:
            for number in range(4):
                assert store.restore(block(number)), "nothing that was sealed is lost"
                assert read(store.paths, block(number), 2 * PAGE) == content(number, 2 * PAGE)
        if not killed:
            assert step > 10
            return


def _another_boot(tier: Path) -> None:
    path = tier / "tier.json"
    if path.exists():
        path.write_text(path.read_text().replace('"boot_id": "', '"boot_id": "another '))


def _lose_a_page(tier: Path) -> None:
    """What a power cut does to data that was not synced: zeros where a page was."""
    for path in sorted(tier.glob("sealed/*/*")):
        if path.suffix != ".sums":
            with path.open("r+b") as file:
                file.write(bytes(50))
            return


# ---- what cannot be removed ----------------------------------------------------------------------------------------


@contextmanager
def failing_to_remove(monkeypatch: pytest.MonkeyPatch, code: int, suffix: str = "") -> Iterator[None]:
    """Files whose names end like that stay where they are."""

    def unlink(name: str, dir_fd: int) -> None:
        if name.endswith(suffix):
            raise OSError(code, os.strerror(code), name)
        unlink_if_exists(name, dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(block_files, "unlink_if_exists", unlink)
        yield


def probe_until_healthy(store: Store) -> None:
    for _ in range(HealthConfig().good_probes):
        store.probed(store.tiers[0], True)
    assert store.state(store.tiers[0]) is TierState.HEALTHY


@pytest.mark.expect_warnings("a disk that fails is told")
@pytest.mark.parametrize("suffix", ["", ".sums"])
def test_what_cannot_be_evicted_takes_the_tier_out_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    with opened(TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)) as store:
        gone: list[BlockId] = []
        store.on_evicted = gone.append
        for number in range(2):
            seal(store, block(number), content(number, PAGE))
        with failing_to_remove(monkeypatch, errno.EROFS, suffix):
            assert store.evict(block(0)) is False
        assert store.state(store.tiers[0]) is TierState.DOWN and sorted(gone) == [block(0), block(1)]
        probe_until_healthy(store)
        # Half removed, it is not one that can be restored.
        assert store.restore(block(0)) is (suffix == "") and store.restore(block(1))


def test_a_lack_of_memory_takes_no_tier_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)) as store:
        seal(store, block(0), content(0, PAGE))
        with failing_to_remove(monkeypatch, errno.ENOMEM):
            assert store.evict(block(0)) is False
        assert store.state(store.tiers[0]) is TierState.HEALTHY and store.is_sealed(block(0))
        assert store.evict(block(0)) is True


@pytest.mark.expect_warnings("a disk that fails is told")
def test_what_was_moved_stays_below_when_it_cannot_be_removed_above(
    two: tuple[TierConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(*two) as store:
        gone: list[BlockId] = []
        store.on_evicted = gone.append
        for number in range(4):
            seal(store, block(number), content(number, 14 * PAGE))
        with failing_to_remove(monkeypatch, errno.EIO):
            assert store.move_down(Promote.IF_SPACE) == 0
        assert [store.state(tier) for tier in store.tiers] == [TierState.DOWN, TierState.HEALTHY]
        (moved,) = [found for found, _ in store.blocks()]
        number = int.from_bytes(moved.key, "big")
        assert sorted([*gone, moved]) == [block(number) for number in range(4)]
        assert read([two[1].path], moved, 14 * PAGE) == content(number, 14 * PAGE)


@pytest.mark.expect_warnings("a disk that fails is told")
@pytest.mark.parametrize("given_up", [False, True])
def test_a_partial_that_cannot_be_removed_is_closed_and_its_room_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    with opened(TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)) as store:
        partial = some(store.open_partial(block(0), 4 * PAGE))
        (tier,) = store.tiers
        with failing_to_remove(monkeypatch, errno.EROFS):
            if given_up:
                store.give_up(partial)
                assert partial.dropped
            store.close(partial)
        assert partial.read_fd == -1 and store.state(tier) is TierState.DOWN
        assert tier.status().reserved_bytes == 0 and tier.status().partials == 1 and tier.status().used_bytes > 0
        probe_until_healthy(store)
        seal(store, block(0), content(0, 4 * PAGE))
        assert tier.status().partials == 0 and tier.status().used_bytes == tier.held_bytes(block(0))


@pytest.mark.expect_warnings("the file that is in the way")
def test_every_partial_is_closed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)) as store:
        partials = [some(store.open_partial(block(number), PAGE)) for number in range(2)]
        with failing_to_remove(monkeypatch, errno.EROFS):
            store.tiers[0].close_all()
        assert [partial.read_fd for partial in partials] == [-1, -1]
