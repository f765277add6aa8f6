"""The driver as a process: its socket, its end, what it shows to monitoring, what it says and does not say."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest


def test_the_socket_is_its_owners_and_goes_with_it(rig: Any) -> None:
    status = os.stat(rig.controller.socket)
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    assert rig.controller.end() == 0
    assert not rig.controller.socket.exists()
    rig.controller.start()


def test_a_socket_that_was_left_is_replaced_and_one_in_use_is_not(rig: Any) -> None:
    rig.controller.kill_and_start()
    assert rig.controller.call("Probe").ready.value
    done = run("controller", "--endpoint", f"unix://{rig.controller.socket}", "--master", rig.master, "--insecure")
    assert done.returncode == 1 and "no other driver listens" in done.stderr and "Traceback" not in done.stderr
    assert rig.controller.call("Probe").ready.value


def test_a_call_that_runs_when_it_ends_is_finished(rig: Any, pods: Any) -> None:
    fields = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER}
    call = rig.node.future("NodeStageVolume", **fields, volume_context=pods.context)
    while not rig.mounted(Path(pods.staging)) and not call.done():
        pass
    rig.node.process.send_signal(15)
    try:
        call.result()
        assert rig.node.process.wait(60) == 0
    finally:
        rig.node.end()
        rig.node.start()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--endpoint", "127.0.0.1:1"], "--endpoint"),
        (["--endpoint", "unix:///no/such/directory/s"], "--endpoint"),
        (["--driver-name", "a b"], "--driver-name"),
        (["--master", "10.0.0.1:1"], "loopback"),
    ],
)
def test_wrong_settings_are_told_in_one_line(tmp_path: Path, flags: list[str], part: str) -> None:
    given = ["--endpoint", f"unix://{tmp_path / 's'}", "--master", "127.0.0.1:1", "--insecure"]
    done = run("controller", *given, *flags)
    assert done.returncode != 0 and part in done.stderr and "Traceback" not in done.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cachefs_csi.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_calls_are_counted_by_method_and_code(rig: Any) -> None:
    rig.controller.call("Probe")
    rig.controller.refused("DeleteVolume")
    with urllib.request.urlopen(f"http://{rig.controller.facts['http']}/metrics") as answer:
        text = answer.read().decode()
    assert 'cachefs_csi_calls_total{code="OK",method="Probe"}' in text
    assert 'cachefs_csi_calls_total{code="INVALID_ARGUMENT",method="DeleteVolume"} ' in text
    assert 'cachefs_csi_call_seconds_count{method="Probe"}' in text
    with urllib.request.urlopen(f"http://{rig.controller.facts['http']}/readyz") as answer:
        assert answer.status == 200


def test_secrets_are_in_no_log_and_no_answer(rig: Any) -> None:
    secret = "s3cr3t-in-the-options"
    asked = {
        "name": "secretive",
        "volume_capabilities": [rig.READER],
        "parameters": {"url": f"nosuch://{secret}:{secret}@host/", "ufs.secret": secret},
        "secrets": {"secret_access_key": secret},
    }
    code, message = rig.controller.refused("CreateVolume", **asked)
    assert code != "OK" and secret not in message
    log = rig.controller.log()
    assert secret not in log and "secrets=***" in log and "method=CreateVolume" in log
