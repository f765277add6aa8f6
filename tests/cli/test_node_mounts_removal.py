"""Mounts of a node that nobody serves: their servers died, and no other comes up. The service takes them away all the
same, and a keeper ends at once, whoever started it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs.fuse import is_mounted, probe
from cachefs.fuse.keeping import ask
from cachefs.model import NamespaceError, UnavailableError
from cachefs.testing.node import Node, node_of, until
from cachefs.testing.processes import mountpoint_below, running
from cachefs.testing.survivors import pid_of, wait_for

pytestmark = pytest.mark.skipif(not probe().can_mount or os.geteuid() != 0, reason="needs root and /dev/fuse")

CONTENT = b"content" * 1000
LIMIT_S = 60.0
AT_ONCE_S = 20.0
"""On a busy machine. Less than the service waits for a keeper that does not end."""


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("shared")
    (directory / "data").mkdir()
    (directory / "data/file").write_bytes(CONTENT)
    with mountpoint_below(directory) as mountpoint:
        arguments = [(directory / "data").as_uri(), mountpoint, "--state-dir", directory / "state"]
        with running("up", *arguments, "--tier", f"ssd:{directory / 'tier'}:64M") as process:
            yield process.facts["master"]


@pytest.fixture
def node(tmp_path: Path, master: str) -> Iterator[Node]:
    with node_of(tmp_path / "node", "--master", master, "--insecure") as it:
        it.start_keeper()
        yield it


def without_server(node: Node, mountpoint: Path) -> None:
    """It is mounted, and only its keeper is there."""
    service = node.start_mounts()
    assert node.ensure(mountpoint).state == "serving"
    service.kill()
    service.wait()
    while (pid := pid_of("mount-server", mountpoint)) is not None:
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    assert is_mounted(mountpoint) and pid_of("mount-keeper", mountpoint) is not None


def no_server_comes_up(node: Node) -> None:
    """As long as this service runs: the process is away that knows where the keeper of a mountpoint listens."""
    assert node.keeper is not None
    node.keeper.kill()
    node.keeper.wait()
    node.start_mounts()


def nothing_is_left(node: Node, mountpoint: Path) -> None:
    assert not is_mounted(mountpoint)
    assert node.states() == {} and list(node.state_dir.iterdir()) == []
    assert pid_of("mount-server", mountpoint) is None
    until(lambda: pid_of("mount-keeper", mountpoint) is None, "the end of the keeper")
    assert mountpoint.stat().st_mode & 0o777 == 0o755


def test_a_mount_whose_servers_do_not_come_up_is_removed(node: Node, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    without_server(node, mountpoint)
    no_server_comes_up(node)
    until(lambda: "no keeper answers" in node.states()[str(mountpoint)].why)
    node.remove(mountpoint)
    nothing_is_left(node, mountpoint)


def test_a_mount_that_is_not_served_as_its_options_are_refused_is_removed(node: Node, tmp_path: Path) -> None:
    """As a service of another version may find it."""
    mountpoint = tmp_path / "mnt"
    without_server(node, mountpoint)
    (record,) = node.state_dir.iterdir()
    record.write_text(json.dumps({**json.loads(record.read_text()), "options": {"of-later": "1"}}))
    node.start_mounts()
    state = node.states()[str(mountpoint)]
    assert state.state == "dead" and "of-later" in state.why
    began = time.monotonic()
    node.remove(mountpoint)
    assert time.monotonic() - began < AT_ONCE_S
    nothing_is_left(node, mountpoint)


def test_a_mount_that_somebody_waits_for_stays_until_it_answers(node: Node, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    without_server(node, mountpoint)
    no_server_comes_up(node)
    with subprocess.Popen(["cat", mountpoint / "file"], stdout=subprocess.PIPE) as reader:
        try:
            with pytest.raises(NamespaceError, match="files on it are open"):
                node.remove(mountpoint)
            assert is_mounted(mountpoint) and str(mountpoint) in node.states()
            node.start_keeper()
            assert reader.communicate(timeout=LIMIT_S)[0] == CONTENT
        finally:
            reader.kill()
    until(lambda: node.is_serving(mountpoint))
    node.remove(mountpoint)
    nothing_is_left(node, mountpoint)


def test_a_keeper_that_takes_long_to_end_is_not_met_by_the_next_server(node: Node, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    node.start_mounts()
    node.ensure(mountpoint)
    keeper = wait_for("mount-keeper", mountpoint)
    os.kill(keeper, signal.SIGSTOP)
    # Longer than the service waits for an answer of it.
    going_on = threading.Timer(6.0, os.kill, (keeper, signal.SIGCONT))
    going_on.start()
    try:
        node.remove(mountpoint)
        assert going_on.finished.is_set() and pid_of("mount-keeper", mountpoint) is None
        assert node.ensure(mountpoint).state == "serving"
    finally:
        going_on.cancel()
    assert (mountpoint / "file").read_bytes() == CONTENT
    assert "unmounted by somebody" not in node.log.read_text()
    node.remove(mountpoint)
    nothing_is_left(node, mountpoint)


@pytest.mark.parametrize("when", ["it never was mounted", "it was mounted"])
def test_a_keeper_from_before_the_node_keeper_was_started_again_ends_at_once(
    node: Node, tmp_path: Path, when: str
) -> None:
    mountpoint = tmp_path / "mnt"
    if when == "it was mounted":
        without_server(node, mountpoint)
    else:
        mountpoint.mkdir()
        node.watch(mountpoint)
        ask(str(node.keeper_socket), f"keep\0{mountpoint}\0absent=60")
    wait_for("mount-keeper", mountpoint)
    assert node.keeper is not None
    node.keeper.kill()
    node.keeper.wait()
    node.start_keeper()
    if when == "it was mounted":
        (record,) = node.state_dir.iterdir()
        record.write_text(json.dumps({**json.loads(record.read_text()), "options": {"of-later": "1"}}))
        node.start_mounts()
        began = time.monotonic()
        node.remove(mountpoint)
    else:
        node.start_mounts()
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="/nothing: no such file"):
            node.ensure(mountpoint, "/nothing/there")
    assert time.monotonic() - began < AT_ONCE_S
    nothing_is_left(node, mountpoint)
