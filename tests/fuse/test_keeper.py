"""The keeper by itself: what it is made of, and what it does with servers that will not do. Those here are scripts."""

from __future__ import annotations

import ast
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs.cli.instances import worker_socket
from cachefs.fuse import find_mount, is_dead, open_mount, probe, unmount
from cachefs.fuse.keeping import KEEPER, KeeperLink, ask, command_file, keeper_command, listen, parse_facts, socket_of
from cachefs.model import ConfigError, TransportError

LIMIT_S = 30.0
MOST_RSS_KB = 16_000

SERVER = """
    import os, socket, sys
    link = socket.socket(fileno=int(sys.argv[1]))
    data, fds, _, _ = socket.recv_fds(link, 65536, 3)
    is_first = b"established=0" in data
    def say(message, fds=()):
        socket.send_fds(link, [message.encode()], list(fds))
    def log(what):
        with open(sys.argv[2], "a") as file:
            print(os.getpid(), *what.split(), file=file)
    def obey():
        while True:
            word = link.recv(100).decode()
            log(word or "eof")
            if word == "ping":
                say("pong")
            elif word == "drain" or word == "":
                sys.exit(0)
            elif word == "end":
                say("done 0")
                sys.exit(0)
    def serve():
        if not is_first:
            say("standby")
            assert link.recv(100) == b"go"
        log("ready")
        say("ready")
        obey()
"""


class Scene:
    def __init__(self, process: subprocess.Popen[bytes], path: str, log: Path) -> None:
        self.process = process
        self.path = path
        self._log = log

    def said(self, *words: str) -> list[int]:
        """Process ids of the servers that said this, in order."""
        lines = [line.split() for line in self._log.read_text().splitlines()] if self._log.exists() else []
        return [int(pid) for pid, *rest in lines if rest == list(words)]

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, self._log.read_text() if self._log.exists() else "nothing"
            time.sleep(0.01)

    def upgrade(self, *command: str) -> str:
        """Once the keeper has heard that the server answers: the log of servers tells that a moment before."""
        self.wait(lambda: parse_facts(ask(self.path, "who").removeprefix("keeper "))[0]["state"] == "serving")
        return ask(self.path, "\0".join(["upgrade", *command]))


def server(directory: Path, name: str, body: str) -> list[str]:
    script = directory / f"{name}.py"
    script.write_text(textwrap.dedent(SERVER) + textwrap.dedent(body))
    return [sys.executable, "-S", str(script), "{keeper}", str(directory / "log")]


@contextmanager
def hasty(directory: Path, body: str, before: str, after: str) -> Iterator[Scene]:
    """With another constant."""
    source = Path(KEEPER).read_text()
    assert before in source
    script = directory / "keeper.py"
    script.write_text(source.replace(before, after))
    with keeper(directory, body, script=str(script)) as it:
        yield it


@contextmanager
def keeper(directory: Path, body: str = "serve()", script: str = KEEPER, **values: str | int) -> Iterator[Scene]:
    path = str(directory / "socket")
    listener = listen(path)
    assert listener is not None
    command = command_file(server(directory, "server", body) if values.get("mode") != "keep" else [])
    with listener:
        started = keeper_command("/nowhere", {"listen": listener.fileno(), "path": path, **values}, command)
        started[started.index(KEEPER)] = script
        fuse = [int(values["fuse"])] if "fuse" in values else []
        process = subprocess.Popen(started, pass_fds=[listener.fileno(), command, *fuse])
    os.close(command)
    scene = Scene(process, path, directory / "log")
    try:
        yield scene
    finally:
        for pid in {process.pid, *scene.said("ready")}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def test_it_imports_almost_nothing_and_is_small(tmp_path: Path) -> None:
    """So that no upgrade of anything is a reason to start another."""
    tree = ast.parse(Path(KEEPER).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "os", "select", "signal", "socket", "sys", "time"}
    with keeper(tmp_path) as it:
        it.wait(lambda: it.said("ready"))
        status = Path(f"/proc/{it.process.pid}/status").read_text().splitlines()
        (line,) = [line for line in status if line.startswith("VmRSS:")]
        assert int(line.split()[1]) < MOST_RSS_KB
        loaded = Path(f"/proc/{it.process.pid}/maps").read_text()
        assert not any(name in loaded for name in ("msgspec", "trio", "_ssl", "_ctypes"))


