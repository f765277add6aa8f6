"""`cachefs load` as a job, `job`, `replicate`, `free --everywhere`, `worker`: on real processes, without a mount."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from cachefs.cli import following, main
from cachefs.client import Client
from cachefs.testing.processes import Running, running
from cachefs.wire.control import JobInfo, JobSpec

DATA = {f"d/{number:02}": random.Random(number).randbytes(20_000 + number) for number in range(12)}
TOTAL = sum(map(len, DATA.values()))


@contextmanager
def cluster(directory: Path, *names: str) -> Iterator[Running]:
    for name, content in DATA.items():
        path = directory / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    environment = {"CACHEFS_UFS_OPTIONS": json.dumps({"settle": "0"})}
    listen = ("--listen", "127.0.0.1:0")
    with ExitStack() as stack:
        mount = f"/={(directory / 'data').as_uri()}"
        arguments = ["--data-dir", directory / "master", "--mount", mount, "--page-size", "64K", *listen, "--insecure"]
        master = stack.enter_context(running("master", *arguments, environment=environment))
        for name in names:
            place = ("--socket", directory / f"{name}.sock", "--tier", f"ssd:{directory / name}:64M")
            join = ("--name", name, "--master", master.facts["listen"])
            stack.enter_context(running("worker", *join, *listen, *place, "--insecure"))
        yield master


def asked(master: Running, *arguments: str, status: int = 0) -> Any:
    done = told(master, *arguments, "--json")
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def told(master: Running, *arguments: str) -> Result:
    """In this process: what it talks to are others."""
    return CliRunner().invoke(main, [*arguments, "--master", master.facts["listen"], "--insecure"])


def test_whoever_interrupts_while_a_job_begins_is_told_which_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_job = Client.start_job

    async def answered_after_the_interrupt(client: Client, spec: JobSpec, *, dry_run: bool = False) -> JobInfo:
        info = await start_job(client, spec, dry_run=dry_run)
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep(0.2)
        return info

    monkeypatch.setattr(Client, "start_job", answered_after_the_interrupt)
    with cluster(tmp_path, "w1") as master:
        done = told(master, "load", "/d", "--on", "w1", "--limit", "10K/s")
        assert (done.exit_code, "job 1 goes on" in done.stderr) == (130, True), done.output
        assert [each["job_id"] for each in asked(master, "job", "list")] == [1]


def test_a_master_that_does_not_say_whether_a_job_began_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_answered(client: Client, spec: JobSpec, *, dry_run: bool = False) -> JobInfo:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(Client, "start_job", never_answered)
    monkeypatch.setattr(following, "_BEGIN_S", 0.2)
    with cluster(tmp_path, "w1") as master:
        done = told(master, "load", "/d", "--on", "w1")
        assert (done.exit_code, "`cachefs job list` tells" in done.stderr) == (130, True), done.output


def test_data_is_loaded_replicated_moved_and_freed_by_jobs(tmp_path: Path) -> None:
    with cluster(tmp_path, "w1", "w2") as master:
        loaded = asked(master, "load", "/d", "--on", "w1")
        assert (loaded["state"], loaded["copies"], loaded["copied_bytes"]) == ("done", len(DATA), TOTAL)
        # Slower than anybody waits: interrupted, it goes on.
        slow = [sys.executable, "-m", "cachefs", "replicate", "/d", "--replicas", "2", "--limit", "1K/s"]
        slow += ["--master", master.facts["listen"], "--insecure"]
        process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(asked(master, "job", "list")) < 2:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, "job 2 goes on" in errors) == (130, True)
        assert asked(master, "job", "show", "2")["state"] == "running"
        assert asked(master, "job", "cancel", "2")["state"] == "cancelled"
        assert [each["state"] for each in asked(master, "job", "list")] == ["done", "cancelled"]

        drained = asked(master, "worker", "drain", "w1")
        assert (drained["state"], drained["failed"]) == ("done", 0)
        states = {each["name"]: (each["state"], each["alive"]) for each in asked(master, "worker", "list")}
        assert states == {"w1": ("drained", True), "w2": ("active", True)}
        assert asked(master, "worker", "undrain", "w1") == {"name": "w1", "state": "active"}

        would = asked(master, "free", "/d", "--everywhere", "--dry-run")
        freed = asked(master, "free", "/d", "--everywhere")
        assert would["drops"] == freed["drops"] >= len(DATA)
        assert sorted(path.name for path in (tmp_path / "data/d").iterdir()) == sorted(name[2:] for name in DATA)
        assert "w1" in told(master, "worker", "list").stdout
        assert "load /d, on w1" in told(master, "job", "show", "1").stdout
        assert "cancelled" in told(master, "job", "list").stdout
        refused = told(master, "load", "--on", "w9")
        assert (refused.exit_code, "w9" in refused.stderr) == (1, True)
        assert "one of w1, w2" in refused.stderr
