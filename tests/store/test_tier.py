"""A tier against a dict: pages in, seals, evictions, crashes, damage. What is handed out is right, or it is a miss."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachefs.model import (
    BlockCorruptError,
    BlockId,
    BlockMissingError,
    CapacityError,
    ConfigError,
    LocalProtocolError,
    TierError,
)
from cachefs.store import NotCompleteError, SealedReader, TierConfig, page_checksum, parse_tier
from cachefs.store.layout import data_name, sums_name
from cachefs.store.tier import Tier, open_tier
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages, read, seal, sealed_path, some


@contextmanager
def opened(config: TierConfig) -> Iterator[Tier]:
    with open_tier(config, GEOMETRY, CLUSTER) as store:
        yield store


@pytest.fixture
def config(tmp_path: Path) -> TierConfig:
    return TierConfig("ssd", str(tmp_path / "tier"), 64 * PAGE)


@pytest.fixture
def store(config: TierConfig) -> Iterator[Tier]:
    with opened(config) as store:
        yield store


def another_boot(config: TierConfig) -> None:
    path = Path(config.path) / "tier.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "boot_id": "an earlier one"}))


# ---- filling and sealing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, PAGE, PAGE + 1, 5 * PAGE - 3])
def test_a_sealed_block_reads_as_it_was_written(config: TierConfig, store: Tier, length: int) -> None:
    data = content(1, length)
    seal(store, block(1), data)
    assert read([config.path], block(1), length) == data
    assert store.is_sealed(block(1)) and store.open_partial(block(1), length) is None
    assert sealed_path(config.path, block(1)).stat().st_mode & 0o777 == 0o600


def test_nothing_unsealed_is_ever_found(config: TierConfig, store: Tier) -> None:
    data = content(1, 3 * PAGE)
    partial = store.open_partial(block(1), len(data))
    assert partial is not None
    partial.write_page(1, pages(data)[1], page_checksum(pages(data)[1]))
    assert read([config.path], block(1), len(data)) is None
    with pytest.raises(NotCompleteError, match="not complete"):
        store.seal(partial)
    assert partial.present() == [(1, 2)] and list(partial.missing()) == [0, 2]
    assert os.pread(partial.read_fd, PAGE, PAGE) == pages(data)[1]
    store.close(partial)


def test_a_page_is_written_once_and_only_with_its_checksum(store: Tier) -> None:
    partial = store.open_partial(block(1), 2 * PAGE)
    assert partial is not None
    page = content(1, PAGE)
    with pytest.raises(BlockCorruptError):
        partial.write_page(0, page, page_checksum(page) ^ 1)
    assert partial.empty
    assert partial.write_page(0, page, page_checksum(page)) is True
    assert partial.write_page(0, page, page_checksum(page)) is False
    other = content(2, PAGE)
    with pytest.raises(BlockCorruptError):
        partial.write_page(0, other, page_checksum(other))
    for number, data in ((2, page), (1, page[:-1]), (-1, page)):
        with pytest.raises(LocalProtocolError):
            partial.write_page(number, data, page_checksum(data))
    store.close(partial)


def test_a_page_damaged_on_disk_is_never_sealed(config: TierConfig, store: Tier) -> None:
    data = content(1, 3 * PAGE)
    partial = store.open_partial(block(1), len(data))
    assert partial is not None
    for number, page in enumerate(pages(data)):
        partial.write_page(number, page, page_checksum(page))
    path = Path(config.path) / "partial" / data_name(block(1))
    with path.open("r+b") as file:
        file.seek(PAGE + 5)
        file.write(b"\xff\xff")
    passed = os.dup(partial.read_fd)
    for _ in range(2):
        with pytest.raises(BlockCorruptError):
            store.seal(partial)
        assert read([config.path], block(1), len(data)) is None and list(partial.missing()) == [1]
    # Only that page is written again, and who has the descriptor reads it.
    assert not partial.write_page(0, pages(data)[0], page_checksum(pages(data)[0]))
    assert partial.write_page(1, pages(data)[1], page_checksum(pages(data)[1]))
    assert os.pread(passed, len(data), 0) == data
    os.close(passed)
    store.seal(partial)
    store.close(partial)
    assert read([config.path], block(1), len(data)) == data


def test_a_page_that_is_not_fresh_is_compared_and_absent_if_damaged(
    config: TierConfig, store: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = content(1, 3 * PAGE)
    partial = some(store.open_partial(block(1), len(data)))
    for number, page in enumerate(pages(data)[:2]):
        partial.write_page(number, page, page_checksum(page))
    assert partial.is_fresh(0) and partial.is_fresh(1) and not partial.is_fresh(2)
    with pytest.raises(BlockMissingError):
        partial.compare(2)
    partial.distrust()
    assert partial.present() == [(0, 2)] and partial.present(besides=[1]) == [(1, 2)] and not partial.is_fresh(1)
    with (Path(config.path) / "partial" / data_name(block(1))).open("r+b") as file:
        file.seek(PAGE)
        file.write(bytes([data[PAGE] ^ 1]))
    assert partial.compare(0) and partial.is_fresh(0)
    assert not partial.compare(1) and partial.present() == [(0, 1)]
    assert partial.write_page(1, pages(data)[1], page_checksum(pages(data)[1])) and partial.is_fresh(1)
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert not partial.is_fresh(1) and partial.compare(1) and partial.is_fresh(1)
    store.close(partial)


def test_a_partial_whose_file_was_replaced_is_dropped(config: TierConfig, store: Tier) -> None:
    data = content(1, 3 * PAGE)
    partial = some(store.open_partial(block(1), len(data)))
    for number, page in enumerate(pages(data)):
        partial.write_page(number, page, page_checksum(page))
    path = Path(config.path) / "partial" / data_name(block(1))
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(BlockCorruptError, match="another file"):
        store.seal(partial)
    store.close(partial)
    assert not path.exists() and store.status().reserved_bytes == store.status().used_bytes == 0
    seal(store, block(1), data)
    assert read([config.path], block(1), len(data)) == data


def test_a_passed_descriptor_outlives_its_name(config: TierConfig, store: Tier) -> None:
    data = content(1, 2 * PAGE)
    seal(store, block(1), data)
    fd = SealedReader([config.path]).open(block(1), len(data))
    assert fd is not None
    store.drop(block(1))
    assert read([config.path], block(1), len(data)) is None
    assert os.pread(fd, len(data), 0) == data
    os.close(fd)


def test_readers_cannot_write(config: TierConfig, store: Tier) -> None:
    partial = store.open_partial(block(1), PAGE)
    assert partial is not None
    with pytest.raises(OSError):
        os.pwrite(partial.read_fd, b"x", 0)
    store.close(partial)


def test_serials_differ_for_every_open_file(config: TierConfig) -> None:
    serials = set()
    for _ in range(2):
        with opened(config) as store:
            for _ in range(3):
                partial = store.open_partial(block(1), 2 * PAGE)
                assert partial is not None
                serials.add(partial.serial)
                store.close(partial)
    assert len(serials) == 6 and min(serials) > 0


# ---- misses --------------------------------------------------------------------------------------------------------


def test_a_file_without_checksums_or_of_another_length_is_a_miss(config: TierConfig, store: Tier) -> None:
    data = content(1, 2 * PAGE)
    seal(store, block(1), data)
    assert read([config.path], block(1), len(data) - 1) is None
    os.unlink(Path(config.path) / "sealed" / sums_name(block(1)))
    assert read([config.path], block(1), len(data)) is None


def test_a_tier_of_another_boot_is_not_read(config: TierConfig) -> None:
    data = content(1, PAGE)
    with opened(config) as store:
        seal(store, block(1), data)
    reader = SealedReader([config.path, config.path + "-missing"])
    another_boot(config)
    assert reader.open(block(1), len(data)) is None


def test_what_is_found_at_the_start(config: TierConfig) -> None:
    data = content(1, 2 * PAGE)
    with opened(config) as store:
        for number in range(4):
            seal(store, block(number), content(number, 2 * PAGE))
        used = store.status().used_bytes
    sealed = Path(config.path) / "sealed"
    os.unlink(sealed / sums_name(block(2)))
    os.unlink(sealed / data_name(block(3)))
    (sealed / "00" / "stranger").write_bytes(b"x")
    with opened(config) as store:
        assert {which for which, _ in store.blocks()} == {block(0), block(1)}
        assert store.status().used_bytes == used // 2
    assert not (sealed / data_name(block(2))).exists() and not (sealed / sums_name(block(3))).exists()
    assert not (sealed / "00" / "stranger").exists()
    assert read([config.path], block(1), len(data)) == data


def test_a_partial_is_resumed_in_the_same_boot_and_dropped_in_another(config: TierConfig) -> None:
    data = content(1, 3 * PAGE)
    for boots in (False, True):
        with opened(config) as store:
            partial = store.open_partial(block(1), len(data))
            assert partial is not None
            partial.write_page(1, pages(data)[1], page_checksum(pages(data)[1]))
            store.close(partial)
        if boots:
            another_boot(config)
        with opened(config) as store:
            partial = store.open_partial(block(1), len(data))
            assert partial is not None
            assert partial.present() == [] and [partial.recall(page) for page in range(3)] == [False, not boots, False]
            assert partial.present() == ([] if boots else [(1, 2)])
            store.close(partial)


def test_after_a_reboot_blocks_are_suspect_until_verified(config: TierConfig) -> None:
    with opened(config) as store:
        for number in range(3):
            seal(store, block(number), content(number, 2 * PAGE))
    with sealed_path(config.path, block(1)).open("r+b") as file:
        file.write(b"power cut")
    another_boot(config)
    with opened(config) as store:
        assert store.blocks() == [] and store.is_suspect(block(0))
        assert read([config.path], block(0), 2 * PAGE) is None
        assert store.restore(block(0)) is True
        assert read([config.path], block(0), 2 * PAGE) == content(0, 2 * PAGE)
    with opened(config) as store:
        # Again suspect, until somebody asks; the damaged one never comes back.
        assert {which for which, _ in store.blocks()} == {block(0)} and store.is_suspect(block(2))


@pytest.mark.expect_warnings("a damaged block is told once")
def test_a_damaged_suspect_is_dropped(config: TierConfig) -> None:
    with opened(config) as store:
        seal(store, block(1), content(1, 2 * PAGE))
    with sealed_path(config.path, block(1)).open("r+b") as file:
        file.write(b"power cut")
    another_boot(config)
    with opened(config) as store:
        assert store.restore(block(1)) is False
        assert store.status().used_bytes == 0
        assert read([config.path], block(1), 2 * PAGE) is None


def test_check_reads_the_medium_and_changes_nothing(config: TierConfig, store: Tier) -> None:
    seal(store, block(1), content(1, 2 * PAGE + 77))
    seal(store, block(2), content(2, 2 * PAGE))
    with sealed_path(config.path, block(2)).open("r+b") as file:
        file.write(b"rotten")
    assert store.check(block(1)) and not store.check(block(2))
    assert store.is_sealed(block(2))
    store.drop(block(2))
    assert store.check(block(2)), "what is not there is not damaged"


def test_what_is_idle_or_retired_counts_as_free(
    config: TierConfig, store: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        seal(store, block(number), content(number, 16 * PAGE))
    assert store.idle_bytes() == 0
    with pytest.raises(CapacityError):
        store.open_partial(block(9), 30 * PAGE, evict=False)
    store.retire(block(1))
    assert store.idle_bytes() > 16 * PAGE
    store.close(some(store.open_partial(block(9), 20 * PAGE, evict=False)))
    assert [store.is_sealed(block(number)) for number in range(3)] == [True, False, True]
    now = time.monotonic() + config.idle_after_s + 10
    monkeypatch.setattr(time, "monotonic", lambda: now)
    store.visited(block(0))
    with pytest.raises(CapacityError):
        # They came together: while one is read, the other is not idle.
        store.open_partial(block(9), 30 * PAGE, evict=False)
    now += config.idle_after_s + 10
    store.close(some(store.open_partial(block(9), 30 * PAGE, evict=False)))
    assert [store.is_sealed(block(number)) for number in range(3)] == [False, False, True]


def test_what_was_sealed_is_synced_once(config: TierConfig, store: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(store, block(1), content(1, 2 * PAGE))
    seal(store, block(2), content(2, PAGE))
    store.drop(block(2))
    synced: list[int] = []
    fsync = os.fsync

    def counting(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", counting)
    assert store.sync_sealed() == [] and store.sync_sealed() == []
    assert sealed_path(config.path, block(1)).stat().st_ino in synced and len(synced) == 2


@pytest.mark.expect_warnings("a damaged block is told once")
@pytest.mark.parametrize("cut", [0, 10, 64, 70, 80, 95])
def test_torn_checksums_are_a_miss(config: TierConfig, cut: int) -> None:
    with opened(config) as store:
        seal(store, block(1), content(1, 2 * PAGE))
    os.truncate(Path(config.path) / "sealed" / sums_name(block(1)), cut)
    another_boot(config)
    with opened(config) as store:
        assert store.restore(block(1)) is False


# ---- space ---------------------------------------------------------------------------------------------------------


def test_eviction_spares_what_is_read(config: TierConfig, store: Tier) -> None:
    evicted: list[BlockId] = []
    store.on_evicted = evicted.append
    seal(store, block(0), content(0, 8 * PAGE))
    fd = SealedReader([config.path]).open(block(0), 8 * PAGE)
    assert fd is not None
    for number in range(1, 20):
        seal(store, block(number), content(number, 8 * PAGE))
        assert store.status().used_bytes <= config.capacity_bytes
    assert store.is_sealed(block(0)) and block(0) not in evicted and store.status().evictions == len(evicted) > 0
    os.close(fd)
    # Nobody reads it any more: a block that wants all the room there is gets it.
    seal(store, block(50), content(50, 60 * PAGE))
    assert not store.is_sealed(block(0))


def test_what_was_visited_stays_longer(config: TierConfig, store: Tier) -> None:
    for number in range(6):
        seal(store, block(number), content(number, 8 * PAGE))
    store.visited(block(0))
    for number in range(6, 10):
        seal(store, block(number), content(number, 8 * PAGE))
    assert store.is_sealed(block(0)) and not store.is_sealed(block(1))


def test_no_room_when_everything_is_in_use(config: TierConfig, store: Tier) -> None:
    partials = []
    with pytest.raises(CapacityError):
        for number in range(100):
            partial = store.open_partial(block(number), 8 * PAGE)
            assert partial is not None
            partials.append(partial)
    assert len(partials) == 7
    for partial in partials:
        store.close(partial)
    assert store.status().reserved_bytes == 0
    with pytest.raises(CapacityError, match="larger than the tier"):
        store.open_partial(block(200), 65 * PAGE)


def test_the_free_floor_is_kept(config: TierConfig, tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    floor = free.f_bavail * free.f_frsize * 2
    with opened(TierConfig("ssd", str(tmp_path / "floor"), 64 * PAGE, floor)) as store, pytest.raises(CapacityError):
        store.open_partial(block(1), PAGE)


def test_a_dropped_partial_refuses_pages(config: TierConfig, store: Tier) -> None:
    partial = store.open_partial(block(1), 2 * PAGE)
    assert partial is not None
    page = content(1, PAGE)
    partial.write_page(0, page, page_checksum(page))
    partial.dropped = True
    with pytest.raises(BlockMissingError):
        partial.write_page(1, page, page_checksum(page))
    partial.dropped = False
    store.close(partial)


# ---- ownership and configuration -----------------------------------------------------------------------------------


def test_one_owner(config: TierConfig, store: Tier) -> None:
    with pytest.raises(TierError, match="another worker"), opened(config):
        pass


def test_a_tier_of_another_cluster_is_refused_and_left_alone(config: TierConfig) -> None:
    with opened(config) as store:
        seal(store, block(1), content(1, PAGE))
    with pytest.raises(TierError, match="belongs to cluster"), open_tier(config, GEOMETRY, "other"):
        pass
    assert read([config.path], block(1), PAGE) == content(1, PAGE)


def test_a_damaged_tier_file_is_an_error(config: TierConfig) -> None:
    with opened(config):
        pass
    (Path(config.path) / "tier.json").write_text("{")
    with pytest.raises(TierError, match="damaged"), opened(config):
        pass


def test_mem_must_be_tmpfs_and_tiers_must_hold_some_pages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least"), opened(TierConfig("ssd", str(tmp_path), PAGE)):
        pass


@pytest.mark.parametrize("text", ["", "ssd:/x", "disk:/x:1G", "ssd:x:1G", "ssd:/x:lots", "ssd:/x:0"])
def test_wrong_tiers(text: str) -> None:
    with pytest.raises(ConfigError, match="--tier"):
        parse_tier(text)


def test_right_tiers() -> None:
    tier = parse_tier("mem:/dev/shm/a:b:1.5G")
    assert (tier.kind, tier.path, tier.capacity_bytes) == ("mem", "/dev/shm/a:b", 3 << 29)


def test_cached_files_keep_no_access_times(config: TierConfig, store: Tier) -> None:
    seal(store, block(1), content(1, PAGE))
    path = sealed_path(config.path, block(1))
    os.utime(path, (1, path.stat().st_mtime))
    path.read_bytes()
    if path.stat().st_atime != 1:
        pytest.skip("this file system cannot do without access times")


# ---- the model -----------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 5)
LENGTHS = [0, 1, PAGE, 3 * PAGE + 100, 8 * PAGE, 12 * PAGE]


class TierModel(RuleBasedStateMachine):
    """Block number n has content(n, LENGTHS[n]). Readers keep descriptors open across everything."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.config = TierConfig("ssd", os.path.join(self.directory, "tier"), 24 * PAGE)
        self.context = opened(self.config)
        self.store = self.context.__enter__()
        self.held: dict[int, int] = {}

    def teardown(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.context.__exit__(None, None, None)
        shutil.rmtree(self.directory)

    @rule(number=NUMBERS, share=st.sets(st.integers(0, 12)), then_seal=st.booleans())
    def fill(self, number: int, share: set[int], then_seal: bool) -> None:
        data = content(number, LENGTHS[number])
        try:
            partial = self.store.open_partial(block(number), len(data))
        except CapacityError:
            return
        if partial is None:
            assert self.store.is_sealed(block(number))
            return
        for index, page in enumerate(pages(data)):
            if then_seal or index in share:
                partial.write_page(index, page, page_checksum(page))
                start, length = partial.page_span(index)
                assert os.pread(partial.read_fd, length, start) == page
        if then_seal:
            self.store.seal(partial)
        self.store.close(partial)

    @rule(number=NUMBERS)
    def hold(self, number: int) -> None:
        fd = SealedReader([self.config.path]).open(block(number), LENGTHS[number])
        assert (fd is not None) == self.store.is_sealed(block(number))
        if fd is not None:
            os.close(self.held.pop(number, fd)) if number in self.held else None
            self.held[number] = fd

    @rule(number=NUMBERS)
    def let_go(self, number: int) -> None:
        if number in self.held:
            os.close(self.held.pop(number))

    @rule(number=NUMBERS)
    def visit(self, number: int) -> None:
        self.store.visited(block(number))

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        self.store.drop(block(number))

    @rule(reboot=st.booleans())
    def restart(self, reboot: bool) -> None:
        self.context.__exit__(None, None, None)
        if reboot:
            another_boot(self.config)
        self.context = opened(self.config)
        self.store = self.context.__enter__()

    @precondition(lambda self: any(self.store.is_suspect(block(number)) for number in range(6)))
    @rule(number=NUMBERS)
    def restore(self, number: int) -> None:
        self.store.restore(block(number))

    @invariant()
    def what_is_read_is_right(self) -> None:
        for number in range(6):
            found = read([self.config.path], block(number), LENGTHS[number])
            assert found == (content(number, LENGTHS[number]) if self.store.is_sealed(block(number)) else None)

    @invariant()
    def held_descriptors_read_on(self) -> None:
        for number, fd in self.held.items():
            assert os.pread(fd, LENGTHS[number] + 1, 0) == content(number, LENGTHS[number])

    @invariant()
    def the_ledger_is_right(self) -> None:
        status = self.store.status()
        assert status.used_bytes + status.reserved_bytes <= status.capacity_bytes
        assert status.reserved_bytes == 0 and status.used_bytes >= 0
        if not status.sealed and not status.suspect and not status.partials:
            assert status.used_bytes == 0


TestTierModel = TierModel.TestCase
TestTierModel.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
