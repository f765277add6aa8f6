"""Page arithmetic, ids and units."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import (
    BlockId,
    ConfigError,
    ContentKey,
    Geometry,
    content_key,
    format_size,
    parse_duration,
    parse_size,
)

GEOMETRIES = st.builds(lambda page, pages: Geometry(page * pages, page), st.integers(1, 50), st.integers(1, 20))


@given(GEOMETRIES, st.integers(0, 5000), st.integers(0, 6000), st.integers(0, 6000))
def test_slices_cover_exactly_the_range(geometry: Geometry, size: int, offset: int, length: int) -> None:
    covered = [
        part.block_index * geometry.block_size + part.offset + at
        for part in geometry.split(size, offset, length)
        for at in range(part.length)
    ]
    assert covered == list(range(offset, max(offset, min(size, offset + length))))


@given(GEOMETRIES, st.integers(0, 5000))
def test_blocks_and_pages_add_up(geometry: Geometry, size: int) -> None:
    lengths = [geometry.block_length(size, index) for index in range(geometry.block_count(size))]
    assert sum(lengths) == size
    for length in lengths:
        spans = [geometry.page_span(length, page) for page in range(geometry.page_count(length))]
        assert sum(span for _, span in spans) == length
        assert list(geometry.pages_covering(0, length)) == list(range(len(spans)))


@given(st.binary(min_size=16, max_size=16), st.integers(0, 10**6))
def test_block_file_names_go_both_ways(key: bytes, index: int) -> None:
    block = BlockId(ContentKey(key), index)
    assert BlockId.from_filename(block.filename) == block


@pytest.mark.parametrize(
    "name", ["", "x", "-0", "a" * 32, "a" * 32 + "-", "a" * 32 + "-01", "A" * 32 + "-1", "ü" * 32 + "-1"]
)
def test_other_file_names_are_no_blocks(name: str) -> None:
    assert BlockId.from_filename(name) is None


def test_the_content_key_is_a_format() -> None:
    """Two caches must agree on it, and a cache with its own past: a change here makes every cached file a miss."""
    assert content_key("https://s3/bucket/key", "etag", 5).hex() == "b293bba2c23324b85171d2860d929208"


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("4096", 4096), ("8M", 8 << 20), ("1.5GiB", 3 << 29), ("2tb", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--size", text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1X", "1.5.5G", "1 000"])
def test_wrong_sizes_name_the_key_and_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--size: .*expected a size such as"):
        parse_size("--size", text)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("500ms", 0.5), ("2h", 7200), ("1d", 86400), ("1.5m", 90)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--ttl", text) == seconds


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (5, 2048, 5 << 20, 3 << 40)] == ["5 B", "2.0 KiB", "5.0 MiB", "3.0 TiB"]
