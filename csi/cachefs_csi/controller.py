"""The controller service: volumes are made, found, resized and taken away in the master, which keeps them. Nothing is
kept here, so that a driver that is started again has forgotten nothing.
"""

from __future__ import annotations

import re

from cachefs.client.volumes import Volumes
from cachefs.model import ConfigError, NotFoundError, volume_id
from cachefs.wire.volumes import MOST_LISTED, VolumeInfo
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.capabilities import check_all, check_options, wanted_bytes, why_not
from cachefs_csi.codes import CallError, Code, invalid, missing
from cachefs_csi.parameters import Source, source_of

_Type = pb.ControllerServiceCapability.RPC.Type
_CAN = (_Type.CREATE_DELETE_VOLUME, _Type.LIST_VOLUMES, _Type.EXPAND_VOLUME, _Type.GET_VOLUME)

_TOKEN = re.compile("vol-[0-9a-f]{32}")

_CAPACITY = "capacity"
"""In a volume's context at the master: its size, where that bounds nothing."""


class Controller:
    def __init__(self, volumes: Volumes) -> None:
        """`volumes`: asked as an admin."""
        self._volumes = volumes

    async def create_volume(self, request: pb.CreateVolumeRequest) -> pb.CreateVolumeResponse:
        if not request.name:
            raise missing("name")
        check_all(request.volume_capabilities)
        # A class with an option that there is not: told with the claim, and not first when a pod waits.
        check_options(request.volume_capabilities)
        if request.HasField("volume_content_source"):
            raise CallError(Code.INVALID_ARGUMENT, "volume_content_source: a volume is made of what is in its bucket")
        if request.mutable_parameters:
            raise invalid("mutable_parameters", sorted(request.mutable_parameters), "none")
        size = wanted_bytes(request.capacity_range)
        source = source_of(request.parameters, request.secrets, "parameters")
        context = {} if source.has_quota or not size else {_CAPACITY: str(size)}
        quota_bytes = size if source.has_quota else 0
        try:
            existing = await self._volumes.get(volume_id(request.name))
        except NotFoundError:
            pass
        else:
            _check_size(existing, source, request)
            # It may have been resized since.
            quota_bytes, context = existing.quota_bytes, existing.context
        info = await self._volumes.create(
            request.name,
            url=source.url,
            path=source.path,
            options=source.options,
            quota_bytes=quota_bytes,
            context=context,
            # The provisioner's Secret may have been renewed since it asked first.
            replaces_options=True,
        )
        return pb.CreateVolumeResponse(volume=volume_of(info))

    async def delete_volume(self, request: pb.DeleteVolumeRequest) -> pb.DeleteVolumeResponse:
        if not request.volume_id:
            raise missing("volume_id")
        try:
            await self._volumes.delete(request.volume_id)
        except ConfigError as error:
            # Another under-store is attached in it.
            raise CallError(Code.FAILED_PRECONDITION, str(error)) from error
        return pb.DeleteVolumeResponse()

    async def validate_volume_capabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        if not request.volume_id:
            raise missing("volume_id")
        if not request.volume_capabilities:
            raise missing("volume_capabilities")
        info = await self._volumes.get(request.volume_id)
        context = dict(request.volume_context)
        whys = [why for each in request.volume_capabilities if (why := why_not(each))]
        if context and context != context_of(info):
            whys.append(f"volume_context: {context} is not that of this volume: {context_of(info)}")
        if whys:
            return pb.ValidateVolumeCapabilitiesResponse(message="; ".join(whys))
        confirmed = pb.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=context, volume_capabilities=request.volume_capabilities, parameters=request.parameters
        )
        return pb.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    async def list_volumes(self, request: pb.ListVolumesRequest) -> pb.ListVolumesResponse:
        if request.max_entries < 0:
            raise invalid("max_entries", request.max_entries, "0 or more")
        after = request.starting_token
        if after and not _TOKEN.fullmatch(after):
            raise CallError(Code.ABORTED, f"starting_token: {after!r} is none of ours; begin again without one")
        found = await self._volumes.list(after, min(request.max_entries or MOST_LISTED, MOST_LISTED))
        entries = [pb.ListVolumesResponse.Entry(volume=volume_of(each)) for each in found.volumes]
        return pb.ListVolumesResponse(entries=entries, next_token=found.next)

    async def controller_get_volume(self, request: pb.ControllerGetVolumeRequest) -> pb.ControllerGetVolumeResponse:
        if not request.volume_id:
            raise missing("volume_id")
        info = await self._volumes.get(request.volume_id)
        status = pb.ControllerGetVolumeResponse.VolumeStatus(
            volume_condition=pb.VolumeCondition(abnormal=False, message="the master knows it")
        )
        return pb.ControllerGetVolumeResponse(volume=volume_of(info), status=status)

    async def controller_expand_volume(
        self, request: pb.ControllerExpandVolumeRequest
    ) -> pb.ControllerExpandVolumeResponse:
        if not request.volume_id:
            raise missing("volume_id")
        if not request.HasField("capacity_range"):
            raise missing("capacity_range")
        size = wanted_bytes(request.capacity_range)
        if not size:
            raise invalid("capacity_range", "0", "at least one byte")
        if request.HasField("volume_capability"):
            check_all([request.volume_capability])
        info = await self._volumes.get(request.volume_id)
        capacity = capacity_of(info)
        most = request.capacity_range.limit_bytes
        if most and capacity > most:
            raise CallError(Code.OUT_OF_RANGE, f"the volume has {capacity} bytes, and volumes do not shrink to {most}")
        if info.quota_bytes and capacity < size:
            capacity = capacity_of(await self._volumes.set_quota(request.volume_id, size))
        return pb.ControllerExpandVolumeResponse(capacity_bytes=max(capacity, size), node_expansion_required=False)

    async def controller_get_capabilities(
        self, request: pb.ControllerGetCapabilitiesRequest
    ) -> pb.ControllerGetCapabilitiesResponse:
        capability, rpc = pb.ControllerServiceCapability, pb.ControllerServiceCapability.RPC
        return pb.ControllerGetCapabilitiesResponse(capabilities=[capability(rpc=rpc(type=each)) for each in _CAN])


def capacity_of(info: VolumeInfo) -> int:
    """Bytes; 0: it was given no size."""
    return info.quota_bytes or int(info.context.get(_CAPACITY, "0"))


def context_of(info: VolumeInfo) -> dict[str, str]:
    """What nodes are told: enough to mount it without asking again."""
    return {"path": info.path}


def volume_of(info: VolumeInfo) -> pb.Volume:
    return pb.Volume(capacity_bytes=capacity_of(info), volume_id=info.id, volume_context=context_of(info))


def _check_size(existing: VolumeInfo, source: Source, request: pb.CreateVolumeRequest) -> None:
    """Raises CallError (ALREADY_EXISTS) when that one's size is not what is asked for."""
    has, least, most = capacity_of(existing), request.capacity_range.required_bytes, request.capacity_range.limit_bytes
    is_bounded = existing.quota_bytes > 0
    if has < least or (most and has > most) or (has and is_bounded is not source.has_quota):
        message = f"volume {request.name!r} exists with {has} bytes, which is not what is asked for"
        raise CallError(Code.ALREADY_EXISTS, message)
