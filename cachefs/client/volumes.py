"""Volumes, for who makes and removes them by name: the driver of an orchestrator, and tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from cachefs.client.patience import patiently
from cachefs.net import Address, Hello, Pool, Security, open_pool
from cachefs.wire import Request
from cachefs.wire.volumes import (
    MOST_LISTED,
    CreateVolume,
    DeleteVolume,
    GetVolume,
    ListVolumes,
    RenewVolume,
    SetVolumeQuota,
    VolumeInfo,
    VolumeList,
)

R = TypeVar("R")

_CONNECT_TIMEOUT_S = 5.0


class Volumes:
    """Made by `open_volumes`; called from one trio thread, by many tasks if need be.

    Every method waits out a restart of the master, as every request may be repeated: it raises TransportError when the
    master is away for longer. What else is raised stands with the messages. Cancelled, the request may have been
    carried out; the same again finds it done.
    """

    def __init__(self, master: Pool, patience_s: float) -> None:
        self._master = master
        self._patience_s = patience_s

    def with_patience(self, patience_s: float) -> Volumes:
        """The same master, asked by somebody who waits as long."""
        return Volumes(self._master, patience_s)

    async def create(
        self,
        name: str,
        *,
        url: str = "",
        path: str = "",
        options: Mapping[str, str] | None = None,
        quota_bytes: int = 0,
        context: Mapping[str, str] | None = None,
        replaces_options: bool = False,
    ) -> VolumeInfo:
        """As `CreateVolume`."""
        its = dict(options or {})
        request = CreateVolume(name, url, path, its, quota_bytes, dict(context or {}), replaces_options)
        return await self._ask(request)

    async def delete(self, volume_id: str) -> None:
        """As `DeleteVolume`."""
        await self._ask(DeleteVolume(volume_id))

    async def get(self, volume_id: str) -> VolumeInfo:
        """As `GetVolume`."""
        return await self._ask(GetVolume(volume_id))

    async def list(self, after: str = "", limit: int = MOST_LISTED) -> VolumeList:
        """As `ListVolumes`."""
        return await self._ask(ListVolumes(after, limit))

    async def set_quota(self, volume_id: str, quota_bytes: int) -> VolumeInfo:
        """As `SetVolumeQuota`."""
        return await self._ask(SetVolumeQuota(volume_id, quota_bytes))

    async def renew(self, volume_id: str, options: Mapping[str, str]) -> VolumeInfo:
        """As `RenewVolume`."""
        return await self._ask(RenewVolume(volume_id, dict(options)))

    async def _ask(self, request: Request[R]) -> R:
        return (await patiently(lambda: self._master.call(request), self._patience_s)).message


@asynccontextmanager
async def open_volumes(
    master: Address, security: Security | None = None, *, patience_s: float = 30.0
) -> AsyncGenerator[Volumes, None]:
    """For as long as the block lasts; connects when it is first used. `security` presents an admin's token, but for
    `get` and `list`. `patience_s`: how long a master that is away is waited for.
    """
    async with open_pool(master, Hello(role="client"), _CONNECT_TIMEOUT_S, security) as pool:
        yield Volumes(pool, patience_s)
