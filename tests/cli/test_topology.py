"""Labels, the address a worker is reached at, and a mount that names a worker of another host: the real commands."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cachefs.cli import services
from cachefs.cli.main import main
from cachefs.cli.params import collect_labels
from cachefs.fuse import probe
from cachefs.model import ConfigError
from cachefs.testing.processes import mountpoint_below, running

CONTENT = os.urandom(300_000)


def cachefs(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "cachefs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "0.0.0.0:7001"], "--advertise: 'not given' is not accepted; expected HOST:PORT at which others"),
        (["--listen", "[::]:7001"], "--listen [::]:7001 names every address"),
        (["--advertise", "0.0.0.0:7001"], "that others can connect to"),
        (["--advertise", "node7:0"], "a port above 0"),
        (["--advertise", "/run/w.sock"], "HOST:PORT"),
        (["--label", "Rack=7"], "NAME=VALUE with a name"),
        (["--label", "rack=1", "--label", "rack=2"], "one value for each name; rack is '1' already"),
    ],
)
def test_what_leads_nobody_to_a_worker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(services, "set_up_logging", lambda *_: None)
    tokens = str(tmp_path / "tokens.toml")
    assert CliRunner().invoke(main, ["token", "new", tokens]).exit_code == 0
    needed = ["--master", "127.0.0.1:1", "--socket", str(tmp_path / "w.sock"), "--tier", f"ssd:{tmp_path}/tier:1G"]
    listen = [] if "--listen" in flags else ["--listen", "127.0.0.1:0"]
    done = CliRunner().invoke(main, ["worker", *needed, *listen, "--tokens", tokens, *flags])
    assert done.exit_code != 0
    assert said in " ".join(done.output.replace("│", " ").split()), done.output


def test_the_host_is_a_label_by_itself() -> None:
    assert collect_labels([("rack", "r7")]) == {"host": platform.node(), "rack": "r7"}
    assert collect_labels([("host", "n1")]) == {"host": "n1"}
    with pytest.raises(ConfigError, match="host is 'n1' already"):
        collect_labels([("host", "n1"), ("host", "n2")])


@pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")
def test_a_mount_reads_through_the_worker_it_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_bytes(CONTENT)
    loopback = ["--listen", "127.0.0.1:0", "--insecure"]
    with (
        mountpoint_below(tmp_path) as mountpoint,
        running("master", "--data-dir", tmp_path / "master", "--mount", f"/={data.as_uri()}", *loopback) as master,
        running(
            *("worker", "--name", "w1", "--master", master.facts["listen"], "--socket", tmp_path / "w.sock"),
            *("--tier", f"ssd:{tmp_path}/tier:100M", "--label", "rack=r7", "--idle-after", "2h", *loopback),
        ) as worker,
        running(
            *("mount", mountpoint, "--master", master.facts["listen"], "--worker", worker.facts["listen"]),
            *("--label", "rack=r7", "--insecure"),
        ) as mount,
    ):
        assert (mount.facts["open_mode"], mount.facts["why"]) == ("cached", "the worker is on another host")
        assert f"over the network: worker w1 at {worker.facts['listen']}" in mount.facts["notes"]
        assert (mountpoint / "file").read_bytes() == CONTENT
        told = cachefs("report", "--json", "--master", master.facts["listen"])
        (info,) = json.loads(told)["workers"]
        assert info["labels"] == {"host": platform.node(), "rack": "r7"}
        assert info["status"]["counters"]["served_bytes"] >= len(CONTENT)
        asked = cachefs("doctor", "--json", CACHEFS_MASTER=master.facts["listen"], CACHEFS_INSECURE="true")
        (found,) = [each for each in json.loads(asked)["findings"] if each["what"] == "worker"]
        assert (found["level"], found["says"]) == ("ok", "a mount reads through worker w1 of this host")
        by_name: dict[str, Any] = {"CACHEFS_MASTER": master.facts["listen"], "CACHEFS_WORKER": worker.facts["listen"]}
        asked = cachefs("doctor", "--json", CACHEFS_INSECURE="true", **by_name)
        (found,) = [each for each in json.loads(asked)["findings"] if each["what"] == "worker"]
        assert found["level"] == "warning" and "over the network, without passthrough" in found["says"]
        assert mount.end() == 0