def test_a_killed_server_has_a_successor(tmp_path: Path) -> None:
    with keeper(tmp_path) as it:
        for count in range(1, 4):
            it.wait(lambda count=count: len(it.said("ready")) == count)
            os.kill(it.said("ready")[-1], signal.SIGKILL)
        it.wait(lambda: len(it.said("ready")) == 4)
        it.process.terminate()
        assert it.process.wait(LIMIT_S) == 0
        assert it.said("end") == it.said("ready")[-1:]
        assert not os.path.exists(it.path)


def test_a_server_that_lets_go_and_does_not_end_is_killed(
    tmp_path: Path,
) -> None:
    """Its end of the link is closed: whatever keeps it from ending, it has nothing to say any more."""
    stays = "import time\nif is_first:\n    say('ready'); log('ready'); link.close(); time.sleep(600)\nserve()"
    with hasty(tmp_path, stays, "KILL_S = 10.0", "KILL_S = 0.1") as it:
        it.wait(lambda: len(it.said("ready")) == 2)
        assert not os.path.exists(f"/proc/{it.said('ready')[0]}")


@pytest.mark.skipif(not probe().can_mount or os.geteuid() != 0, reason="needs root and /dev/fuse")
def test_a_connection_that_is_over_is_not_ended_by_its_number_which_may_be_anothers(tmp_path: Path) -> None:
    """It is unmounted and told to end in one moment, as when a volume is removed."""
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    with ExitStack() as stack:
        fuse, mounted = open_mount(first, "test")
        with keeper(tmp_path, fuse=fuse, connection=mounted.connection, mode="keep", established=1) as it:
            os.close(fuse)
            assert ask(it.path, "who")
            it.process.send_signal(signal.SIGSTOP)
            unmount(first)
            # The kernel gives the lowest number that is free: if nobody is faster, the same again.
            fd, another = open_mount(other, "test")
            stack.callback(os.close, fd)
            stack.callback(unmount, other, lazy=True)
            it.process.terminate()
            it.process.send_signal(signal.SIGCONT)
            assert it.process.wait(LIMIT_S) == 0
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(0) == [(fd, select.POLLIN)]  # its INIT, and no error
        if another.connection != mounted.connection:
            pytest.skip("the number was taken by somebody else")


@pytest.mark.parametrize("word", ["end", "SIGTERM"])
def test_who_keeps_a_mount_that_nobody_serves_takes_it_away_when_told_to(tmp_path: Path, word: str) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    fuse, mounted = open_mount(mountpoint, "test")
    with keeper(tmp_path, fuse=fuse, connection=mounted.connection, mode="keep", established=1) as it:
        os.close(fuse)
        if word == "end":
            assert ask(it.path, word) == f"ok {it.process.pid}"
        else:
            assert ask(it.path, "who")
            it.process.terminate()
        assert it.process.wait(LIMIT_S) == 0
        # It may have told its mountpoint, which is another here: the connection is over all the same.
        assert is_dead_or_gone(mountpoint)
        while find_mount(mountpoint) is not None:
            unmount(mountpoint, lazy=True)


