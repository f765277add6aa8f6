"""The mounts of a node as a service: its processes are killed in every order while others read and compare."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cachefs.fuse import find_mount, is_mounted, probe
from cachefs.model import ConfigError, ExistsError, NamespaceError, UnavailableError
from cachefs.testing.node import Node, node_of, until
from cachefs.testing.processes import mountpoint_below, running
from cachefs.testing.survivors import Report, kill, make_source, pid_of, pids_of, reading, wait_for
from cachefs.wire.mounts import MountState

pytestmark = pytest.mark.skipif(not probe().can_mount or os.geteuid() != 0, reason="needs root and /dev/fuse")

COLD = 200
LIMIT_S = 60.0


class Shared(NamedTuple):
    source: Path
    master: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    source = directory / "source"
    make_source(source, COLD)
    with mountpoint_below(directory) as mountpoint:
        arguments = [source.as_uri(), mountpoint, "--state-dir", directory / "state", "--ufs-option", "settle=0"]
        with running("up", *arguments, "--tier", f"ssd:{directory / 'tier'}:1G", "--page-size", "64K") as process:
            yield Shared(source, process.facts["master"])


@pytest.fixture
def node(tmp_path: Path, shared: Shared) -> Iterator[Node]:
    """With its keepers, and without a service."""
    with node_of(tmp_path / "node", "--master", shared.master, "--insecure", "--open-wait", "512K") as it:
        it.start_keeper()
        yield it


def check(report: Report) -> None:
    assert report.errors == []
    assert {"held", "mapped", "large", "warm", "cold", "listing"} <= set(report.gaps)


def answers(mountpoint: Path) -> None:
    """A server is there: it opens what nobody has open."""
    done = subprocess.run(["cat", mountpoint / "warm/039"], capture_output=True, timeout=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_asked_for_is_mounted_once(node: Node, tmp_path: Path, shared: Shared) -> None:
    node.start_mounts()
    mountpoint = node.watch(tmp_path / "new/mnt")
    options = {"attr-timeout": "5s", "profile": "", "xattr": "", "umask": "022", "gid": "7"}
    del options["profile"]
    found = node.call(*[lambda mounts: mounts.ensure("vol", str(mountpoint), "/", options)] * 5)
    # All the same one.
    assert len({(each.server_pid, each.device) for each in found}) == 1
    (state,) = node.states().values()
    assert state == found[0] and (state.state, state.why, state.restarts) == ("serving", "", 0)
    assert state.server_pid == pid_of("mount-server", mountpoint)
    mounted = find_mount(mountpoint)
    assert mounted is not None and mounted.device == state.device
    assert (mountpoint / "warm/000").read_bytes() == (shared.source / "warm/000").read_bytes()
    assert (mountpoint / "warm/000").stat().st_gid == 7
    # Again it changes nothing.
    assert node.call(lambda mounts: mounts.ensure("vol", str(mountpoint), "/", options)) == [state]
    for other in (("vol", "/warm", options), ("vol", "/", {}), ("other", "/", options)):
        with pytest.raises(ExistsError, match="remove it first"):
            node.call(lambda mounts, other=other: mounts.ensure(other[0], str(mountpoint), other[1], other[2]))
    (record,) = node.state_dir.iterdir()
    assert record.stat().st_mode & 0o777 == 0o600 and json.loads(record.read_text())["mountpoint"] == str(mountpoint)
    # One that somebody uses stays.
    with open(mountpoint / "held/0", "rb"):
        with pytest.raises(NamespaceError, match="files on it are open"):
            node.remove(mountpoint)
        assert node.is_serving(mountpoint)
    node.call(*[lambda mounts: mounts.remove(str(mountpoint))] * 3)
    node.remove(mountpoint)
    nothing_is_left(node, mountpoint)
    assert mountpoint.stat().st_mode & 0o777 == 0o755


def nothing_is_left(node: Node, mountpoint: Path) -> None:
    assert not is_mounted(mountpoint)
    assert node.states() == {} and list(node.state_dir.iterdir()) == []
    assert pid_of("mount-server", mountpoint) is None
    until(lambda: pid_of("mount-keeper", mountpoint) is None, "the end of the keeper")


@pytest.mark.parametrize(
    ("mountpoint", "path", "options", "said"),
    [
        ("relative", "/", {}, "mountpoint"),
        ("/a/../b", "/", {}, "mountpoint"),
        ("/tmp/never", "warm", {}, "path"),
        ("/tmp/never", "/", {"master": "x:1"}, "one of profile, open-mode"),
        ("/tmp/never", "/", {"driver": "pyfuse3"}, "one of profile, open-mode"),
        ("/tmp/never", "/", {"http": "0.0.0.0:1"}, "one of profile, open-mode"),
        ("/tmp/never", "/", {"open-mode": "fast"}, "open-mode.*'cached'"),
        ("/tmp/never", "/", {"umask": "9"}, "umask"),
        ("/tmp/never", "/", {"gid": "-1"}, "gid.*4294967294"),
        ("/tmp/never", "/", {"max-read": "1"}, "max-read.*4096"),
        ("/tmp/never", "/", {"xattr": "maybe"}, "true or false"),
        ("/tmp/never", "/", {"attr-timeout": "5s --http 0.0.0.0:1"}, "attr-timeout"),
    ],
)
def test_what_will_not_do_is_named(
    mountpoint: str, path: str, options: dict[str, str], said: str, unused_service: Node
) -> None:
    with pytest.raises(ConfigError, match=said):
        unused_service.call(lambda mounts: mounts.ensure("vol", mountpoint, path, options))
    assert unused_service.states() == {} and not os.path.exists("/tmp/never")


@pytest.fixture(scope="module")
def unused_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with node_of(tmp_path_factory.mktemp("unused"), "--master", "127.0.0.1:1", "--insecure") as node:
        node.start_mounts()
        yield node


def test_a_server_that_never_comes_up_leaves_nothing(node: Node, tmp_path: Path, shared: Shared) -> None:
    node.start_mounts()
    mountpoint = tmp_path / "mnt"
    with pytest.raises(UnavailableError, match="/nothing: no such file"):
        node.ensure(mountpoint, "/nothing/there")
    nothing_is_left(node, mountpoint)
    # What is in the way is named, and stays.
    mountpoint.rmdir()
    mountpoint.write_text("a file")
    with pytest.raises(NamespaceError, match="cannot be mounted on"):
        node.ensure(mountpoint)
    assert mountpoint.read_text() == "a file"
    mountpoint.unlink()
    mountpoint.mkdir()
    (mountpoint / "entry").touch()
    with pytest.raises(UnavailableError, match="an empty directory"):
        node.ensure(mountpoint)
    (mountpoint / "entry").unlink()
    subprocess.run(["mount", "-t", "tmpfs", "theirs", mountpoint], check=True)
    try:
        with pytest.raises(ExistsError, match="tmpfs theirs is mounted there"):
            node.ensure(mountpoint)
    finally:
        subprocess.run(["umount", mountpoint], check=True)
    # And then it works.
    assert node.ensure(mountpoint).state == "serving"


@pytest.mark.expect_warnings
def test_every_process_is_killed_while_others_read(node: Node, tmp_path: Path, shared: Shared) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    service = node.start_mounts()
    node.ensure(one)
    node.ensure(two, gid="7")

    def serving() -> bool:
        return node.is_serving(one) and node.is_serving(two)

    def others_than(role: str, *before: int) -> None:
        for mountpoint, pid in zip((one, two), before, strict=True):
            wait_for(role, mountpoint, other_than=pid)

    with reading(one, shared.source, 1) as readers_of_one, reading(two, shared.source, 1) as readers_of_two:
        # A server.
        old = kill("mount-server", one)
        wait_for("mount-server", one, other_than=old)
        answers(one)
        until(serving)
        # A keeper: the node has another one.
        assert node.keeper is not None
        old = kill("mount-keeper", two)
        wait_for("mount-keeper", two, other_than=old)
        until(lambda: str(two) in node.kept())
        # The service, with what it does at the end left undone; its servers notice.
        servers = [wait_for("mount-server", each) for each in (one, two)]
        service.kill()
        service.wait()
        service = node.start_mounts()
        others_than("mount-server", *servers)
        answers(two)
        until(serving)
        # The keepers with the process that has them, as when their container is upgraded.
        keepers = [wait_for("mount-keeper", each) for each in (one, two)]
        node.kill_keepers()
        node.start_keeper()
        others_than("mount-keeper", *keepers)
        until(lambda: {str(one), str(two)} <= set(node.kept()))
        # So that the next server finds what the last one knew.
        kill("mount-server", one)
        kill("mount-server", two)
        answers(one)
        answers(two)
        until(serving)
        # A rolling update: the next service is there before the last one goes.
        servers = [wait_for("mount-server", each) for each in (one, two)]
        last, service = service, node.start_mounts()
        others_than("mount-server", *servers)
        until(serving)
        last.terminate()
        assert last.wait(LIMIT_S) == 0
        assert serving()
        # And without.
        servers = [wait_for("mount-server", each) for each in (one, two)]
        service.terminate()
        assert service.wait(LIMIT_S) == 0
        assert is_mounted(one) and is_mounted(two)
        service = node.start_mounts()
        others_than("mount-server", *servers)
        answers(one)
        answers(two)
        until(serving)
        # The keepers go, and nobody is there to take the mounts over, when the service is told to end as well.
        servers = [wait_for("mount-server", each) for each in (one, two)]
        node.kill_keepers()
        service.terminate()
        time.sleep(1.0)
        assert pids_of("mount-server", one) == servers[:1]
        node.start_keeper()
        assert service.wait(LIMIT_S) == 0
        service = node.start_mounts()
        others_than("mount-server", *servers)
        answers(one)
        answers(two)
        until(serving)
        for readers in (readers_of_one, readers_of_two):
            check(readers.stop())
    for mountpoint in (one, two):
        assert len(pids_of("mount-server", mountpoint)) == len(pids_of("mount-keeper", mountpoint)) == 1
        node.remove(mountpoint)
    nothing_is_left(node, one)


def test_all_of_it_is_killed_and_comes_back_with_nobody_asking(node: Node, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    service = node.start_mounts()
    node.ensure(one)
    node.ensure(two)
    for process in (service, node.keeper):
        assert process is not None
        process.kill()
        process.wait()
    for mountpoint in (one, two):
        # Servers end as well, once they notice.
        for pid in pids_of("mount-keeper", mountpoint) + pids_of("mount-server", mountpoint):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    until(lambda: is_not_connected(one) and is_not_connected(two), "the end of the connections")
    # One of the files is damaged meanwhile.
    record = next(each for each in node.state_dir.iterdir() if str(two) in each.read_text())
    record.write_text("{")
    node.start_keeper()
    node.start_mounts()
    until(lambda: node.is_serving(one))
    answers(one)
    assert list(node.states()) == [str(one)]
    assert record.with_name(record.name + ".unreadable").read_text() == "{"
    assert node.log.read_text().count("set aside") == 1
    # What is dead there is taken away for who asks.
    assert node.ensure(two).state == "serving"
    answers(two)


def is_not_connected(mountpoint: Path) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError:
        return True
    return False


def test_one_that_somebody_unmounts_is_mounted_when_it_is_asked_for(node: Node, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    node.start_mounts()
    first = node.ensure(mountpoint)
    subprocess.run(["umount", mountpoint], check=True)
    until(lambda: node.states()[str(mountpoint)].state == "dead")
    assert node.states()[str(mountpoint)].why == "it was unmounted"
    again = node.ensure(mountpoint)
    assert again.state == "serving" and again.server_pid != first.server_pid
    # Its keeper and server are killed at once: nobody is left who could take it away.
    pids = [wait_for(role, mountpoint) for role in ("mount-keeper", "mount-server")]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    assert node.ensure(mountpoint).state == "serving"
    answers(mountpoint)


def test_one_that_somebody_unmounts_is_mounted_again_once_its_keeper_is_gone(node: Node, tmp_path: Path) -> None:
    """Who is given the keeper of the mount that was there has a server that ends with it."""
    mountpoint = tmp_path / "mnt"
    node.start_mounts()
    first = node.ensure(mountpoint)
    keeper = wait_for("mount-keeper", mountpoint)
    os.kill(keeper, signal.SIGSTOP)
    again: list[MountState] = []
    asking = threading.Thread(target=lambda: again.append(node.ensure(mountpoint)))
    try:
        subprocess.run(["umount", mountpoint], check=True)
        until(lambda: not os.path.exists(f"/proc/{first.server_pid}"))
        asking.start()
        # As long as it takes to be given the keeper and to start a server there, if it may be.
        asking.join(3)
    finally:
        os.kill(keeper, signal.SIGCONT)
    asking.join(60)
    assert [each.state for each in again] == ["serving"]
    answers(mountpoint)


def test_one_that_somebody_unmounts_while_a_pod_sees_it_is_not_mounted_a_second_time(
    node: Node, tmp_path: Path
) -> None:
    mountpoint, pod = tmp_path / "mnt", tmp_path / "pod"
    pod.mkdir()
    node.start_mounts()
    first = node.ensure(mountpoint)
    subprocess.run(["mount", "--bind", mountpoint, pod], check=True)
    try:
        subprocess.run(["umount", mountpoint], check=True)
        with pytest.raises(NamespaceError, match=f"is in use where it is mounted as well: {pod}"):
            node.ensure(mountpoint)
        answers(pod)
    finally:
        subprocess.run(["umount", pod], check=True)
    again = node.ensure(mountpoint)
    assert again.state == "serving" and again.server_pid != first.server_pid


def test_without_its_files_it_finds_what_is_mounted(node: Node, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    service = node.start_mounts()
    first = node.ensure(mountpoint, "/warm")
    with open(mountpoint / "001", "rb") as held:
        service.kill()
        service.wait()
        for record in node.state_dir.iterdir():
            record.unlink()
        node.start_mounts()
        assert node.states() == {}
        with pytest.raises(ExistsError, match="shows /warm"):
            node.ensure(mountpoint, "/cold")
        assert is_mounted(mountpoint) and node.states() == {}
        again = node.ensure(mountpoint, "/warm")
        assert (again.state, again.device) == ("serving", first.device)
        assert len(held.read()) == 20_001


def test_mounts_of_the_host_and_what_is_shown_of_it(node: Node, tmp_path: Path) -> None:
    host, asked = node.watch(tmp_path / "host"), tmp_path / "asked"
    service = node.start_mounts("--mount", f"/warm={host}", "--http", "127.0.0.1:0")
    assert node.facts["ready"] == "node-mounts" and node.facts["socket"] == str(node.mounts_socket)
    until(lambda: str(host) in node.states() and node.is_serving(host))
    assert sorted(os.listdir(host)) == [f"{number:03}" for number in range(40)]
    old = node.ensure(asked).server_pid
    assert get(node, "healthz")[0] == 200
    counts_of_each_mount_are_shown(node, host, asked)
    until(lambda: get(node, "readyz")[0] == 200)
    os.kill(old, signal.SIGKILL)
    until(lambda: node.states()[str(asked)].restarts == 1 and node.is_serving(asked))
    until(lambda: shown_of_mounts(node, "cachefs_mount_servers").get(str(asked)) == 2)
    shown = get(node, "metrics")[1]
    assert 'cachefs_node_mounts{state="serving"} 2' in shown and "cachefs_node_mount_restarts_total 1" in shown
    subprocess.run(["umount", asked], check=True)
    until(lambda: 'cachefs_node_mounts{state="dead"} 1' in get(node, "metrics")[1])
    # With others for the next: what is not named any more is taken away, what somebody asked for stays.
    service.terminate()
    assert service.wait(LIMIT_S) == 0
    other = node.watch(tmp_path / "other")
    node.start_mounts("--mount", f"/cold={host}", "--mount", f"/warm={other}")
    until(lambda: is_mounted(other) and number_of_names(host) == COLD)
    assert sorted(node.states()) == sorted(map(str, (host, asked, other)))
    node.start_mounts()
    until(lambda: list(node.states()) == [str(asked)])
    assert not is_mounted(host) and not is_mounted(other)


def counts_of_each_mount_are_shown(node: Node, *mountpoints: Path) -> None:
    """Though the servers are processes of their own, and one of them hangs."""
    for mountpoint in mountpoints:
        for path in sorted(each for each in mountpoint.rglob("*") if each.is_file())[:3]:
            path.read_bytes()
    until(lambda: shown_of_mounts(node, "cachefs_opens_total") == {str(each): 3 for each in mountpoints})
    shown = [each for each in samples(node) if each.name == "cachefs_master_away_seconds"]
    assert {each.labels["mount"] for each in shown} == {each.id for each in node.states().values()}
    hanging = node.states()[str(mountpoints[-1])].server_pid
    os.kill(hanging, signal.SIGSTOP)
    try:
        until(lambda: list(shown_of_mounts(node, "cachefs_opens_total")) == [str(each) for each in mountpoints[:-1]])
    finally:
        os.kill(hanging, signal.SIGCONT)


def shown_of_mounts(node: Node, name: str) -> dict[str, float]:
    """The sum of a metric for each mountpoint."""
    found: dict[str, float] = {}
    for each in samples(node):
        if each.name == name:
            found[each.labels["mountpoint"]] = found.get(each.labels["mountpoint"], 0) + each.value
    return found


def samples(node: Node) -> list[Sample]:
    text = get(node, "metrics")[1]
    return [each for family in text_string_to_metric_families(text) for each in family.samples]


def number_of_names(directory: Path) -> int:
    """-1: they cannot be had, as while what is mounted there is taken away."""
    try:
        return len(os.listdir(directory))
    except OSError:
        return -1


def get(node: Node, path: str) -> tuple[int, str]:
    address = node.facts["http"]
    try:
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=LIMIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "what", [pytest.param("the master is away", marks=pytest.mark.slow), "the node-keeper is away"]
)
def test_what_it_waits_for_is_told(tmp_path: Path, shared: Shared, what: str) -> None:
    """In bounded time, and nothing is left."""
    mountpoint = tmp_path / "mnt"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{nobody.getsockname()[1]}" if what == "the master is away" else shared.master
        with node_of(tmp_path / "node", "--master", master, "--insecure", "--patience", "2s") as node:
            if what == "the master is away":
                node.start_keeper()
            node.start_mounts()
            with pytest.raises(UnavailableError) as raised:
                # In as much time as the mount is given to wait for the master.
                node.ensure(mountpoint)
            assert master in str(raised.value) if what == "the master is away" else "keeper" in str(raised.value)
            nothing_is_left(node, mountpoint)


def test_in_containers_of_their_own(tmp_path: Path, shared: Shared) -> None:
    """Other mount namespaces, of which only the service's reaches the host; other process ids, which nobody sees."""
    directory = tmp_path / "host"
    directory.mkdir()
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "--make-shared", directory], check=True)
    try:
        with node_of(directory / "run", "--master", shared.master, "--insecure", "--hung-after", "2s") as node:
            keepers = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
            mounts = ["unshare", "--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child"]
            keepers.append("--mount-proc")
            mounts.append("--mount-proc")
            keeper = node.start_keeper(keepers)
            service = node.start_mounts(prefix=mounts)
            mountpoint = directory / "mnt"
            node.ensure(mountpoint)
            answers(mountpoint)  # on the host
            kept = find_mount(mountpoint)
            with reading(mountpoint, shared.source, 1) as readers:
                # One that hangs, whose process id the keeper does not know.
                old = kill("mount-server", mountpoint, signal.SIGSTOP)
                wait_for("mount-server", mountpoint, other_than=old)
                answers(mountpoint)
                until(lambda: not os.path.exists(f"/proc/{old}"))
                # The container of the keepers ends, and another one comes.
                old = wait_for("mount-keeper", mountpoint)
                keeper.kill()
                keeper.wait()
                keeper = node.start_keeper(keepers)
                wait_for("mount-keeper", mountpoint, other_than=old)
                until(lambda: str(mountpoint) in node.kept())
                # That of the service too.
                old = wait_for("mount-server", mountpoint)
                service.kill()
                service.wait()
                service = node.start_mounts(prefix=mounts)
                wait_for("mount-server", mountpoint, other_than=old)
                answers(mountpoint)
                check(readers.stop())
            assert find_mount(mountpoint) == kept
            # Both at once: the dead mount is taken away where it is seen.
            for process in (keeper, service):
                process.send_signal(signal.SIGSTOP)
            for process in (keeper, service):
                process.kill()
                process.wait()
            until(lambda: is_not_connected(mountpoint), "the end of the connection")
            node.start_keeper(keepers)
            node.start_mounts(prefix=mounts)
            until(lambda: node.is_serving(mountpoint))
            answers(mountpoint)
            node.remove(mountpoint)
            assert not is_mounted(mountpoint)
    finally:
        subprocess.run(["umount", directory], check=True)
