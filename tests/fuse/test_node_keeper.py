"""The process that has the keepers of a node, by itself: servers here are links that this test holds."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from cachefs.fuse import NODE_KEEPER
from cachefs.fuse.keeping import KeeperLink, ask, ask_node_keeper, parse_facts, socket_of
from cachefs.model import TransportError
from cachefs.testing.survivors import pid_of

LIMIT_S = 30.0
MOST_RSS_KB = 16_000


class Scene:
    """The socket, and the processes that were started for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = str(directory / "node.sock")
        self.mountpoints: set[str] = set()
        self._started: list[subprocess.Popen[bytes]] = []

    def at(self, name: str) -> str:
        """A mountpoint of this test alone: keepers are found by theirs."""
        return f"/nowhere{self.directory}/{name}"

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", NODE_KEEPER, "node-keeper", self.path]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        self._started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == f"cachefs node-keeper is ready socket={self.path}\n".encode()
        return process

    def keep(self, mountpoint: str) -> str:
        self.mountpoints.add(mountpoint)
        return ask_node_keeper(self.path, ["keep", mountpoint, "absent=20"])

    def who(self) -> dict[str, int]:
        """Process ids, by mountpoint."""
        word, *found = ask(self.path, "who").split("\0")
        assert word == "keeping"
        return {path: int(pid) for path, pid in zip(found[::2], found[1::2], strict=True)}

    def keepers_of(self, mountpoint: str) -> list[int]:
        wanted = f"\0mount-keeper\0{mountpoint}\0".encode()
        found = []
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                if process.name.isdecimal() and wanted in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def close(self) -> None:
        with suppress(TransportError):
            for pid in self.who().values():  # also one that has been started just now, and has no name yet
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for mountpoint in self.mountpoints:
            while (pid := pid_of("mount-keeper", Path(mountpoint))) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    it = Scene(tmp_path)
    with closing(it):
        yield it


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():
            await trio.sleep(0.01)


