"""A short run of the chaos runner, and that it sees what it must."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from cachefs.fuse import probe
from tests.chaos.contents import Check, content
from tests.chaos.history import History, Judge
from tests.chaos.plan import KINDS, plan
from tests.chaos.reader import Try
from tests.chaos.scene import REPOSITORY

NAMES = [kind.name for kind in KINDS]


@pytest.mark.skipif(os.geteuid() != 0 or not probe().can_mount, reason="needs root and /dev/fuse")
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="mkfs.ext4 is missing (package e2fsprogs)")
def test_a_short_run_survives_every_kind_of_fault() -> None:
    command = ["-m", "tests.chaos", "--minutes", "0.25", "--pace", "0.5", "--seed", "1", "--json"]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["good"], "\n".join([*outcome["shown"], done.stderr])
    assert done.returncode == 0
    planned = {event.kind for event in plan(1, 15, outcome["kinds"], 0.5)}
    # There may be no files to flip bits of.
    assert planned - outcome["survived"].keys() <= {"bits-of-sealed"} and len(planned) > 15, outcome
    assert min(outcome["tries"][how] for how in ("read", "pread", "held", "mmap", "list", "stat")) > 0
    assert outcome["bytes_verified"] > 0 and outcome["healed_s"] is not None


def test_wrong_arguments() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--only", "kill-everybody"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "'kill-everybody' is no kind; expected one of latency, " in done.stderr


def test_the_seed_decides_what_happens_when() -> None:
    events = plan(7, 600, NAMES, 1.5)
    assert events == plan(7, 600, NAMES, 1.5) != plan(8, 600, NAMES, 1.5)
    assert {event.kind for event in events} == set(NAMES)
    assert {event.kind for event in plan(7, 600, ["replace", "outage"], 1.5)} == {"replace", "outage"}
    assert all(event.at_s < 540 and event.lasts_s <= 16 for event in events)
    assert all(event.lasts_s <= 2 for event in plan(7, 24, NAMES, 0.5))


def test_what_may_not_coincide_comes_one_after_the_other() -> None:
    events = plan(3, 600, NAMES, 0.5)
    for number, event in enumerate(events):
        for later in events[number + 1 :]:
            if set(event.holds) & set(later.holds):
                assert later.at_s >= event.at_s + event.lasts_s, (event, later)


class TestCheck:
    old, new = content("name", 1, 3 * 4096 + 100), content("name", 2, 3 * 4096 + 100)

    def test_right_ones(self) -> None:
        assert Check("name")(self.old, 0) is None
        assert Check("name")(self.old[4096:], 4096) is None
        assert len(self.old) == 3 * 4096 + 100 and Check("name")(b"", 0) is None

    @pytest.mark.parametrize(
        ("data", "offset", "wrong"),
        [
            (old[:8192] + new[8192:], 0, "version 2 after version 1"),
            (old[4096:8192], 0, "bytes of offset 4096"),
            (old[:4096] + bytes(4096) + old[8192:], 0, "not of this object"),
            (content("other", 1, 4096), 0, "not of this object"),
            (old[:5000] + b"!" + old[5001:], 0, "damaged or cut"),
            (old[:-50], 0, "damaged or cut"),
            (old[:-90], 0, "damaged or cut"),
        ],
    )
    def test_wrong_ones(self, data: bytes, offset: int, wrong: str) -> None:
        problem = Check("name")(data, offset)
        assert problem is not None and wrong in problem

    def test_versions_are_told_apart_over_several_reads_of_one_open(self) -> None:
        check = Check("name")
        assert check(self.old[:4096], 0) is None
        assert "version 2 after version 1" in (check(self.new[4096:8192], 4096) or "")


class TestJudge:
    """A file is replaced at 100 and deleted at 200; for 10 s readers need not know."""

    def judge(self) -> Judge:
        history = History(stale_s=10, grace_s=5)
        for size, at in ((1000, 0.0), (2000, 100.0)):
            history.put("s/1", size, at, math.inf)
            history.put("s/1", size, at, at + 1)
        history.delete("s/1", 200.0, math.inf)
        history.delete("s/1", 200.0, 201.0)
        return Judge(history, patience_s=4)

    def kind(self, judge: Judge, at: float, took: float = 0.1, how: str = "read", **what: object) -> str | None:
        one = Try(how, "s" if how == "list" else "s/1", at, at + took, **what)  # type: ignore[arg-type]
        found = judge.finding(one, "mount-a")
        return found[0] if found else None

    def test_versions(self) -> None:
        judge = self.judge()
        for at, version, kind in (
            *((50, 1, None), (100, 1, None), (100.5, 2, None), (110, 1, None), (112, 1, "stale")),
            *((99, 2, "stale"), (210, 2, None), (212, 2, "stale"), (150, 3, "wrong bytes")),
        ):
            assert self.kind(judge, at, version=version, size=1000 * version) == kind, (at, version)
        assert self.kind(judge, 150, version=2, size=1000) == "wrong bytes"
        assert self.kind(judge, 150, wrong="mixed") == "wrong bytes"
        assert self.kind(judge, 150, how="stat", size=2000) is None
        assert self.kind(judge, 150, how="stat", size=1000) == "stale"

    def test_names(self) -> None:
        judge = self.judge()
        for at, names, kind in ((50, ["1"], None), (150, [], "stale"), (205, ["1"], None), (205, [], None)):
            assert self.kind(judge, at, how="list", names=names) == kind, (at, names)
        assert self.kind(judge, 215, how="list", names=["1"]) == "stale"
        assert self.kind(judge, 50, how="list", names=["1", "never"]) == "stale"

    def test_errors(self) -> None:
        judge = self.judge()
        for at, error, kind in (
            *((150, "ENOENT", "error"), (205, "ENOENT", None), (300, "ENOENT", None), (50, "ENOENT", "error")),
            *((50, "ESTALE", "error"), (105, "ESTALE", None), (150, "ESTALE", "error")),
            *((105, "EIO", "error"), (105, "SIGBUS", None), (150, "SIGBUS", "error"), (150, "ENOTCONN", "error")),
        ):
            assert self.kind(judge, at, error=error) == kind, (at, error)
        # What was opened before the change, and is read after it.
        assert self.kind(judge, 99, took=50, error="ESTALE") is None

    def test_a_disturbance_makes_up_for_what_it_hides(self) -> None:
        judge = self.judge()
        judge.history.begin("stale", 101.0).ended = 130.0
        assert self.kind(judge, 140, version=1, size=1000) is None
        assert self.kind(judge, 146, version=1, size=1000) == "stale"

    def test_eio_needs_a_store_that_was_away_for_long_or_a_disk_that_fails(self) -> None:
        judge = self.judge()
        outage = judge.history.begin("supply", 50.0)
        assert self.kind(judge, 49, took=2, error="EIO") == "error"
        assert self.kind(judge, 49, took=6, error="EIO") is None
        outage.ended = 52.0
        assert self.kind(judge, 49, took=6, error="EIO") == "error"
        judge.history.begin("disk", 60.0, "mount-b")
        assert self.kind(judge, 61, error="EIO") == "error"
        judge.history.begin("disk", 60.0, "mount-a")
        assert self.kind(judge, 61, error="EIO") is None
