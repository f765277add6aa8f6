"""What a volume can be used as: a file system that is read. Everything else is refused, with what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cachefs.cli.mount_options import arguments_of
from cachefs_csi.codes import CallError, Code, invalid, missing
from cachefs_csi.csi_pb2 import CapacityRange, VolumeCapability

Mode = VolumeCapability.AccessMode.Mode

_FLAG = re.compile("(?:--)?([a-z][a-z-]*)(?:=(.*))?", re.DOTALL)

READERS = frozenset({Mode.MULTI_NODE_READER_ONLY, Mode.SINGLE_NODE_READER_ONLY})


def why_not(capability: VolumeCapability) -> str:
    """Why a volume cannot be used like that; "": it can."""
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        return "volumes are file systems: volumeMode must be Filesystem"
    if capability.access_mode.mode not in READERS:
        return (
            f"access mode {Mode.Name(capability.access_mode.mode)} writes, and mounts are read-only: "
            "accessModes must be [ReadOnlyMany]"
        )
    fs_type = capability.mount.fs_type
    return "" if fs_type in ("", "fuse.cachefs") else f"fsType {fs_type!r} is none of ours: leave it out"


def check(capability: VolumeCapability) -> None:
    """Raises CallError (INVALID_ARGUMENT)."""
    if capability.WhichOneof("access_type") is None:
        raise missing("volume_capability.mount")
    if capability.access_mode.mode == Mode.UNKNOWN:
        raise missing("volume_capability.access_mode")
    why = why_not(capability)
    if why:
        raise CallError(Code.INVALID_ARGUMENT, why)


def check_all(capabilities: Iterable[VolumeCapability]) -> None:
    """As `check`; there has to be one."""
    capabilities = list(capabilities)
    if not capabilities:
        raise missing("volume_capabilities")
    for each in capabilities:
        check(each)


def options_of(capability: VolumeCapability, more: str = "") -> dict[str, str]:
    """Of the mount, by the names of the flags of `cachefs mount`, whose values the mount service checks; `more` of them
    with commas between. Raises CallError.
    """
    found: dict[str, str] = {}
    for flag in [*(each for each in more.split(",") if each), *capability.mount.mount_flags]:
        if flag == "ro":
            continue
        match = _FLAG.fullmatch(flag)
        if match is None or flag == "rw":
            raise invalid("mountOptions", flag, "NAME=VALUE with the name of a flag of cachefs mount, or ro")
        name, value = match[1], match[2] or ""
        if found.setdefault(name, value) != value:
            raise invalid("mountOptions", flag, f"one value of {name}")
    return found


def check_options(capabilities: Iterable[VolumeCapability]) -> None:
    """As the mount service of a node will, when a pod waits for it. Raises CallError, ConfigError."""
    for each in capabilities:
        arguments_of(options_of(each))


def wanted_bytes(wanted: CapacityRange) -> int:
    """The smallest size in the range; 0: any will do. Raises CallError (OUT_OF_RANGE)."""
    required, limit = wanted.required_bytes, wanted.limit_bytes
    if required < 0 or limit < 0 or (limit and required > limit):
        raise CallError(Code.OUT_OF_RANGE, f"capacity_range: nothing is at least {required} and at most {limit} bytes")
    return required or limit
