"""A lack of descriptors or memory says nothing about a disk and what it holds: it costs no block and no tier."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachefs.model import CapacityError
from cachefs.policy import Promote
from cachefs.store import Rule, SealedReader, Store, TierConfig, TierState, open_store, page_checksum, page_io
from cachefs.testing.blocks import CLUSTER, GEOMETRY, PAGE, block, content, pages, read, seal, some
from cachefs.testing.shortage import few_descriptors

LENGTH = 14 * PAGE


@contextmanager
def opened(tmp_path: Path) -> Iterator[Store]:
    """Two tiers; four blocks, all in the first one, of which one is to be moved down."""
    configs = [TierConfig("ssd", str(tmp_path / name), room * PAGE) for name, room in (("fast", 64), ("large", 256))]
    with open_store(configs, GEOMETRY, CLUSTER) as store:
        for number in range(4):
            seal(store, block(number), content(number, LENGTH))
        yield store


def is_whole(store: Store) -> bool:
    held = all(read(store.paths, block(number), LENGTH) == content(number, LENGTH) for number in range(4))
    return held and all(store.state(tier) is TierState.HEALTHY for tier in store.tiers)


@pytest.mark.parametrize("left", range(7))
def test_what_moves_down_stays_above_for_want_of_descriptors(tmp_path: Path, left: int) -> None:
    with opened(tmp_path) as store:
        with few_descriptors(left):
            moved = store.move_down(Promote.IF_SPACE)
        assert is_whole(store)
        assert moved + store.move_down(Promote.IF_SPACE) == 1 and is_whole(store)


def test_there_is_a_number_of_descriptors_for_each_step(tmp_path: Path) -> None:
    """The numbers above reach from none to enough."""
    with opened(tmp_path) as store, few_descriptors(6):
        assert store.move_down(Promote.IF_SPACE) == 1


def test_what_cannot_be_looked_at_is_not_damaged(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with few_descriptors():
            assert store.check(block(0))
        assert is_whole(store)


def test_what_is_suspect_stays_so_until_it_can_be_looked_at(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.tiers[0].distrust()
        with few_descriptors():
            assert not store.restore(block(0)) and store.is_suspect(block(0))
        assert all(store.restore(block(number)) for number in range(4)) and is_whole(store)


def test_a_lack_of_memory_is_no_damage_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scratch(size: int) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with opened(tmp_path) as store:
        store.tiers[0].distrust()
        assert store.restore(block(1))
        with monkeypatch.context() as patch:
            patch.setattr(page_io, "scratch", scratch)
            assert store.check(block(1)) and not store.restore(block(0)) and store.is_suspect(block(0))
        assert all(store.restore(block(number)) for number in range(4)) and is_whole(store)


def test_what_cannot_be_synced_now_is_synced_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with opened(tmp_path) as store:
        with few_descriptors():
            assert store.sync_sealed() == []
        assert is_whole(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", synced.append)
            assert store.sync_sealed() == []
        assert len(synced) == 2 * 4


@pytest.mark.parametrize("left", range(4))
def test_a_partial_is_gone_on_with_when_there_are_descriptors_again(tmp_path: Path, left: int) -> None:
    data = content(9, 6 * PAGE)
    with opened(tmp_path) as store:
        began = some(store.open_partial(block(9), len(data)))
        began.write_page(3, pages(data)[3], page_checksum(pages(data)[3]))
        store.close(began)
        with few_descriptors(left):
            try:
                store.close(some(store.open_partial(block(9), len(data))))
            except CapacityError:
                assert left < 2
        resumed = some(store.open_partial(block(9), len(data)))
        assert resumed.recall(3) and resumed.present() == [(3, 4)]
        store.close(resumed)
        assert is_whole(store)


def test_a_miss_is_told_from_what_cannot_be_known(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fresh, proven = SealedReader(store.paths), SealedReader(store.paths)
        assert proven.open(block(8), LENGTH) is None
        for reader in (fresh, proven):
            with few_descriptors():
                assert reader.open(block(0), LENGTH) is None
                with pytest.raises(OSError, match="Too many open files"):
                    reader.find(block(0), LENGTH)
            assert reader.find(block(8), LENGTH) is None
            fd = reader.find(block(0), LENGTH)
            assert fd is not None
            os.close(fd)


def test_what_makes_room_in_a_quota_stays_for_want_of_descriptors(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        book = store.quotas.book
        for number in range(4):
            book.keys.add(block(number).key, 1)
        book.keys.add(block(9).key, 1)
        book.put_in_force({1: Rule("/a", 0, 0)})
        store.quotas.apply()
        book.grant({1: book.used_bytes(1)})
        store.retire(block(0))
        with few_descriptors():
            with pytest.raises(CapacityError, match="the quota of /a"):
                store.open_partial(block(9), LENGTH)
            book.grant({1: 0})
            store.quotas.trim()
        assert is_whole(store)
        store.quotas.trim()
        assert not store.is_sealed(block(0)) and store.is_sealed(block(1))
