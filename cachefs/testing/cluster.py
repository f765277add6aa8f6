"""A master, a worker and clients in one process, talking over real sockets: for tests that look inside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from cachefs.client import Client, ClientConfig, open_client
from cachefs.master import MasterConfig, run_master
from cachefs.metrics import Monitor
from cachefs.model import KiB, MiB
from cachefs.net import Address, Role, Security, TcpAddress, UnixAddress, open_background, open_peer
from cachefs.store import TierConfig
from cachefs.testing.ports import hold_port, port_of
from cachefs.wire import Hello
from cachefs.wire.messages import GetWorkerStatus, WorkerStatus
from cachefs.worker import WorkerConfig, run_worker

PAGE = 64 * KiB
BLOCK = 16 * PAGE
LOOPBACK = TcpAddress("127.0.0.1", 0)


class TestCluster:
    """Made by `running_cluster`. Parts can be stopped and started one by one."""

    __test__ = False

    def __init__(
        self, directory: Path, master: MasterConfig, worker: WorkerConfig, nursery: trio.Nursery, ports: ExitStack
    ) -> None:
        """`ports`: closed when nothing of it runs any more."""
        self.directory = directory
        self.master_config = master
        self.worker_config = worker
        self.worker_address: Address = worker.listen
        """Its TCP address, once it runs."""
        self.monitors: dict[str, Monitor] = {}
        """Of the parts, by role, as they were last started."""
        self.workers: dict[str, WorkerConfig] = {}
        """Those that `add_worker` started."""
        self._nursery = nursery
        self._scopes: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._ports = ports

    @property
    def master_address(self) -> Address:
        return self.master_config.listen

    async def start_master(self) -> None:
        """On the port it had, if it ran before."""
        self.master_config = replace(self.master_config, listen=self._held(self.master_config.listen))
        (address,) = await self._nursery.start(self._run, "master", run_master, self.master_config)
        self.master_config = replace(self.master_config, listen=address)
        self.worker_config = replace(self.worker_config, master=address)

    async def start_worker(self) -> None:
        self.worker_address, _ = await self._nursery.start(self._run, "worker", run_worker, self.worker_config)

    async def add_worker(self, name: str, **changes: object) -> WorkerConfig:
        """One more, with a tier as large as that of the first in a directory of its own. `stop(name)` ends it."""
        (tier,) = self.worker_config.tiers
        config = replace(
            self.worker_config,
            name=name,
            listen=LOOPBACK,
            socket=str(self.directory / f"{name}.sock"),
            tiers=(replace(tier, path=str(self.directory / f"{name}.tier")),),
        )
        config = replace(config, **changes)  # type: ignore[arg-type]
        config = replace(config, listen=self._held(config.listen))
        public, _ = await self._nursery.start(self._run, name, run_worker, config)
        config = self.workers[name] = replace(config, listen=public)
        return config

    def _held(self, listen: Address) -> Address:
        """With a port that stays ours while whoever listens there is stopped."""
        if not isinstance(listen, TcpAddress) or listen.port:
            return listen
        return TcpAddress(listen.host, port_of(self._ports.enter_context(hold_port(listen.host))))

    async def start_again(self, name: str) -> None:
        """A worker that `add_worker` started and `stop` ended, at the address it had."""
        await self._nursery.start(self._run, name, run_worker, self.workers[name])

    async def stop(self, role: str) -> None:
        scope, ended = self._scopes.pop(role)
        scope.cancel()
        await ended.wait()

    async def _run(self, role: str, run: object, config: object, task_status: trio.TaskStatus[object]) -> None:
        scope, ended = self._scopes[role] = (trio.CancelScope(), trio.Event())
        monitor = self.monitors[role] = Monitor(role)
        try:
            with scope:
                await run(config, monitor, task_status=task_status)  # type: ignore[operator]
        finally:
            ended.set()

    @asynccontextmanager
    async def client(self, **changes: object) -> AsyncIterator[Client]:
        security = self.master_config.security
        config = ClientConfig(
            self.master_address,
            self.worker_config.socket,
            security=security and security.presenting(Role.CLIENT),
            patience_s=10.0,
        )
        async with open_client(replace(config, **changes)) as client:  # type: ignore[arg-type]
            yield client

    async def worker_status(self, name: str = "worker") -> WorkerStatus:
        config = self.workers.get(name, self.worker_config)
        async with open_peer(UnixAddress(config.socket), Hello("client")) as peer:
            return (await peer.call(GetWorkerStatus())).message


@asynccontextmanager
async def running_cluster(
    directory: Path,
    url: str,
    *,
    ufs_options: Mapping[str, str] | None = None,
    master: Mapping[str, object] | None = None,
    worker: Mapping[str, object] | None = None,
    security: Security | None = None,
) -> AsyncIterator[TestCluster]:
    """Serves `url` at the root, in pages of 64 KiB and blocks of 1 MiB; `master` and `worker` change their settings.

    `security`: of all of them, each in its own role.
    """
    master_config = MasterConfig(
        data_dir=str(directory / "master"),
        listen=LOOPBACK,
        mounts=(("/", url),),
        ufs_options=dict(ufs_options or {}),
        security=security,
        page_size=PAGE,
        block_size=BLOCK,
    )
    worker_config = WorkerConfig(
        name="worker",
        master=LOOPBACK,
        listen=LOOPBACK,
        socket=str(directory / "worker.sock"),
        security=security and security.presenting(Role.WORKER),
        tiers=(TierConfig("ssd", str(directory / "tier"), 64 * MiB),),
    )
    with ExitStack() as ports:
        async with open_background() as nursery:
            cluster = TestCluster(
                directory,
                replace(master_config, **(master or {})),  # type: ignore[arg-type]
                replace(worker_config, **(worker or {})),  # type: ignore[arg-type]
                nursery,
                ports,
            )
            await cluster.start_master()
            await cluster.start_worker()
            yield cluster
