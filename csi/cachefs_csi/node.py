"""The node service: what kubelet asks for is checked here, found at the master where need be, and done by
`NodeVolumes`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import xxhash

from cachefs.client.volumes import Volumes
from cachefs.fuse.mounts_client import NodeMounts
from cachefs.model import HandshakeError, TransportError
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.capabilities import READERS, Mode, check, options_of
from cachefs_csi.codes import CallError, Code, invalid, missing
from cachefs_csi.node_volumes import NodeVolumes
from cachefs_csi.parameters import Source, options_of_secrets, source_of

logger = logging.getLogger(__name__)

_Type = pb.NodeServiceCapability.RPC.Type
_CAN = (
    _Type.STAGE_UNSTAGE_VOLUME,
    _Type.GET_VOLUME_STATS,
    _Type.VOLUME_CONDITION,
    _Type.VOLUME_MOUNT_GROUP,
)
_EPHEMERAL = "csi.storage.k8s.io/ephemeral"
_MOUNT_OPTIONS = "mountOptions"
"""An attribute: where Kubernetes has no field for them."""
_MADE = re.compile("vol-[0-9a-f]{32}")
"""Ids that the master gives."""


@dataclass(frozen=True)
class NodeConfig:
    node_id: str
    driver_name: str
    may_attach: bool = False
    """Whether static volumes may name an under-store by its URL: the driver makes them at the master, as an admin."""
    inline_urls: bool = False
    """The same for volumes that stand in the description of a pod: whoever may make pods may attach then."""
    max_volumes: int = 0
    """0: Kubernetes need not count them."""
    labels: Mapping[str, str] = field(default_factory=dict)


class Node:
    def __init__(self, config: NodeConfig, volumes: Volumes, mounts: NodeMounts, node_volumes: NodeVolumes) -> None:
        """`volumes`: asked as an admin where the configuration lets it attach."""
        self._config = config
        self._volumes = volumes
        self._mounts = mounts
        self._on_node = node_volumes

    async def node_stage_volume(self, request: pb.NodeStageVolumeRequest) -> pb.NodeStageVolumeResponse:
        _check_given(request, "volume_id", "staging_target_path", "volume_capability")
        check(request.volume_capability)
        options = options_of(request.volume_capability, request.volume_context.get(_MOUNT_OPTIONS, ""))
        path = await self._path_of(request.volume_id, request.volume_context, request.secrets)
        options = await self._with_group(request.staging_target_path, request.volume_capability, options)
        await self._on_node.stage(request.volume_id, path, options, request.staging_target_path)
        return pb.NodeStageVolumeResponse()

    async def node_unstage_volume(self, request: pb.NodeUnstageVolumeRequest) -> pb.NodeUnstageVolumeResponse:
        _check_given(request, "volume_id", "staging_target_path")
        await self._on_node.unstage(request.volume_id, request.staging_target_path)
        return pb.NodeUnstageVolumeResponse()

    async def node_publish_volume(self, request: pb.NodePublishVolumeRequest) -> pb.NodePublishVolumeResponse:
        _check_given(request, "volume_id", "target_path", "volume_capability")
        if request.volume_context.get(_EPHEMERAL) == "true":
            await self._publish_inline(request)
            return pb.NodePublishVolumeResponse()
        check(request.volume_capability)
        if not request.staging_target_path:
            raise CallError(Code.FAILED_PRECONDITION, "staging_target_path is missing: volumes are staged first")
        options_of(request.volume_capability, request.volume_context.get(_MOUNT_OPTIONS, ""))
        await self._on_node.publish(request.volume_id, request.staging_target_path, request.target_path)
        return pb.NodePublishVolumeResponse()

    async def _publish_inline(self, request: pb.NodePublishVolumeRequest) -> None:
        capability = request.volume_capability
        # Kubernetes says of each of them that it is written, as their description has no access mode.
        if not request.readonly and capability.access_mode.mode not in READERS:
            raise invalid("readonly", False, "readOnly: true in the pod's csi volume, as mounts are read-only")
        as_reader = pb.VolumeCapability()
        as_reader.CopyFrom(capability)
        as_reader.access_mode.mode = Mode.SINGLE_NODE_READER_ONLY
        check(as_reader)
        options = options_of(capability, request.volume_context.get(_MOUNT_OPTIONS, ""))
        if capability.mount.volume_mount_group:
            options.setdefault("gid", capability.mount.volume_mount_group)
        source = _source_of(request.volume_context, request.secrets)
        if source.url:
            if not self._config.inline_urls:
                accepted = "a path, as volumes in pods may name no under-store (--inline-urls is not given)"
                raise invalid("volumeAttributes.url", "given", accepted)
            what = "\0".join([source.url, *(f"{key}={value}" for key, value in sorted(source.options.items()))])
            path = await self._attached(f"inline/{xxhash.xxh3_128_hexdigest(what.encode())}", source)
        else:
            path = source.path
        await self._on_node.publish_alone(request.volume_id, path, options, request.target_path)

    async def node_unpublish_volume(self, request: pb.NodeUnpublishVolumeRequest) -> pb.NodeUnpublishVolumeResponse:
        _check_given(request, "volume_id", "target_path")
        await self._on_node.unpublish(request.volume_id, request.target_path)
        return pb.NodeUnpublishVolumeResponse()

    async def node_get_volume_stats(self, request: pb.NodeGetVolumeStatsRequest) -> pb.NodeGetVolumeStatsResponse:
        _check_given(request, "volume_id", "volume_path")
        found = await self._on_node.usage(request.volume_path)
        if found.why_abnormal:
            condition = pb.VolumeCondition(abnormal=True, message=found.why_abnormal)
            return pb.NodeGetVolumeStatsResponse(volume_condition=condition)
        unit = pb.VolumeUsage.Unit
        sizes = (
            (unit.BYTES, found.total_bytes, found.available_bytes),
            (unit.INODES, found.total_inodes, found.free_inodes),
        )
        return pb.NodeGetVolumeStatsResponse(
            usage=[
                pb.VolumeUsage(unit=each, total=total, available=available, used=max(0, total - available))
                for each, total, available in sizes
            ],
            volume_condition=pb.VolumeCondition(abnormal=False, message="it answers"),
        )

    async def node_get_capabilities(self, request: pb.NodeGetCapabilitiesRequest) -> pb.NodeGetCapabilitiesResponse:
        capability, rpc = pb.NodeServiceCapability, pb.NodeServiceCapability.RPC
        return pb.NodeGetCapabilitiesResponse(capabilities=[capability(rpc=rpc(type=each)) for each in _CAN])

    async def node_get_info(self, request: pb.NodeGetInfoRequest) -> pb.NodeGetInfoResponse:
        config = self._config
        segments = {f"topology.{config.driver_name}/{name}": value for name, value in config.labels.items()}
        return pb.NodeGetInfoResponse(
            node_id=config.node_id,
            max_volumes_per_node=config.max_volumes,
            accessible_topology=pb.Topology(segments=segments) if segments else None,
        )

    # ---- finding it ------------------------------------------------------------------------------------------------

    async def _path_of(self, volume_id: str, context: Mapping[str, str], secrets: Mapping[str, str]) -> str:
        """Of the namespace."""
        if _MADE.fullmatch(volume_id) and not context.get("url"):
            if secrets:
                await self._renew(volume_id, secrets)
            return context.get("path") or (await self._volumes.get(volume_id)).path
        source = _source_of(context, secrets)
        if not source.url:
            return source.path
        if not self._config.may_attach:
            accepted = "a path, as this driver may attach no under-store (--may-attach is not given)"
            raise invalid("volumeAttributes.url", "given", accepted)
        # Its Secret may have been renewed since it was staged at first, here or on another node.
        return await self._attached(f"static/{volume_id}", source, replaces_options=True)

    async def _renew(self, volume_id: str, secrets: Mapping[str, str]) -> None:
        """The Secret of its class may have been renewed since it was made, or staged last."""
        if not self._config.may_attach:
            logger.warning("the Secret of the stage is not used, see --may-attach volume_id=%s", volume_id)
            return
        try:
            await self._volumes.renew(volume_id, options_of_secrets(secrets))
        except HandshakeError:
            raise
        except TransportError as error:
            # A pod whose data is cached need not wait for a master to come back.
            logger.warning("the Secret of the stage is not used, the master is away error=%s", error)

    async def _attached(self, name: str, source: Source, *, replaces_options: bool = False) -> str:
        made = await self._volumes.create(
            name, url=source.url, options=source.options, replaces_options=replaces_options
        )
        return made.path

    async def _with_group(
        self, staging: str, capability: pb.VolumeCapability, options: dict[str, str]
    ) -> dict[str, str]:
        """With the group of the pod that comes first: pods of other groups share the mount, which all may read."""
        if "gid" in options:
            return options
        found = next((each for each in await self._mounts.list() if each.mountpoint == staging), None)
        group = capability.mount.volume_mount_group if found is None else found.options.get("gid", "")
        return {**options, "gid": group} if group else options


def _source_of(context: Mapping[str, str], secrets: Mapping[str, str]) -> Source:
    return source_of(context, secrets, "volumeAttributes", known=[_MOUNT_OPTIONS])


def _check_given(request: object, *names: str) -> None:
    for name in names:
        value = getattr(request, name)
        if not value.ByteSize() if hasattr(value, "ByteSize") else not value:
            raise missing(name)
