"""What stays free for others on the disk of a tier, as a person writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.model import ConfigError, GiB
from cachefs.store import KeepFree, parse_keep_free


@pytest.mark.parametrize(
    ("text", "meant"),
    [("20G", KeepFree(20 * GiB)), ("0", KeepFree(0)), ("1%", KeepFree(percent=1)), ("90%", KeepFree(percent=90))],
)
def test_a_size_or_a_part(text: str, meant: KeepFree) -> None:
    assert parse_keep_free("--keep-free", text) == meant
    assert parse_keep_free("--keep-free", str(meant)) == meant


@pytest.mark.parametrize("text", ["", "%", "0%", "91%", "1.5%", "-1%", "ten%", "²%", "lots", "-1"])
def test_what_is_neither_is_named_with_what_is_accepted(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_keep_free("--keep-free", text)
    assert (raised.value.key, raised.value.value) == ("--keep-free", text)
    assert "from 1% to 90%" in raised.value.accepted


def test_a_part_is_one_of_the_file_system_though_the_directory_is_not_there_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    tenth = status.f_blocks * status.f_frsize // 10
    for path in (tmp_path, tmp_path / "not" / "yet"):
        assert abs(KeepFree(percent=10).on_disk_of(str(path)) - tenth) <= 1
    assert KeepFree(7).on_disk_of("/nowhere") == 7
