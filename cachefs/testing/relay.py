"""A stand-in for the master, in front of a real one: passes everything on, tells what changed when a test says so, and
holds answers back.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from cachefs.model import Ino
from cachefs.net import Address, Hello, Pool, Service, Session, TcpAddress, open_background, serve
from cachefs.wire.cluster import Locate
from cachefs.wire.messages import (
    Changes,
    GetAttr,
    GetCluster,
    GetMasterStatus,
    ListChunk,
    ListDir,
    ListWorkers,
    Lookup,
    ResolvePath,
    Watch,
)


class Relay:
    """Made by `running_relay`."""

    def __init__(self, master: Pool) -> None:
        self.address: Address
        self.asked: list[Any] = []
        self.held: type[Any] | None = None
        """Requests of this class are answered by the master, but the answer stays here until `go`."""
        self.holding = trio.Event()
        self.go = trio.Event()
        self._scope = trio.CancelScope()
        self._master = master
        self._watchers: list[trio.MemorySendChannel[Changes]] = []

    def tell(self, directory: Ino, *names: str) -> None:
        """That these names changed."""
        self._tell(Changes([(directory, list(names))]))

    def tell_everything(self) -> None:
        self._tell(Changes([], everything=True))

    def _tell(self, changes: Changes) -> None:
        for watcher in self._watchers:
            watcher.send_nowait(changes)

    def hang_up(self) -> None:
        """End every stream of changes."""
        for watcher in self._watchers:
            watcher.close()
        self._watchers.clear()

    def stop(self) -> None:
        """Answer nothing more, on no connection."""
        self._scope.cancel()

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def service(self) -> Service:
        service = Service()
        for request_class in (GetAttr, GetCluster, GetMasterStatus, ListWorkers, Locate, Lookup, ResolvePath):
            service.on(request_class, self._pass_on)
        service.on_stream(ListDir, self._list)
        service.on_stream(Watch, self._watch)
        return service

    async def _pass_on(self, request: Any, session: Session) -> Any:
        self.asked.append(request)
        answer = (await self._master.call(request)).message
        await self._hold(request)
        return answer

    async def _list(self, request: ListDir, session: Session) -> AsyncGenerator[ListChunk, None]:
        self.asked.append(request)
        async with self._master.stream(request) as chunks:
            async for chunk in chunks:
                await self._hold(request)
                yield chunk

    async def _hold(self, request: Any) -> None:
        if self.held is not None and isinstance(request, self.held):
            self.holding.set()
            await self.go.wait()

    async def _watch(self, request: Watch, session: Session) -> AsyncGenerator[Changes, None]:
        send, receive = trio.open_memory_channel[Changes](100_000)
        self._watchers.append(send)
        yield Changes([])
        async for changes in receive:
            yield changes


@asynccontextmanager
async def running_relay(master: Address, namespace_id: str) -> AsyncIterator[Relay]:
    async with open_background() as nursery:
        relay = Relay(Pool(master, Hello("client"), 5.0, nursery))
        hello = Hello("master", namespace_id=namespace_id)

        async def run(task_status: trio.TaskStatus[list[Address]]) -> None:
            with relay._scope:
                await serve(relay.service(), [TcpAddress("127.0.0.1", 0)], hello=hello, task_status=task_status)

        (relay.address,) = await nursery.start(run)
        yield relay
