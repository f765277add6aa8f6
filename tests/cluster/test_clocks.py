"""Clocks that jump: the time of day means nothing to leases, heartbeats and deadlines."""

from __future__ import annotations

import ast
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import cachefs
from cachefs.client import Client
from cachefs.testing.cluster import PAGE, running_cluster
from cachefs.testing.real_cluster import promoted, read_all

DAY_S = 24 * 3600.0
CONTENTS = {f"{number:02}": random.Random(number).randbytes(5_000 + number) for number in range(40)}
CONTENTS |= {f"large{number}": random.Random(number).randbytes(10 * PAGE + number) for number in range(2)}
MONOTONIC = ("net", "worker", "policy", "store", "wire", "client", "metrics")
"""Packages in which nobody asks what time of day it is."""
MASTERS = ("workers", "leases", "cluster", "writer", "watchers", "pins")
"""Modules of the master of which the same is true."""


def test_no_lease_heartbeat_or_deadline_looks_at_the_time_of_day() -> None:
    package = Path(cachefs.__file__).parent
    looked = [path for name in MONOTONIC for path in (package / name).glob("*.py")]
    looked += [package / "master" / f"{name}.py" for name in MASTERS]
    asked = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in looked
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("time_ns", "datetime", "gmtime", "localtime"))
        or (isinstance(node, ast.Attribute) and node.attr == "time" and ast.unparse(node.value) == "time")
        or (isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime") and _of_day(node))
    ]
    assert len(looked) > 50 and asked == []


def _of_day(node: ast.ImportFrom) -> bool:
    return any(each.name not in ("perf_counter", "monotonic", "perf_counter_ns", "monotonic_ns") for each in node.names)


class Clock:
    """What time of day this process believes it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.off_s = 0.0
        real, real_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: real() + self.off_s)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(self.off_s * 1e9))


async def test_clocks_that_jump_by_a_day_while_workers_fetch_and_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is thought dead, no lease moves, nothing is fetched twice."""
    clock = Clock(monkeypatch)
    (tmp_path / "data").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "data" / name).write_bytes(content)
    names = ["second", "third"]
    with trio.fail_after(300):
        async with running_cluster(
            tmp_path, (tmp_path / "data").as_uri(), ufs_options={"settle": "0"}, worker={"files_ahead": 0}
        ) as cluster:
            sockets = [cluster.worker_config.socket, *[(await cluster.add_worker(name)).socket for name in names]]
            async with cluster.client() as first, cluster.client(worker_socket=sockets[1]) as second:
                third = cluster.client(worker_socket=sockets[2])
                epochs = {each.name: each.epoch for each in (await first.master_status()).workers}
                assert len(epochs) == 3
                while (await cluster.monitors["worker"].answer("/readyz") or (0,))[0] != 200:
                    await trio.sleep(0.01)

                async def read(client: Client, order: Iterator[str]) -> None:
                    for name in order:
                        clock.off_s = random.Random(name).choice([-DAY_S, 0.0, DAY_S])
                        assert await promoted(client, f"/{name}") == CONTENTS[name]

                async with trio.open_nursery() as nursery:
                    for client, seed in ((first, 1), (second, 2)):
                        nursery.start_soon(
                            read, client, iter(random.Random(seed).sample(sorted(CONTENTS), len(CONTENTS)))
                        )
                for off_s in (DAY_S, -DAY_S):
                    clock.off_s = off_s
                    # Longer than the master looks for the dead, and than workers report.
                    await trio.sleep(1.2)
                    told = (await first.master_status()).workers
                    assert all(each.connected and 0 <= each.heard_s < DAY_S / 2 for each in told)
                    assert {each.name: each.epoch for each in told} == epochs
                async with third as late:
                    for name, content in CONTENTS.items():
                        assert await promoted(late, f"/{name}") == content
                        assert await read_all(first, f"/{name}") == content
                counters = [(await cluster.worker_status(name)).counters for name in ("worker", *names)]
                assert sum(each.under_store_bytes for each in counters) == sum(map(len, CONTENTS.values()))
                assert sum(each.leases for each in counters) <= len(CONTENTS)
                assert sum(each.peer_failures + each.corrupt for each in counters) == 0
