"""A master and workers as processes of their own, that tests kill, stop and start again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from cachefs.client import Client, ClientConfig, open_client
from cachefs.model import BlockId, KiB, MiB
from cachefs.net import Role, Security, TcpAddress, UnixAddress, open_peer, parse_address
from cachefs.store.layout import SUMS_SUFFIX
from cachefs.testing.ports import hold_port, port_of
from cachefs.testing.processes import END_TIMEOUT_S, Running, running
from cachefs.wire import Hello
from cachefs.wire.messages import GetWorkerStatus, WorkerInfo, WorkerStatus

PAGE = 64 * KiB
_TCP_ESTABLISHED = "01"
"""In /proc/net/tcp."""


@dataclass(frozen=True)
class Host:
    """Where a process runs, and what it finds there."""

    listen: str = "127.0.0.1"
    master: str = "127.0.0.1"
    """The master's address as seen from there."""
    prefix: Sequence[str] = ()
    """A program that becomes the process, there."""


class RealCluster:
    """Made by `real_cluster`. "master" is the name of the master's process, workers have names of their own."""

    def __init__(
        self,
        directory: Path,
        url: str,
        ufs_options: Mapping[str, str],
        block_size: int,
        listen: str,
        flags: Sequence[str | Path],
        security: Security | None,
        master_flags: Sequence[str | Path] = (),
        at: str = "/",
    ) -> None:
        self.directory = directory
        self.port = 0
        """Of the master, from its first start on; it keeps it when it is started again."""
        self._held: socket.socket | None = None
        """So that nobody else gets it meanwhile."""
        self.processes: dict[str, Running] = {}
        self._security = security
        self._flags = flags
        self._listen = listen
        self._environment = {"CACHEFS_UFS_OPTIONS": json.dumps(dict(ufs_options))}
        self._master_flags: list[str | Path] = [
            *("--data-dir", directory / "master", "--mount", f"{at}={url}"),
            *("--page-size", str(PAGE), "--block-size", str(block_size)),
            *master_flags,
        ]
        self._stacks: dict[str, ExitStack] = {}

    # ---- processes -------------------------------------------------------------------------------------------------

    async def start_master(self) -> None:
        """On the port it had, if it ran before."""
        if self._held is None:
            self._held = hold_port(self._listen)
            self.port = port_of(self._held)
        await self._start("master", "master", (), *self._master_flags, "--listen", f"{self._listen}:{self.port}")

    async def start_worker(self, name: str, *flags: str | Path, host: Host = Host()) -> Running:
        """With a directory of its own, of 256 MiB unless `flags` name a --tier; the one it had, if it ran before.

        Raises CachefsError when it ends before it is ready, with what it said.
        """
        tier = () if "--tier" in flags else ("--tier", f"ssd:{self.tier(name)}:256M")
        return await self._start(
            name,
            "worker",
            host.prefix,
            *("--name", name, "--master", f"{host.master}:{self.port}", "--listen", f"{host.listen}:0"),
            *("--socket", self.socket(name)),
            *tier,
            *flags,
        )

    async def start_workers(self, *names: str) -> None:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self.start_worker, name)

    async def start_mount(self, name: str, mountpoint: Path, *flags: str | Path) -> Running:
        """On a directory that its caller takes care of. `flags` may name another --master, as a worker's may."""
        return await self._start(name, "mount", (), mountpoint, "--master", f"127.0.0.1:{self.port}", *flags)

    async def _start(self, key: str, role: str, prefix: Sequence[str], *arguments: str | Path) -> Running:
        assert key not in self.processes, key
        stack = ExitStack()

        def start() -> Running:
            log = stack.enter_context(self.log_path(key).open("ab"))
            environment = self._environment if role == "master" else None
            flags = self._flags if "--insecure" not in arguments else ()
            return stack.enter_context(
                running(role, *arguments, *flags, environment=environment, stderr=log, prefix=prefix)
            )

        with trio.CancelScope(shield=True):
            try:
                started = await trio.to_thread.run_sync(start)
            except BaseException:
                stack.close()
                raise
        self.processes[key], self._stacks[key] = started, stack
        return started

    async def kill(self, name: str) -> None:
        """As the kernel does it when memory is short; returns when nothing of it is left."""
        process = self.processes.pop(name).process
        process.kill()
        await trio.to_thread.run_sync(self._stacks.pop(name).close)

    def stop(self, name: str) -> None:
        """It hangs from now on, without being dead."""
        self.processes[name].process.send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        self.processes[name].process.send_signal(signal.SIGCONT)

    def end_all(self) -> None:
        """Raises AssertionError for processes that do not end by themselves, and cleanly; they are gone all the same.

        Also for one that logged a traceback.
        """
        for each in self.processes.values():
            each.process.send_signal(signal.SIGCONT)
            each.process.send_signal(signal.SIGTERM)
        wrong = []
        for name, each in self.processes.items():
            try:
                status = each.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                each.process.kill()
                status = each.process.wait()
            if status != 0:
                wrong.append(f"{name} ended with status {status}")
        for stack in self._stacks.values():
            stack.close()
        if self._held is not None:
            self._held.close()
        for path in self.directory.glob("*.log"):
            if "Traceback" in path.read_text():
                wrong.append(f"{path.name} has a traceback:\n{path.read_text()}")
        wrong += [f"{path} is left" for path in self.directory.glob("*.sock") if path.stem in self.processes]
        assert not wrong, "\n".join(wrong)

    # ---- files -----------------------------------------------------------------------------------------------------

    def tier(self, name: str) -> Path:
        return self.directory / f"{name}.tier"

    def socket(self, name: str) -> Path:
        return self.directory / f"{name}.sock"

    def log_path(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def log(self, name: str) -> str:
        """What a process has said so far, over all its lives."""
        return self.log_path(name).read_text()

    def sealed(self, name: str) -> list[Path]:
        """Data files of the sealed blocks of a worker with one tier."""
        return [path for path in self.tier(name).glob("sealed/*/*") if path.suffix != SUMS_SUFFIX]

    # ---- looking at it ---------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def client(self, worker: str, **changes: object) -> AsyncIterator[Client]:
        """What a mount would be, on the node of that worker."""
        config = ClientConfig(
            TcpAddress("127.0.0.1", self.port),
            str(self.socket(worker)),
            security=self._security and self._security.presenting(Role.CLIENT),
            **changes,  # type: ignore[arg-type]
        )
        async with open_client(config) as client:
            yield client

    async def status(self, name: str) -> WorkerStatus:
        async with open_peer(UnixAddress(str(self.socket(name))), Hello("client")) as peer:
            return (await peer.call(GetWorkerStatus())).message

    async def told(self, client: Client, name: str) -> WorkerInfo:
        """What the master knows of a worker."""
        return next(each for each in (await client.master_status()).workers if each.name == name)

    async def until_alive(self, client: Client, *names: str, alive: bool = True) -> None:
        """Returns when the master says so of all of them."""
        for name in names:
            while (await self.told(client, name)).connected is not alive:  # noqa: ASYNC110
                await trio.sleep(0.05)

    def connections_to(self, name: str) -> int:
        """How many others are connected to a worker's port."""
        address = parse_address(self.processes[name].facts["listen"])
        assert isinstance(address, TcpAddress)
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        local = f":{address.port:04X}"
        return sum(row[1].endswith(local) and row[3] == _TCP_ESTABLISHED for row in rows)


@asynccontextmanager
async def real_cluster(
    directory: Path,
    url: str,
    *,
    workers: Sequence[str] = (),
    ufs_options: Mapping[str, str] | None = None,
    block_size: int = 256 * MiB,
    listen: str = "127.0.0.1",
    flags: Sequence[str | Path] = ("--insecure",),
    security: Security | None = None,
    master_flags: Sequence[str | Path] = (),
    at: str = "/",
) -> AsyncIterator[RealCluster]:
    """Serves `url` at that path, in pages of 64 KiB, by a master and `workers` that are ready and know each other.

    `flags`: of all processes; `security`: of the clients that `RealCluster.client` makes.
    """
    cluster = RealCluster(directory, url, ufs_options or {}, block_size, listen, flags, security, master_flags, at)
    try:
        await cluster.start_master()
        await cluster.start_workers(*workers)
        yield cluster
    finally:
        cluster.end_all()


async def read_all(client: Client, path: str, chunk: int = PAGE) -> bytes:
    """The content at a path, as a reader of a mount would get it: a sealed file as a whole, another piece by piece."""
    attr = await client.metadata.resolve(path)
    fd = client.open_sealed(attr)
    if fd is not None:
        try:
            return os.pread(fd, attr.size_bytes + 1, 0)
        finally:
            os.close(fd)
    reader = client.open_content(attr)
    try:
        return b"".join([bytes(await reader.read(offset, chunk)) for offset in range(0, attr.size_bytes, chunk)])
    finally:
        reader.close()


async def kept_bytes(client: Client, path: str) -> int:
    """How much of a content of one block this client's worker has, complete or not."""
    attr = await client.metadata.resolve(path)
    return (await client.view.block_status(BlockId(attr.key, 0))).cached_bytes


async def promoted(client: Client, path: str) -> bytes:
    """The content at a path, after it was asked to be kept."""
    await client.promote((await client.metadata.resolve(path)).ino)
    return await read_all(client, path)
