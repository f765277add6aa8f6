"""Parts of pages, compared before they are given."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.model import BlockCorruptError
from cachefs.store import PageAt, PieceSums, page_checksum
from cachefs.store.pieces import PIECE_BYTES
from cachefs.testing.blocks import block

LENGTH = 5 * PIECE_BYTES + 123
DATA = random.Random(1).randbytes(2 * LENGTH)
PAGES = [PageAt(start, LENGTH, page_checksum(DATA[start : start + LENGTH])) for start in (0, LENGTH)]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(DATA)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def flip(fd: int, at: int) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 4]), at)


@pytest.mark.parametrize("page", PAGES)
def test_every_part_is_what_the_file_has(fd: int, page: PageAt) -> None:
    pieces = PieceSums()
    edges = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, LENGTH - 1, LENGTH]
    for first in edges:
        for last in edges:
            if first < last:
                start, end = page.offset + first, page.offset + last
                assert pieces.read(fd, block(1), page, start, end - start) == DATA[start:end]


def test_a_flipped_bit_is_found_whenever_and_wherever_it_flips(fd: int) -> None:
    rng = random.Random(2)
    pieces, page = PieceSums(), PAGES[1]
    for known in (False, True):
        for _ in range(50):
            at = page.offset + rng.randrange(LENGTH)
            first = rng.randrange(page.offset, at + 1)
            last = rng.randrange(at + 1, page.offset + LENGTH + 1)
            flip(fd, at)
            with pytest.raises(BlockCorruptError, match=block(1).filename):
                pieces.read(fd, block(1), page, first, last - first)
            flip(fd, at)
        assert pieces.read(fd, block(1), page, page.offset, 1) == DATA[LENGTH : LENGTH + 1] or not known
    # The neighbour of what is damaged is given, once the page as a whole was compared; never before.
    flip(fd, page.offset)
    assert pieces.read(fd, block(1), page, page.offset + PIECE_BYTES, 10)
    with pytest.raises(BlockCorruptError):
        PieceSums().read(fd, block(1), page, page.offset + PIECE_BYTES, 10)


def test_a_file_that_is_cut_off(fd: int) -> None:
    pieces, page = PieceSums(), PAGES[1]
    assert pieces.read(fd, block(1), page, page.offset, 10)
    os.ftruncate(fd, page.offset + PIECE_BYTES + 5)
    assert pieces.read(fd, block(1), page, page.offset, 10) == DATA[page.offset : page.offset + 10]
    for each in (pieces, PieceSums()):
        with pytest.raises(BlockCorruptError):
            each.read(fd, block(1), page, page.offset + PIECE_BYTES + 2, 10)


def test_a_page_with_another_checksum_is_another_page_and_few_are_remembered(fd: int) -> None:
    pieces = PieceSums(remembered=1)
    for page in PAGES + PAGES:
        assert pieces.read(fd, block(1), page, page.offset + 7, 3) == DATA[page.offset + 7 : page.offset + 10]
        with pytest.raises(BlockCorruptError):
            pieces.read(fd, block(1), page._replace(checksum=page.checksum ^ 1), page.offset, 1)
    assert len(pieces._known) == 1
