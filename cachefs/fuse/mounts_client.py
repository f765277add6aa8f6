"""The mount service of this node, for who asks it for mounts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from cachefs.client.patience import patiently
from cachefs.net import Hello, Pool, UnixAddress, open_pool
from cachefs.wire.mounts import EnsureMount, ListMounts, MountState, RemoveMount


class NodeMounts:
    """Made by `open_node_mounts`; called from one trio thread, by many tasks if need be.

    Every method waits out a restart of the service: all of them may be repeated. Raises TransportError when it is away
    for longer. What else is raised stands with the messages. Cancelled, it may have been carried out.
    """

    def __init__(self, service: Pool, patience_s: float) -> None:
        self._service = service
        self._patience_s = patience_s

    def with_patience(self, patience_s: float) -> NodeMounts:
        """The same service, asked by somebody who waits as long."""
        return NodeMounts(self._service, patience_s)

    async def ensure(
        self, mount_id: str, mountpoint: str, path: str, options: Mapping[str, str] | None = None
    ) -> MountState:
        """As `EnsureMount`."""
        request = EnsureMount(mount_id, mountpoint, path, dict(options or {}))
        return (await patiently(lambda: self._service.call(request), self._patience_s)).message

    async def remove(self, mountpoint: str) -> None:
        """As `RemoveMount`."""
        await patiently(lambda: self._service.call(RemoveMount(mountpoint)), self._patience_s)

    async def list(self) -> list[MountState]:
        """As `ListMounts`."""
        return (await patiently(lambda: self._service.call(ListMounts()), self._patience_s)).message.mounts


@asynccontextmanager
async def open_node_mounts(socket_path: str, *, patience_s: float = 30.0) -> AsyncGenerator[NodeMounts, None]:
    """For as long as the block lasts; connects when it is first used."""
    async with open_pool(UnixAddress(socket_path), Hello(role="client")) as pool:
        yield NodeMounts(pool, patience_s)