@contextmanager
def server_of(path: str, mountpoint: str) -> Iterator[KeeperLink]:
    """One that answers."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(LIMIT_S)
    link.connect(path)
    link.send(f"hello 1 {os.getpid()}".encode())
    with closing(KeeperLink(link, mountpoint)) as server:
        server.ready()
        yield server


def facts_of(path: str) -> dict[str, str]:
    return parse_facts(ask(path, "who").removeprefix("keeper "))[0]


def facts_if_any(path: str) -> dict[str, str] | None:
    with suppress(TransportError):
        return parse_facts(ask(path, "who", 0.5).removeprefix("keeper "))[0]
    return None


def test_it_imports_almost_nothing_and_is_small(scene: Scene) -> None:
    tree = ast.parse(Path(NODE_KEEPER).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    small = {"errno", "fcntl", "hashlib", "os", "select", "signal", "socket", "stat", "sys", "time"}
    assert imported == {"__future__", *small}
    process = scene.start()
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmRSS:")]
    assert int(line.split()[1]) < MOST_RSS_KB
    assert os.stat(scene.path).st_mode & 0o777 == 0o600


def test_one_keeper_for_each_mountpoint(scene: Scene) -> None:
    process = scene.start()
    assert scene.who() == {}
    path = scene.keep(scene.at("a b"))
    assert path == socket_of(scene.at("a b"), str(scene.directory))
    assert os.stat(path).st_mode & 0o777 == 0o600
    pid = scene.who()[scene.at("a b")]
    assert scene.keep(scene.at("a b")) == path
    other = scene.keep(scene.at("c"))
    assert other != path
    assert scene.who()[scene.at("a b")] == pid and len(scene.who()) == 2
    facts = facts_of(path)
    assert (facts["keeper"], facts["mode"], facts["home"], facts["absent"]) == (str(pid), "keep", scene.path, "20")
    # Only that one ends, is reaped, and comes anew when it is asked for.
    assert ask_node_keeper(scene.path, ["drop", scene.at("a b")]) == ""
    wait(lambda: list(scene.who()) == [scene.at("c")])
    assert not os.path.exists(path) and not os.path.exists(f"/proc/{pid}")
    assert ask_node_keeper(scene.path, ["drop", scene.at("a b")]) == ""
    assert scene.keep(scene.at("a b")) == path
    assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_keepers_stay_and_the_next_one_finds_them(scene: Scene, number: signal.Signals) -> None:
    first = scene.start()
    path = scene.keep(scene.at("a"))
    pid = scene.who()[scene.at("a")]
    first.send_signal(number)
    assert first.wait(LIMIT_S) == (0 if number == signal.SIGTERM else -number)
    scene.start()
    assert scene.keep(scene.at("a")) == path
    assert facts_of(path)["keeper"] == str(pid)
    assert scene.keepers_of(scene.at("a")) == [pid]


def test_a_keeper_that_was_killed_comes_anew(scene: Scene) -> None:
    scene.start()
    path = scene.keep(scene.at("a"))
    pid = scene.who()[scene.at("a")]
    os.kill(pid, signal.SIGKILL)
    wait(lambda: scene.who() == {})
    assert scene.keep(scene.at("a")) == path
    assert facts_of(path)["keeper"] == str(scene.who()[scene.at("a")]) != str(pid)


async def test_what_a_server_holds_goes_to_the_next_keeper_of_the_node(scene: Scene) -> None:
    """Also when the process that has them was killed with them, and comes back later."""
    first = scene.start()
    path = scene.keep(scene.at("a"))
    old = scene.who()[scene.at("a")]
    with server_of(path, scene.at("a")) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.follow)
            os.kill(old, signal.SIGKILL)
            await until(lambda: scene.who().get(scene.at("a")) not in (None, old))
            second = scene.who()[scene.at("a")]
            first.kill()
            os.kill(second, signal.SIGKILL)
            await trio.sleep(1.0)
            assert scene.keepers_of(scene.at("a")) == []  # it waits
            scene.start()
            await until(lambda: scene.at("a") in scene.who())
            # The same listener: who wants the keeper of the mountpoint gets to this one.
            facts = await trio.to_thread.run_sync(facts_of, path)
            assert facts["keeper"] == str(scene.who()[scene.at("a")])
            assert (facts["server"], facts["established"]) == (str(os.getpid()), "1")
            assert scene.keep(scene.at("a")) == path
            assert len(scene.keepers_of(scene.at("a"))) == 1
            nursery.cancel_scope.cancel()


@pytest.mark.expect_warnings("no node-keeper takes the mount over")
async def test_a_server_that_finds_none_starts_a_keeper_itself(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.fuse.keeping._HOME_S", 0.5)
    first = scene.start()
    path = scene.keep(scene.at("a"))
    old = scene.who()[scene.at("a")]
    with server_of(path, scene.at("a")) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.follow)
            first.kill()
            os.kill(old, signal.SIGKILL)
            await until(lambda: scene.keepers_of(scene.at("a")) not in ([], [old]))
            (own,) = scene.keepers_of(scene.at("a"))
            assert f"PPid:\t{os.getpid()}" in Path(f"/proc/{own}/status").read_text()
            # Later it is the one of the node again, once this one is gone.
            scene.start()
            assert await trio.to_thread.run_sync(scene.keep, scene.at("a")) == path
            assert scene.who() == {}
            os.kill(own, signal.SIGKILL)
            await until(lambda: scene.who())
            nursery.cancel_scope.cancel()


async def test_one_that_hangs_holds_no_server_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of it in vain it does later, and then again: one keeper is left."""
    monkeypatch.setattr("cachefs.fuse.keeping._ADOPTION_S", 1.0)
    asked: list[int] = []
    """How often this loop went round while it was asked, each time in vain."""
    rounds = 0
    ask_in_vain = KeeperLink._be_adopted

    def counted(link: KeeperLink) -> tuple[socket.socket, str]:
        before = rounds
        try:
            return ask_in_vain(link)
        except OSError:
            asked.append(rounds - before)
            raise

    monkeypatch.setattr(KeeperLink, "_be_adopted", counted)
    process = scene.start()
    path = scene.keep(scene.at("a"))
    old = scene.who()[scene.at("a")]
    with server_of(path, scene.at("a")) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.follow)
            process.send_signal(signal.SIGSTOP)
            os.kill(old, signal.SIGKILL)
            with trio.fail_after(LIMIT_S):
                while len(asked) < 2:
                    await trio.sleep(0.01)
                    rounds += 1
            assert max(asked) > 0
            process.send_signal(signal.SIGCONT)
            await until(lambda: facts_if_any(path))
            await until(lambda: len(scene.keepers_of(scene.at("a"))) == 1)
            (left,) = scene.keepers_of(scene.at("a"))
            assert (await trio.to_thread.run_sync(facts_of, path))["keeper"] == str(left)
            assert scene.who() == {scene.at("a"): left}
            nursery.cancel_scope.cancel()


