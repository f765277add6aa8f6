"""The messages, against numbers written down by hand from the specification, and the Python against the protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.generate import PACKAGE, generate


def text(number: int, value: bytes) -> bytes:
    """Field `number` of the wire type for what has a length."""
    return bytes([number << 3 | 2, len(value)]) + value


def number(field: int, value: int) -> bytes:
    return bytes([field << 3, value])


def pair(key: bytes, value: bytes) -> bytes:
    return text(1, key) + text(2, value)


READER = text(2, text(2, b"ro") + text(3, b"7")) + text(3, number(1, 3))
CAPABILITY = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(mount_flags=["ro"], volume_mount_group="7"),
    access_mode=pb.VolumeCapability.AccessMode(mode="MULTI_NODE_READER_ONLY"),
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (pb.GetPluginInfoResponse(name="n", vendor_version="v"), text(1, b"n") + text(2, b"v")),
        (
            pb.CreateVolumeRequest(
                name="n",
                capacity_range=pb.CapacityRange(required_bytes=1, limit_bytes=2),
                volume_capabilities=[CAPABILITY],
                parameters={"a": "b"},
                secrets={"c": "d"},
            ),
            text(1, b"n") + text(2, number(1, 1) + number(2, 2)) + text(3, READER) + text(4, pair(b"a", b"b"))
            + text(5, pair(b"c", b"d")),
        ),
        (
            pb.CreateVolumeResponse(volume=pb.Volume(capacity_bytes=9, volume_id="i", volume_context={"p": "q"})),
            text(1, number(1, 9) + text(2, b"i") + text(3, pair(b"p", b"q"))),
        ),
        (
            pb.NodeStageVolumeRequest(
                volume_id="i", staging_target_path="/s", volume_capability=CAPABILITY, secrets={"c": "d"},
                volume_context={"p": "q"},
            ),
            text(1, b"i") + text(3, b"/s") + text(4, READER) + text(5, pair(b"c", b"d")) + text(6, pair(b"p", b"q")),
        ),
        (
            pb.NodePublishVolumeRequest(
                volume_id="i", staging_target_path="/s", target_path="/t", volume_capability=CAPABILITY, readonly=True,
                secrets={"c": "d"}, volume_context={"p": "q"},
            ),
            text(1, b"i") + text(3, b"/s") + text(4, b"/t") + text(5, READER) + number(6, 1)
            + text(7, pair(b"c", b"d")) + text(8, pair(b"p", b"q")),
        ),
        (
            pb.NodeGetVolumeStatsResponse(
                usage=[pb.VolumeUsage(available=1, total=3, used=2, unit="INODES")],
                volume_condition=pb.VolumeCondition(abnormal=True, message="m"),
            ),
            text(1, number(1, 1) + number(2, 3) + number(3, 2) + number(4, 2)) + text(2, number(1, 1) + text(2, b"m")),
        ),
        (
            pb.NodeGetInfoResponse(
                node_id="n", max_volumes_per_node=5, accessible_topology=pb.Topology(segments={"z": "a"})
            ),
            text(1, b"n") + number(2, 5) + text(3, text(1, pair(b"z", b"a"))),
        ),
        (pb.ListVolumesRequest(max_entries=2, starting_token="t"), number(1, 2) + text(2, b"t")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bytes) else "",
)  # fmt: skip
def test_golden_bytes(message: object, expected: bytes) -> None:
    assert message.SerializeToString(deterministic=True) == expected  # type: ignore[attr-defined]
    assert type(message).FromString(expected) == message  # type: ignore[attr-defined]


def test_the_python_is_what_the_protocol_makes(tmp_path: Path) -> None:
    generate(tmp_path)
    for name in ("csi_pb2.py", "csi_pb2.pyi"):
        assert (tmp_path / name).read_text() == (PACKAGE / name).read_text(), "run: python -m cachefs_csi.generate"
