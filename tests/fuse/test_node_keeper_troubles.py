"""The process that has the keepers of a node, when nobody listens to it any more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cachefs.fuse import NODE_KEEPER
from cachefs.fuse.keeping import ask

LIMIT_S = 30.0


@contextmanager
def node_keeper(path: str, stderr: int | None = None) -> Iterator[None]:
    """Ended with the keepers that it started."""
    command = [sys.executable, "-I", "-S", NODE_KEEPER, "node-keeper", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield
            for pid in keepers(path):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert process.poll() is None
        finally:
            process.kill()


def keepers(path: str) -> list[int]:
    return [int(pid) for pid in ask(path, "who", LIMIT_S).split("\0")[2::2]]


def adopt(path: str, link: socket.socket, listener: socket.socket) -> str:
    memfd = os.memfd_create("test")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as home:
            home.settimeout(LIMIT_S)
            home.connect(path)
            words = ["adopt", "/nowhere/a", "mode=keep", "established=1", f"pid={os.getpid()}"]
            socket.send_fds(home, ["\0".join(words).encode()], [listener.fileno(), memfd, link.fileno()])
            return home.recv(1 << 16).decode()
    finally:
        os.close(memfd)


def test_whoever_waits_no_more_gets_no_keeper(tmp_path: Path) -> None:
    """That server started one itself meanwhile: of two, the one without a server would take the mount away."""
    path = str(tmp_path / "node.sock")
    with node_keeper(path), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "keeper.sock"))
        listener.listen()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.close()
            assert adopt(path, theirs, listener) == "failed whoever asked waits no more"
        assert keepers(path) == []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            answer = adopt(path, theirs, listener)
            assert answer == f"ok {keepers(path)[0]}"


def test_it_goes_on_when_nobody_reads_its_log(tmp_path: Path) -> None:
    path = str(tmp_path / "node.sock")
    reader, writer = os.pipe()
    with node_keeper(path, stderr=writer):
        os.close(writer)
        os.close(reader)
        assert ask(path, "keep\0/nowhere/a", LIMIT_S).startswith("ok ")
        os.kill(keepers(path)[0], signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while keepers(path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
