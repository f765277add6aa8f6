"""What a container may take of memory, by either version of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachefs.cli.memory_limit import check_memory_tiers, memory_limit
from cachefs.model import ConfigError, GiB, MiB
from cachefs.store import TierConfig


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_the_lowest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    put(tmp_path / "pods" / "one" / "memory.max", "max")
    put(tmp_path / "pods" / "memory.max", str(4 * GiB))
    assert memory_limit("0::/pods/one\n", tmp_path) == 4 * GiB
    assert memory_limit("0::/elsewhere\n", tmp_path) is None


def test_of_version_1_which_says_no_limit_by_a_number(tmp_path: Path) -> None:
    put(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712")
    put(tmp_path / "memory" / "a" / "memory.limit_in_bytes", str(GiB))
    groups = "5:cpu:/a\n4:memory:/a\n0::/\n"
    assert memory_limit(groups, tmp_path) == GiB
    assert memory_limit("4:memory:/\n", tmp_path) is None


def test_in_a_container_the_root_is_its_own_group(tmp_path: Path) -> None:
    put(tmp_path / "memory" / "memory.limit_in_bytes", str(2 * GiB))
    assert memory_limit("4:memory:/docker/0123\n", tmp_path) == 2 * GiB


def test_this_process_has_one_or_none() -> None:
    limit = memory_limit()
    assert limit is None or limit > 0


def test_tiers_in_memory_that_do_not_fit_are_refused_and_others_are_not() -> None:
    in_memory, on_disk = TierConfig("mem", "/dev/shm/x", GiB), TierConfig("ssd", "/cache", 100 * GiB)
    check_memory_tiers([in_memory, on_disk], None)
    check_memory_tiers([in_memory, on_disk], GiB + 512 * MiB)
    check_memory_tiers([on_disk], 64 * MiB)
    with pytest.raises(ConfigError, match=r"--tier.*mem:/dev/shm/x:1.0 GiB.*up to 512.0 MiB together.*is 1.0 GiB"):
        check_memory_tiers([in_memory, on_disk], GiB)
