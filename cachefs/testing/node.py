"""The two processes that have the mounts of a node, for tests that kill them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from cachefs.fuse import FS_TYPE, MountError, NodeMounts, abort, find_mount, open_node_mounts, unmount
from cachefs.fuse.keeping import ask
from cachefs.model import CachefsError
from cachefs.testing.survivors import pid_of
from cachefs.wire.mounts import MountState

LIMIT_S = 60.0


def until(condition: Callable[[], object], what: str = "it") -> None:
    """Raises CachefsError when it never comes true."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise CachefsError(f"{what} did not come to be within {LIMIT_S:g} s")
        time.sleep(0.02)


class Node:
    """Made by `node_of`. All of it lies in one directory."""

    def __init__(self, directory: Path, flags: Sequence[str]) -> None:
        """`flags`: of `cachefs node-mounts`."""
        self.keeper_socket = directory / "keeper.sock"
        self.mounts_socket = directory / "mounts.sock"
        self.state_dir = directory / "mounts"
        self.log = directory / "log"
        self.keeper: subprocess.Popen[bytes] | None = None
        self.facts: dict[str, Any] = {}
        """What the last `cachefs node-mounts` said when it was ready."""
        self._flags = flags
        self._started: list[subprocess.Popen[bytes]] = []
        self._mountpoints: set[Path] = set()

    def start_keeper(self, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """`prefix`: a program that becomes this one, or has it as its child."""
        self.keeper = self._start([*prefix, sys.executable, "-m", "cachefs", "node-keeper"], self.keeper_socket)
        return self.keeper

    def start_mounts(self, *flags: str | Path, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        command = [*prefix, sys.executable, "-m", "cachefs", "node-mounts", "--keeper-socket", str(self.keeper_socket)]
        command += ["--state-dir", str(self.state_dir), "--json", "--log-level", "INFO", *self._flags, *map(str, flags)]
        return self._start(command, self.mounts_socket)

    def _start(self, command: list[str], socket: Path) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [*command, "--socket", str(socket)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        assert process.stdout is not None
        # Keepers hold the other end as long as they are there: not to the end of the file.
        if not select.select([process.stdout], [], [], LIMIT_S)[0] or not (line := process.stdout.readline()):
            raise CachefsError(f"{' '.join(command)} did not come up: {self.log.read_text()[-2000:]}")
        if line.startswith(b"{"):
            self.facts = json.loads(line)
        return process

    def call(self, *requests: Callable[[NodeMounts], Any]) -> list[Any]:
        """The answers to requests that are sent at once. Raises what the first of them raises."""
        answers: list[Any] = [None] * len(requests)
        errors: list[Exception] = []

        async def main() -> None:
            async with open_node_mounts(str(self.mounts_socket)) as mounts, trio.open_nursery() as nursery:

                async def one(number: int, request: Callable[[NodeMounts], Any]) -> None:
                    try:
                        answers[number] = await request(mounts)
                    except CachefsError as error:
                        errors.append(error)

                for number, request in enumerate(requests):
                    nursery.start_soon(one, number, request)

        trio.run(main)
        if errors:
            raise errors[0]
        return answers

    def ensure(self, mountpoint: Path, path: str = "/", mount_id: str = "", **options: str) -> MountState:
        """`options`: with _ for -."""
        self._mountpoints.add(mountpoint)
        named = {name.replace("_", "-"): value for name, value in options.items()}
        (state,) = self.call(lambda mounts: mounts.ensure(mount_id or mountpoint.name, str(mountpoint), path, named))
        assert isinstance(state, MountState)
        return state

    def remove(self, mountpoint: Path) -> None:
        self.call(lambda mounts: mounts.remove(str(mountpoint)))

    def states(self) -> dict[str, MountState]:
        """By mountpoint."""
        return {each.mountpoint: each for each in self.call(lambda mounts: mounts.list())[0]}

    def is_serving(self, mountpoint: Path) -> bool:
        return self.states()[str(mountpoint)].state == "serving"

    def kept(self) -> list[str]:
        """The mountpoints of the keepers that the process for them has started."""
        return ask(str(self.keeper_socket), "who").split("\0")[1::2]

    def kill_keepers(self) -> None:
        """As a container is killed: the process that has them, and all of them."""
        assert self.keeper is not None
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split()
        self.keeper.kill()
        for pid in map(int, children):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.keeper.wait()

    def watch(self, mountpoint: Path) -> Path:
        """It is taken away at the end, with what serves it."""
        self._mountpoints.add(mountpoint)
        return mountpoint

    def close(self) -> None:
        for process in reversed(self._started):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for mountpoint in self._mountpoints:
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for role in ("mount-server", "mount-keeper"):
                    while (pid := pid_of(role, mountpoint)) is not None:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                        if number == signal.SIGSTOP:
                            break
                        time.sleep(0.01)
            while (mounted := find_mount(mountpoint)) is not None and mounted.fs_type == FS_TYPE:
                abort(mounted)
                with suppress(MountError):
                    unmount(mountpoint, lazy=True)


@contextmanager
def node_of(directory: Path, *flags: str) -> Iterator[Node]:
    """Nothing of it is left at the end, whatever was killed. `flags`: of `cachefs node-mounts`."""
    directory.mkdir(exist_ok=True)
    node = Node(directory, flags)
    try:
        yield node
    finally:
        node.close()
