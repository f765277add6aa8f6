"""Processes of ours that one of ours runs: started with one end of a socket pair, which tells when they are ready, when
they have ended, and that they are to end when we do.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from cachefs.cli.lifecycle import ENDED_WELL
from cachefs.model import CachefsError

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
"""The master may need the under-store's deadline, and the worker a while to look through a large tier."""
END_TIMEOUT_S = 20.0
_DIE_TIMEOUT_S = 5.0


class Child:
    """One of the processes."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self.role = role
        self.pid = process.pid
        self.facts: dict[str, Any] = {}
        self.was_killed = False
        """It hung."""
        self._process = process
        self._link = trio.socket.from_stdlib_socket(link)

    async def wait_ready(self) -> None:
        """Raises CachefsError when it ends first, or takes too long; the reason is in what it printed."""
        line = b""
        with trio.move_on_after(READY_TIMEOUT_S) as scope:
            while not line.endswith(b"\n"):
                data = await self._link.recv(4096)
                if not data:
                    # It has to have said why before it is told to end.
                    await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
                    raise CachefsError(f"the {self.role} ended before it was ready; see its message above")
                line += data
        if scope.cancelled_caught:
            raise CachefsError(f"the {self.role} was not ready within {READY_TIMEOUT_S:g} s")
        facts = json.loads(line)
        if "error" in facts:
            raise CachefsError(facts["error"])
        self.facts = facts

    async def wait_end(self) -> int:
        """Its exit status. Notices the end by the link, which the process holds until then; a mount, of which one of
        two processes may die, says there that it ended well.
        """
        said = b""
        while data := await self._link.recv(4096):
            said = data
        if said.endswith(ENDED_WELL):
            return 0
        return await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)

    def kill(self) -> None:
        """It hangs; `wait_end` returns once it is gone."""
        self.was_killed = True
        self._process.kill()

    async def end(self) -> None:
        """SIGTERM, and the end of the link for whoever took its place; SIGKILL when that does not help."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
        with trio.move_on_after(END_TIMEOUT_S) as scope:
            with suppress(OSError):
                while await self._link.recv(4096):
                    pass
            await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)
        if scope.cancelled_caught:
            logger.error("killed role=%s pid=%d reason=did-not-end", self.role, self._process.pid)
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # it waits in the kernel, for a disk: nobody can do more
                self._process.wait(_DIE_TIMEOUT_S)
        self._link.close()


def _environment() -> dict[str, str]:
    """Of the children: without our settings, which they are told by flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CACHEFS_")}


@asynccontextmanager
async def child_of(
    role: str,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    command: Callable[[str], list[str]] | None = None,
    fds: Sequence[int] = (),
) -> AsyncGenerator[Child, None]:
    """`command`: what is run instead, by the number of the link; `fds`: what it gets as well."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        # Not trio's: its processes end with the task that waits for them, ours are ended in order.
        link = str(theirs.fileno())
        usual = [sys.executable, "-m", "cachefs", role, *arguments, "--supervised", link]
        chosen = command(link) if command is not None else usual
        process = subprocess.Popen(  # noqa: ASYNC220
            chosen,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *fds],
            env={**_environment(), **(environment or {})},
            # A Ctrl-C at the terminal is for us, who end them in order.
            start_new_session=True,
        )
    child = Child(role, process, ours)
    try:
        yield child
    finally:
        with trio.CancelScope(shield=True):
            await child.end()
