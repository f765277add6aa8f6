"""`--http` of real processes: a master, a worker and a mount that are watched while files are read."""

from __future__ import annotations

import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cachefs.cli.monitoring import shown_if_possible
from cachefs.fuse import probe
from cachefs.net import TcpAddress
from cachefs.testing.processes import Running, mountpoint_below, running

FILES = {f"{number:02}": bytes([number]) * (1000 + number) for number in range(8)}
HOST = "127.0.0.1"
FREE_PORT = f"{HOST}:0"


def get(process: Running, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{process.facts['http']}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metrics(process: Running) -> dict[str, float]:
    """By name and labels, as they are written."""
    return {
        each.name + "".join(f" {key}={value}" for key, value in sorted(each.labels.items())): each.value
        for family in text_string_to_metric_families(get(process, "/metrics")[1])
        for each in family.samples
    }


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
def test_every_process_shows_how_it_does(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, content in FILES.items():
        (data / name).write_bytes(content)
    http = ["--http", FREE_PORT, "--insecure"]
    own = ["--data-dir", tmp_path / "master", "--mount", f"/={data.as_uri()}", "--ufs-option", "settle=0"]
    with running("master", *own, "--listen", FREE_PORT, *http) as master, mountpoint_below(tmp_path) as mountpoint:
        where = ["--master", master.facts["listen"], *http]
        socket, tier = tmp_path / "socket", f"ssd:{tmp_path / 'tier'}:100M"
        own = ["--listen", FREE_PORT, "--socket", socket, "--tier", tier]
        with (
            running("worker", *own, *where) as worker,
            running("mount", mountpoint, "--worker-socket", socket, *where) as mount,
        ):
            for process in (master, worker, mount):
                assert get(process, "/readyz") == (200, "ready\n")
                assert get(process, "/healthz") == (200, "ok\n")
                assert get(process, "/")[0] == 404
            for name, content in FILES.items():
                assert (mountpoint / name).read_bytes() == content
            of_worker, of_mount = metrics(worker), metrics(mount)
            opens = [of_mount[f"cachefs_opens_total mode={mode}"] for mode in ("passthrough", "cached")]
            assert sum(opens) == len(FILES) == of_mount["cachefs_fuse_operation_seconds_count operation=open"]
            # What the kernel did not read by itself, it read through the mount, and that from the worker.
            if opens[0] == 0:
                assert of_mount["cachefs_mount_read_bytes_total"] == sum(map(len, FILES.values()))
            assert of_worker["cachefs_read_bytes_total source=under_store"] == sum(map(len, FILES.values()))
            assert of_mount["cachefs_metadata_misses_total"] > 0 < of_mount["cachefs_metadata_entries"]
            assert metrics(master)["cachefs_workers_connected"] == 1
            for process in (master, worker, mount):
                assert metrics(process)["process_resident_memory_bytes"] > 1 << 20

            master.end(signal.SIGKILL)
            for process, reason in ((worker, "not registered with the master"), (mount, "master does not answer")):
                deadline = time.monotonic() + 20
                while (answer := get(process, "/readyz"))[0] == 200 and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert answer[0] == 503 and reason in answer[1]
                assert get(process, "/healthz") == (200, "ok\n")
            for name, content in FILES.items():
                assert (mountpoint / name).read_bytes() == content


@pytest.mark.expect_warnings("it is told that nothing is shown")
async def test_a_server_that_takes_the_place_of_another_does_without_monitoring() -> None:
    """It is needed more than its numbers are."""
    with socket.create_server((HOST, 0)) as taken:
        address = TcpAddress(HOST, taken.getsockname()[1])
        async with shown_if_possible("mount", address) as shown:
            assert shown.monitor is None and shown.facts == {}
    async with shown_if_possible("mount", TcpAddress(HOST, 0)) as shown:
        assert shown.monitor is not None and shown.facts["http"].startswith(f"{HOST}:")