def is_dead_or_gone(mountpoint: Path) -> bool:
    found = find_mount(mountpoint)
    return found is None or is_dead(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_also_in_the_background_of_a_script(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # which a child inherits
    try:
        with keeper(tmp_path) as it:
            it.wait(lambda: it.said("ready"))
            it.process.send_signal(number)
            assert it.process.wait(LIMIT_S) == 0
    finally:
        signal.signal(number, before)


def test_a_first_server_that_fails_is_the_end(tmp_path: Path) -> None:
    with keeper(tmp_path, "log('ready'); sys.exit(3)") as it:
        assert it.process.wait(LIMIT_S) == 3
        assert len(it.said("ready")) == 1


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_server_that_hangs_is_replaced(tmp_path: Path, how: str) -> None:
    loops = "if is_first:\n    say('ready'); log('ready')\n    while True: pass\nserve()"
    with keeper(tmp_path, "serve()" if how == "stopped" else loops, hung="1") as it:
        it.wait(lambda: it.said("ready"))
        (first,) = it.said("ready")
        if how == "stopped":
            os.kill(first, signal.SIGSTOP)
        it.wait(lambda: len(it.said("ready")) == 2)
        assert not os.path.exists(f"/proc/{first}")


def test_servers_that_never_come_up_are_given_up(tmp_path: Path) -> None:
    with keeper(tmp_path, "if not is_first:\n    log('failed'); sys.exit(1)\nserve()", failures="4") as it:
        it.wait(lambda: it.said("ready"))
        began = time.monotonic()
        os.kill(it.said("ready")[0], signal.SIGKILL)
        assert it.process.wait(LIMIT_S) == 1
        assert len(it.said("failed")) == 4
        assert time.monotonic() - began >= 0.4 + 0.8  # more and more slowly


def test_servers_that_answer_and_die_are_too(tmp_path: Path) -> None:
    """A request that kills whoever reads it would be sent again for ever."""
    with keeper(
        tmp_path, "link.send(b'standby'); is_first or link.recv(9); log('ready'); say('ready')", deaths="4"
    ) as it:
        assert it.process.wait(LIMIT_S) == 1
        assert len(it.said("ready")) >= 4  # on a machine that stops for seconds, one may seem to have stayed


def test_an_upgrade_drains_the_old_server_first(tmp_path: Path) -> None:
    with keeper(tmp_path) as it:
        it.wait(lambda: it.said("ready"))
        (old,) = it.said("ready")
        answer = it.upgrade(*server(tmp_path, "new", "serve()"))
        assert it.said("drain") == [old]
        new = it.said("ready")[-1]
        assert answer == f"ok {new}" and new != old
        # The new version is what is started from now on.
        os.kill(new, signal.SIGKILL)
        it.wait(lambda: len(it.said("ready")) == 3)
        _, command = parse_facts(ask(it.path, "who").removeprefix("keeper "))
        assert command[2].endswith("new.py")


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ("sys.exit(1)", {}),
        ("import time; time.sleep(60)", {"start": "1"}),
        ("say('standby'); link.recv(100); sys.exit(1)", {}),
    ],
    ids=["ends", "hangs", "ends when it should answer"],
)
def test_a_new_version_that_does_not_come_up_changes_nothing(tmp_path: Path, body: str, values: dict[str, str]) -> None:
    with keeper(tmp_path, **values) as it:
        it.wait(lambda: it.said("ready"))
        (old,) = it.said("ready")
        assert it.upgrade(*server(tmp_path, "new", body)).startswith("failed ")
        if "standby" in body:
            # It had drained already: one of the old version goes on.
            it.wait(lambda: len(it.said("ready")) == 2)
        else:
            assert os.path.exists(f"/proc/{old}") and it.said("drain") == []
        _, command = parse_facts(ask(it.path, "who").removeprefix("keeper "))
        assert command[2].endswith("server.py")


def test_while_the_old_one_drains_for_too_long_it_is_killed(tmp_path: Path) -> None:
    ignores = "say('ready'); log('ready')\nwhile True:\n    word = link.recv(100)\n    word == b'ping' and say('pong')"
    with hasty(tmp_path, ignores, "DRAIN_S = 5.0", "DRAIN_S = 0.0") as it:
        it.wait(lambda: it.said("ready"))
        assert it.upgrade(*server(tmp_path, "new", "serve()")).startswith("ok ")
        assert not os.path.exists(f"/proc/{it.said('ready')[0]}")


