"""The directories of a tier."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cachefs.store.layout import create, move, open_layout


def tree(tier: Path) -> set[str]:
    return {str(path.relative_to(tier)) for path in tier.rglob("*")}


def test_directories_are_made_where_something_goes(tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    with open_layout(str(tier), "cluster") as layout:
        assert tree(tier) == {"sealed", "partial", "suspect", "staging"}
        for name in ("00/a", "00/b", "ff/c"):
            os.close(create(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, layout.partial_fd))
        move("00/a", layout.partial_fd, layout.sealed_fd)
        assert tree(tier / "partial") == {"00", "00/b", "ff", "ff/c"} and tree(tier / "sealed") == {"00", "00/a"}
        with pytest.raises(FileExistsError):
            create("00/b", os.O_WRONLY | os.O_CREAT | os.O_EXCL, layout.partial_fd)
        with pytest.raises(FileNotFoundError):
            move("01/none", layout.partial_fd, layout.suspect_fd)
    with open_layout(str(tier), "cluster") as layout:
        move("ff/c", layout.partial_fd, layout.sealed_fd)
    assert tree(tier / "sealed") == {"00", "00/a", "ff", "ff/c"}
