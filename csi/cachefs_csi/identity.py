"""The identity service: who this is, and whether what it speaks for answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio
from google.protobuf.wrappers_pb2 import BoolValue

import cachefs
from cachefs.model import CachefsError
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.codes import CallError, Code, code_of

logger = logging.getLogger(__name__)

PROBE_S = 5.0


class Identity:
    """`ask`: raises a CachefsError when what the driver needs (master, mount service) does not answer."""

    def __init__(self, name: str, ask: Callable[[], Awaitable[object]]) -> None:
        self._name = name
        self._ask = ask

    async def get_plugin_info(self, request: pb.GetPluginInfoRequest) -> pb.GetPluginInfoResponse:
        return pb.GetPluginInfoResponse(name=self._name, vendor_version=cachefs.__version__)

    async def get_plugin_capabilities(
        self, request: pb.GetPluginCapabilitiesRequest
    ) -> pb.GetPluginCapabilitiesResponse:
        service, expansion = pb.PluginCapability.Service, pb.PluginCapability.VolumeExpansion
        return pb.GetPluginCapabilitiesResponse(
            capabilities=[
                pb.PluginCapability(service=service(type=service.Type.CONTROLLER_SERVICE)),
                pb.PluginCapability(volume_expansion=expansion(type=expansion.Type.ONLINE)),
            ]
        )

    async def probe(self, request: pb.ProbeRequest) -> pb.ProbeResponse:
        """Asks, each time. Not ready yet is no error; what does not mend itself is FAILED_PRECONDITION."""
        try:
            why = await self._why_not()
        except CachefsError as error:
            raise CallError(Code.FAILED_PRECONDITION, str(error)) from error
        if why is not None:
            logger.warning("not ready error=%s", why)
        return pb.ProbeResponse(ready=BoolValue(value=why is None))

    async def why_not_ready(self) -> str | None:
        """For monitoring; None: it is."""
        try:
            return await self._why_not()
        except CachefsError as error:
            return str(error)

    async def _why_not(self) -> str | None:
        """What may mend itself; raises CachefsError for what does not."""
        try:
            with trio.fail_after(PROBE_S):
                await self._ask()
        except CachefsError as error:
            if code_of(error) is not Code.UNAVAILABLE:
                raise
            return str(error)
        except trio.TooSlowError:
            return f"no answer within {PROBE_S:g} s"
        return None