def test_a_new_server_that_is_told_to_end_leaves_the_mount_to_the_old(tmp_path: Path) -> None:
    with keeper(tmp_path, end="0") as it:
        it.wait(lambda: it.said("ready"))
        assert it.upgrade(*server(tmp_path, "new", "say('ending'); sys.exit(0)")).startswith("failed ")
        os.kill(it.said("ready")[0], signal.SIGKILL)
        it.wait(lambda: len(it.said("ready")) == 2)


@contextmanager
def link_to(**values: str) -> Iterator[tuple[socket.socket, KeeperLink]]:
    """(what the keeper holds, the server's side)"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memfd = os.memfd_create("test")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said = "\n".join(["1", *(f"{key}={value}" for key, value in values.items())])
    with ours, listener:
        socket.send_fds(ours, [f"state {said}\0/bin/false".encode()], [memfd, listener.fileno()])
        os.close(memfd)
        with closing(KeeperLink(theirs, "/nowhere")) as link:
            yield ours, link


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The keepers that are started, which are killed at the end."""
    found: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        found.append(real(*args, **options))
        return found[-1]

    monkeypatch.setattr("cachefs.fuse.keeping.subprocess.Popen", popen)
    yield found
    for process in found:
        process.kill()
        process.wait()


def ended_process() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(LIMIT_S):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.parametrize("mode", ["spawn", "keep"])
async def test_only_the_old_server_starts_a_keeper_that_dies_during_an_upgrade(
    mode: str, started: list[subprocess.Popen[bytes]]
) -> None:
    """Two keepers would each have a server answer."""
    with link_to(mode=mode, server=str(os.getppid()), established="1") as (keepers, new):
        keepers.close()
        with pytest.raises(TransportError, match="the server that was there goes on"):
            await new.follow()
    assert started == []
    for words in (), ("drain",), ("go",):
        is_new = words == ("go",)
        with link_to(mode=mode, server=str(os.getppid() if is_new else 0), established="1") as (keepers, link):
            async with trio.open_nursery() as nursery:
                for word in words:
                    keepers.send(word.encode())
                keepers.close()
                nursery.start_soon(link.follow)
                await until(lambda: started)
                nursery.cancel_scope.cancel()
        process = started.pop()
        process.kill()
        process.wait()


async def test_a_new_server_whose_predecessor_is_gone_starts_a_keeper(
    started: list[subprocess.Popen[bytes]],
) -> None:
    with link_to(server=str(ended_process()), established="1") as (keepers, new):
        keepers.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(new.follow)
            await until(lambda: started)
            nursery.cancel_scope.cancel()


async def test_a_keeper_is_started_without_the_descriptors_that_only_the_one_before_had(
    started: list[subprocess.Popen[bytes]],
) -> None:
    """A server that connected has something else, or nothing, under these numbers."""
    with link_to(mode="keep", hold="999", established="1") as (keepers, link):
        keepers.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.follow)
            await until(lambda: started)
            nursery.cancel_scope.cancel()
    command = await trio.to_thread.run_sync(Path(f"/proc/{started[0].pid}/cmdline").read_bytes)
    assert b"hold=999" not in command


def test_a_keeper_that_can_start_no_server_tries_again(tmp_path: Path) -> None:
    """Nobody answers meanwhile: if it died of it, the mount would be lost."""
    fails = """
calls, fork = [], os.fork
def failing():
    calls.append(1)
    if len(calls) in (2, 3, 5):
        raise BlockingIOError(11, "no processes left")
    return fork()
os.fork = failing
if __name__ == "__main__":"""
    with hasty(tmp_path, "serve()", '\nif __name__ == "__main__":', fails) as it:
        it.wait(lambda: it.said("ready"))
        os.kill(it.said("ready")[0], signal.SIGKILL)
        it.wait(lambda: len(it.said("ready")) == 2)
        assert it.upgrade(*server(tmp_path, "new", "serve()")) == "failed no server could be started: no processes left"
        os.kill(it.said("ready")[1], signal.SIGKILL)
        it.wait(lambda: len(it.said("ready")) == 3)


