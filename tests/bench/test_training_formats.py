"""Samples packed into shards: what is written is read, by us and by others, and damage is seen."""

from __future__ import annotations

import io
import struct
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.training.crc32c import LANES, POLYNOMIAL, SHORT, crc32c
from bench.training.formats import read_tar, read_tfrecord, tar_size, tfrecord_size, write_tar, write_tfrecord

CONTENTS = st.lists(st.binary(max_size=2000), max_size=6)


def named(contents: list[bytes]) -> list[tuple[str, bytes]]:
    return [(f"{number:05}.jpg", content) for number, content in enumerate(contents)]


def bit_by_bit(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (POLYNOMIAL if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
    ids=["nothing", "digits", "zeros", "ones"],
)
def test_checksums_are_those_of_rfc_3720(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [SHORT - 1, SHORT, SHORT + 1, 7 * LANES - 1, 7 * LANES, 9 * LANES + 5])
def test_lanes_come_to_the_same_as_bits(size: int) -> None:
    data = bytes(place * place % 251 for place in range(size))
    assert crc32c(data) == bit_by_bit(data)


@given(CONTENTS)
def test_tar_is_read_as_it_was_written(contents: list[bytes]) -> None:
    written = write_tar(named(contents))
    assert list(read_tar(io.BytesIO(written))) == contents
    assert len(written) == tar_size(map(len, contents))


@given(CONTENTS)
def test_the_standard_library_reads_our_tar_and_we_read_its(contents: list[bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(write_tar(named(contents)))) as ours:
        assert [(each.name, ours.extractfile(each).read()) for each in ours] == named(contents)  # type: ignore[union-attr]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as theirs:
            directory = tarfile.TarInfo("directory")
            directory.type = tarfile.DIRTYPE
            theirs.addfile(directory)
            for name, content in named(contents):
                member = tarfile.TarInfo(f"directory/{name}")
                member.size = len(content)
                theirs.addfile(member, io.BytesIO(content))
        assert list(read_tar(io.BytesIO(file.getvalue()))) == contents


def test_a_damaged_or_cut_tar_is_refused() -> None:
    written = write_tar(named([b"one" * 300, b"two" * 300]))
    damaged = bytearray(written)
    damaged[124] ^= 1
    for wrong in (bytes(damaged), written[:700], written[:512]):
        with pytest.raises(ValueError, match=r"tar file|ends in the middle"):
            list(read_tar(io.BytesIO(wrong)))
    with pytest.raises(ValueError, match="at most 99"):
        write_tar([("n" * 100, b"")])


@given(CONTENTS)
def test_tfrecord_is_read_as_it_was_written(contents: list[bytes]) -> None:
    written = write_tfrecord(contents)
    assert list(read_tfrecord(io.BytesIO(written), check=True)) == contents
    assert len(written) == tfrecord_size(map(len, contents))


def test_a_tfrecord_file_has_the_bytes_that_tensorflow_writes() -> None:
    """A record of three bytes: length, its masked checksum, record, its masked checksum."""
    length, record = struct.pack("<Q", 3), b"abc"
    masks = [
        (((crc := bit_by_bit(part)) >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")
        for part in (length, record)
    ]
    assert write_tfrecord([record]) == length + masks[0] + record + masks[1]


def test_a_damaged_or_cut_tfrecord_file_is_refused() -> None:
    written = write_tfrecord([b"one" * 30, b"two" * 30])
    for place, check in ((0, False), (9, False), (20, True), (103, True)):
        damaged = bytearray(written)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match="does not match its checksum"):
            list(read_tfrecord(io.BytesIO(damaged), check=check))
    for size in (3, 10, 50, 103):
        with pytest.raises(ValueError, match=r"checksum|ends in the middle"):
            list(read_tfrecord(io.BytesIO(written[:size])))