def test_asking_for_a_keeper_whose_server_waits_does_not_hang_it(scene: Scene) -> None:
    """That server holds the listener, and nobody accepts meanwhile."""
    scene.start()
    path = scene.keep(scene.at("a"))
    with server_of(path, scene.at("a")):
        os.kill(scene.who()[scene.at("a")], signal.SIGKILL)
        wait(lambda: scene.who() == {})
        for _ in range(20):
            assert scene.keep(scene.at("a")) == path
        assert scene.keepers_of(scene.at("a")) == []


@pytest.mark.parametrize(
    "words", ["", "\xff nonsense", "keep", "keep\0/a\0nonsense", "adopt\0/a\0path=/b", "adopt\0/a"]
)
def test_strangers_get_a_word(scene: Scene, words: str) -> None:
    scene.start()
    if words:
        assert ask(scene.path, words).startswith("failed ")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
        gone.connect(scene.path)
    assert scene.who() == {}


def test_a_second_one_is_refused_and_the_first_goes_on(scene: Scene) -> None:
    scene.start()
    path = scene.keep(scene.at("a"))
    before, pid = os.stat(scene.path).st_ino, scene.who()[scene.at("a")]
    done = refused_at(scene.path)
    wanted = f"Error: --socket: '{scene.path}' is not accepted; expected a path where a socket can be made "
    assert done.stderr == wanted + "(another node-keeper listens there)\n"
    assert os.stat(scene.path).st_ino == before
    assert scene.who() == {scene.at("a"): pid} and facts_of(path)["keeper"] == str(pid)


def test_of_many_that_begin_at_once_one_is_the_first(scene: Scene) -> None:
    """Also where one that was killed has left its socket."""
    for _ in range(3):
        command = [sys.executable, "-I", "-S", NODE_KEEPER, "node-keeper", scene.path]
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            for _ in range(8)
        ]
        try:
            wait(lambda started=started: sum(each.poll() is not None for each in started) == len(started) - 1)
            (first,) = [each for each in started if each.returncode is None]
            assert scene.who() == {}
            first.kill()
            assert b"is ready" in first.communicate()[0]
            for each in started:
                if each is not first:
                    assert each.returncode == 1 and b"another node-keeper listens there" in each.communicate()[1]
        finally:
            for each in started:
                each.kill()
                each.communicate()
    assert os.path.exists(scene.path)


@pytest.mark.parametrize("what", ["file", "directory", "no directory"])
def test_a_path_that_will_not_do_is_named_and_left_alone(scene: Scene, what: str) -> None:
    path = Path(scene.path)
    if what == "file":
        path.write_text("mine")
    elif what == "directory":
        path.mkdir()
    else:
        path = path / "below"
    done = refused_at(str(path))
    assert f"--socket: '{path}'" in done.stderr and "Traceback" not in done.stderr
    assert what != "file" or path.read_text() == "mine"
    assert what != "directory" or path.is_dir()


def refused_at(path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", NODE_KEEPER, "node-keeper", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1 and done.stdout == ""
    return done


def test_a_keeper_of_an_earlier_one_is_dropped_too(scene: Scene) -> None:
    first = scene.start()
    path = scene.keep(scene.at("a"))
    other = scene.keep(scene.at("b"))
    first.kill()
    first.wait()
    scene.start()
    assert scene.who() == {}
    assert ask_node_keeper(scene.path, ["drop", scene.at("a")]) == ""
    wait(lambda: not scene.keepers_of(scene.at("a")))
    assert not os.path.exists(path)
    assert facts_of(other)["state"] == "none"


def test_two_with_sockets_in_one_directory_have_one_keeper_for_a_mountpoint(scene: Scene) -> None:
    scene.start()
    path = scene.keep(scene.at("a"))
    pid = scene.who()[scene.at("a")]
    first, scene.path = scene.path, str(scene.directory / "second.sock")
    scene.start()
    assert scene.keep(scene.at("a")) == path and scene.who() == {}
    assert facts_of(path)["keeper"] == str(pid) and facts_of(path)["home"] == first
    assert scene.keepers_of(scene.at("a")) == [pid]


def test_both_ends_call_the_socket_of_a_keeper_alike(scene: Scene) -> None:
    """The name is made in two files, as the one of the node-keeper imports nothing of ours."""
    scene.start()
    for name in ("a", "a b", "Grüße", "x" * 200, "a\nb"):
        assert scene.keep(scene.at(name)) == socket_of(scene.at(name), str(scene.directory))