@pytest.mark.expect_warnings("it says so")
async def test_a_server_that_can_start_no_keeper_tries_again(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [BlockingIOError(11, "no processes left")]
    works = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        if left:
            raise left.pop()
        return works(*args, **options)

    monkeypatch.setattr("cachefs.fuse.keeping.subprocess.Popen", popen)
    monkeypatch.setattr("cachefs.fuse.keeping._PAUSE_S", 0.0)
    descriptors = len(os.listdir("/proc/self/fd"))
    with link_to(established="1") as (keepers, link):
        keepers.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.follow)
            await until(lambda: started)
            nursery.cancel_scope.cancel()
    assert not left and len(os.listdir("/proc/self/fd")) == descriptors


def test_servers_that_connect(tmp_path: Path) -> None:
    with keeper(tmp_path, mode="keep") as it:
        connect = "link.close(); link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); link.connect(%r)\n"
        connect += "say('hello 1 0'); data = socket.recv_fds(link, 65536, 3)[0]; is_first = b'established=0' in data\n"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            memfd = os.memfd_create("none")
            running = []
            try:
                for name in ("first", "second"):
                    socket.send_fds(ours, [b"state 1"], [memfd])
                    command = server(tmp_path, name, connect % it.path + "serve()")
                    command[3] = str(theirs.fileno())
                    running.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
                    it.wait(lambda name=name: len(it.said("ready")) == len(running))
                # The second took over from the first.
                assert running[0].wait(LIMIT_S) == 0 and it.said("drain") == [running[0].pid]
                it.process.terminate()
                assert it.process.wait(LIMIT_S) == 0 and running[1].wait(LIMIT_S) == 0
            finally:
                os.close(memfd)
                for process in running:
                    process.kill()
                    process.wait()


def test_a_first_server_that_connects_and_fails_is_not_the_end(tmp_path: Path) -> None:
    with keeper(tmp_path, mode="keep") as it:
        for _ in range(2):
            with connected(it.path) as link:
                assert socket.recv_fds(link, 65536, 3)[0].startswith(b"state ")
                # One at a time, until the mount is there.
                assert ask(it.path, "hello 1 0") == "failed not understood"
                # It had mounted: what it says, and then ends.
                link.send(b"ending")
                assert "state=starting" in ask(it.path, "who")
            it.wait(lambda: "server=0" in ask(it.path, "who"))
        it.process.terminate()
        assert it.process.wait(LIMIT_S) == 0


@contextmanager
def connected(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(path)
        link.send(b"hello 1 0")
        yield link


def test_who_else_listens_there(tmp_path: Path) -> None:
    path = socket_of("/mnt/a b", str(tmp_path))
    first = listen(path)
    assert first is not None
    with first:
        assert listen(path) is None
    with pytest.raises(TransportError, match="no keeper answers"):
        ask(path, "who")
    again = listen(path)  # what a killed one left is replaced
    assert again is not None
    again.close()
    with pytest.raises(ConfigError, match="version 1"):
        parse_facts("2\nmode=spawn")


def test_a_socket_of_a_keeper_is_not_taken_for_that_of_an_ended_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachefs.cli.instances.runtime_root", lambda: str(tmp_path))
    paths = (socket_of(f"/mnt/{number}", str(tmp_path)) for number in range(100_000))
    path = next(each for each in paths if each.removesuffix(".sock")[-16:].isdecimal())
    with listen(path) or pytest.fail(), worker_socket("name"):
        assert os.path.exists(path)


def test_strangers_get_a_word(tmp_path: Path) -> None:
    with keeper(tmp_path) as it:
        it.wait(lambda: it.said("ready"))
        assert ask(it.path, "\xff nonsense") == "failed not understood"
        assert ask(it.path, "hello 1 5") == "failed not understood"
        values, _ = parse_facts(ask(it.path, "who").removeprefix("keeper "))
        assert (values["server"], values["state"]) == (str(it.said("ready")[0]), "serving")
