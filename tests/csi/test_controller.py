"""The controller service: what csi-sanity asks of one, and what else there is to get wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cachefs_csi import csi_pb2 as pb

GiB = 1 << 30
CLONE = pb.VolumeContentSource(volume=pb.VolumeContentSource.VolumeSource(volume_id="v"))


def with_options(*flags: str) -> list[pb.VolumeCapability]:
    """As the provisioner asks for a class that has these `mountOptions`."""
    mode = pb.VolumeCapability.AccessMode.Mode.MULTI_NODE_READER_ONLY
    mount = pb.VolumeCapability.MountVolume(mount_flags=flags)
    return [pb.VolumeCapability(mount=mount, access_mode=pb.VolumeCapability.AccessMode(mode=mode))]


def made(rig: Any, name: str, **changes: Any) -> Any:
    return rig.controller.call("CreateVolume", **fields(rig, name, **changes)).volume


def fields(rig: Any, name: str, size: int = GiB, /, **changes: Any) -> dict[str, Any]:
    given = {"capacity_range": pb.CapacityRange(required_bytes=size)} if size else {}
    parameters = {"path": "/two", "quota": "none"}
    return {"name": name, "volume_capabilities": [rig.READER], "parameters": parameters, **given, **changes}


def own(rig: Any, **parameters: str) -> dict[str, Any]:
    """Of a volume with an under-store of its own."""
    return {"parameters": {"url": rig.s3_url, **parameters}, "secrets": rig.secrets}


def remove(rig: Any, volume_id: str) -> None:
    rig.controller.call("DeleteVolume", volume_id=volume_id)


def test_capabilities(rig: Any) -> None:
    found = rig.controller.call("ControllerGetCapabilities").capabilities
    names = {pb.ControllerServiceCapability.RPC.Type.Name(each.rpc.type) for each in found}
    assert names == {"CREATE_DELETE_VOLUME", "LIST_VOLUMES", "EXPAND_VOLUME", "GET_VOLUME"}


def test_a_volume_is_made_once_and_goes_once(rig: Any) -> None:
    volume = made(rig, "once", **own(rig, subPath="sub"))
    assert volume.capacity_bytes == GiB and volume.volume_context["path"] == f"/volumes/{volume.volume_id}"
    rig.controller.kill_and_start()
    assert made(rig, "once", **own(rig, subPath="sub")) == volume
    got = rig.controller.call("ControllerGetVolume", volume_id=volume.volume_id)
    assert got.volume == volume and not got.status.volume_condition.abnormal
    for _ in range(2):
        remove(rig, volume.volume_id)
    assert rig.controller.refused("ControllerGetVolume", volume_id=volume.volume_id)[0] == "NOT_FOUND"


def test_the_same_at_once_is_one_volume(rig: Any) -> None:
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: made(rig, "at once", **own(rig)).volume_id, range(6)))
    assert len(set(found)) == 1
    remove(rig, found[0])


def test_a_name_of_128_bytes_and_one_of_1024(rig: Any) -> None:
    for name in ("n" * 128, "ü" * 64, "m" * 1024):
        volume = made(rig, name)
        assert len(volume.volume_id) <= 128
        remove(rig, volume.volume_id)
    assert rig.controller.refused("CreateVolume", **fields(rig, "n" * 1025))[0] == "INVALID_ARGUMENT"


@pytest.mark.parametrize("quota", ["size", "none"])
def test_the_same_name_with_another_size_exists(rig: Any, quota: str) -> None:
    parameters = {"path": "/two", "quota": quota}
    volume = made(rig, f"sized {quota}", parameters=parameters)
    for size in (2 * GiB, 10 * GiB):
        code, message = rig.controller.refused(
            "CreateVolume", **fields(rig, volume_name(quota), size, parameters=parameters)
        )
        assert code == "ALREADY_EXISTS" and str(GiB) in message
    less = {"capacity_range": pb.CapacityRange(limit_bytes=GiB // 2), "parameters": parameters}
    assert rig.controller.refused("CreateVolume", **fields(rig, volume_name(quota), **less))[0] == "ALREADY_EXISTS"
    within = {"capacity_range": pb.CapacityRange(required_bytes=1, limit_bytes=2 * GiB), "parameters": parameters}
    assert made(rig, volume_name(quota), **within) == volume
    remove(rig, volume.volume_id)


def volume_name(quota: str) -> str:
    return f"sized {quota}"


def test_the_same_name_with_another_place_exists(rig: Any) -> None:
    volume = made(rig, "placed")
    code, message = rig.controller.refused(
        "CreateVolume", **fields(rig, "placed", parameters={"path": "/one", "quota": "none"})
    )
    assert code == "ALREADY_EXISTS" and "/one" in message
    remove(rig, volume.volume_id)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"name": ""}, "name"),
        ({"volume_capabilities": []}, "volume_capabilities"),
        ({"volume_capabilities": [pb.VolumeCapability()]}, "mount"),
        ({"parameters": {}}, "neither url nor path"),
        ({"parameters": {"path": "/one", "url": "s3://b/"}}, "both url and path"),
        ({"parameters": {"path": "/one", "colour": "red"}}, "colour: 'red' is not accepted; expected one of url, path"),
        ({"parameters": {"path": "one"}}, "parameters.path"),
        ({"parameters": {"path": "/one", "quota": "half"}}, "size or none"),
        ({"parameters": {"path": "/one", "subPath": "../two"}}, "subPath"),
        ({"parameters": {"path": "/one", "subPath": "${pvc.name}"}}, "--extra-create-metadata"),
        ({"parameters": {"path": "/one", "subPath": "${node}"}}, "no other variables"),
        ({"parameters": {"path": "/one"}, "secrets": {"key": "k"}}, "secrets are for a url"),
        ({"volume_content_source": CLONE}, "volume_content_source"),
        ({"volume_capabilities": with_options("colour=red")}, "colour: 'red' is not accepted; expected one of profile"),
        ({"volume_capabilities": with_options("rw")}, "mountOptions: 'rw'"),
        ({"volume_capabilities": with_options("open-wait=2G")}, "open-wait"),
        ({"volume_capabilities": with_options("profile=training", "attr-timeout=soon")}, "attr-timeout: 'soon'"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused_with_its_name(rig: Any, changes: dict[str, Any], part: str) -> None:
    code, message = rig.controller.refused("CreateVolume", **fields(rig, "refused", **changes))
    assert code == "INVALID_ARGUMENT" and part in message


def test_a_directory_that_is_not_there_is_not_found(rig: Any) -> None:
    assert (
        rig.controller.refused("CreateVolume", **fields(rig, "nowhere", parameters={"path": "/no"}))[0] == "NOT_FOUND"
    )


def test_a_range_that_nothing_is_in_is_out_of_range(rig: Any) -> None:
    for least, most in ((2, 1), (-1, 0), (0, -1)):
        wanted = pb.CapacityRange(required_bytes=least, limit_bytes=most)
        assert (
            rig.controller.refused("CreateVolume", **fields(rig, "range", capacity_range=wanted))[0] == "OUT_OF_RANGE"
        )


@pytest.mark.parametrize(
    "mode",
    ["SINGLE_NODE_WRITER", "MULTI_NODE_SINGLE_WRITER", "MULTI_NODE_MULTI_WRITER", "SINGLE_NODE_SINGLE_WRITER",
     "SINGLE_NODE_MULTI_WRITER"],
)  # fmt: skip
def test_who_wants_to_write_is_told_what_to_ask_for(rig: Any, mode: str) -> None:
    code, message = rig.controller.refused(
        "CreateVolume", **fields(rig, "written", volume_capabilities=[rig.capability(mode)])
    )
    assert code == "INVALID_ARGUMENT" and "read-only" in message and "ReadOnlyMany" in message


def test_block_volumes_are_refused(rig: Any) -> None:
    block = pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=rig.READER.access_mode)
    code, message = rig.controller.refused("CreateVolume", **fields(rig, "block", volume_capabilities=[block]))
    assert code == "INVALID_ARGUMENT" and "volumeMode" in message


def test_wrong_credentials_are_denied_and_told_to_nobody(rig: Any) -> None:
    wrong = {**rig.secrets, "secret": "n0t-the-secret"}
    fields_ = fields(rig, "denied", parameters={"url": rig.s3_url}, secrets=wrong)
    code, message = rig.controller.refused("CreateVolume", **fields_)
    assert "n0t-the-secret" not in message
    assert code in ("PERMISSION_DENIED", "INTERNAL")
    assert "n0t-the-secret" not in rig.controller.log()


def test_the_pvc_names_a_directory_of_the_bucket(rig: Any) -> None:
    known = {"csi.storage.k8s.io/pvc/name": "sub", "csi.storage.k8s.io/pvc/namespace": "csi"}
    volume = made(rig, "templated", **own(rig, subPath="${pvc.name}", **known))
    remove(rig, volume.volume_id)


def test_a_class_may_have_options_of_mounts(rig: Any) -> None:
    wanted = with_options("profile=training", "--open-wait=16M", "xattr", "ro")
    remove(rig, made(rig, "with options", volume_capabilities=wanted).volume_id)


def test_deleting_what_was_never_there_is_done(rig: Any) -> None:
    remove(rig, "reference-of-another-driver")
    assert rig.controller.refused("DeleteVolume")[0] == "INVALID_ARGUMENT"


def test_deleting_a_volume_deletes_no_object(rig: Any, s3_server: Any) -> None:
    before = s3_objects(s3_server)
    remove(rig, made(rig, "kept", **own(rig)).volume_id)
    assert s3_objects(s3_server) == before


def s3_objects(s3_server: Any) -> list[str]:
    client = s3_server.client()
    try:
        return [each["Key"] for each in client.list_objects_v2(Bucket="cachefs-tests", Prefix="csi/")["Contents"]]
    finally:
        client.close()


def test_lists_in_parts_and_from_a_token_whose_volume_is_gone(rig: Any) -> None:
    names = [f"listed {number}" for number in range(5)]
    ids = sorted(made(rig, name).volume_id for name in names)
    found: list[str] = []
    token = ""
    while True:
        part = rig.controller.call("ListVolumes", max_entries=2, starting_token=token)
        assert len(part.entries) <= 2
        found += [each.volume.volume_id for each in part.entries]
        token = part.next_token
        if not token:
            break
        if token in ids:
            remove(rig, token)
    assert [each for each in found if each in ids] == ids
    for each in ids:
        remove(rig, each)


def test_a_token_that_is_none_is_aborted(rig: Any) -> None:
    for token in ("invalid-token", "vol-nonsense"):
        assert rig.controller.refused("ListVolumes", starting_token=token)[0] == "ABORTED"
    assert rig.controller.refused("ListVolumes", max_entries=-1)[0] == "INVALID_ARGUMENT"


def test_validates_what_a_volume_can_be_used_as(rig: Any) -> None:
    volume = made(rig, "validated")
    ask = {"volume_id": volume.volume_id, "volume_context": volume.volume_context}
    found = rig.controller.call("ValidateVolumeCapabilities", volume_capabilities=[rig.READER], **ask)
    assert list(found.confirmed.volume_capabilities) == [rig.READER]
    writer = [rig.capability("MULTI_NODE_MULTI_WRITER")]
    found = rig.controller.call("ValidateVolumeCapabilities", volume_capabilities=writer, **ask)
    assert not found.HasField("confirmed") and "read-only" in found.message
    assert rig.controller.refused("ValidateVolumeCapabilities", **ask)[0] == "INVALID_ARGUMENT"
    assert rig.controller.refused("ValidateVolumeCapabilities", volume_capabilities=writer)[0] == "INVALID_ARGUMENT"
    code, _ = rig.controller.refused("ValidateVolumeCapabilities", volume_id="no", volume_capabilities=writer)
    assert code == "NOT_FOUND"
    remove(rig, volume.volume_id)


def test_expands_a_quota_and_never_shrinks_it(rig: Any) -> None:
    volume = made(rig, "expanded", **own(rig))

    def expand(**sizes: int) -> Any:
        wanted = pb.CapacityRange(**sizes)
        return rig.controller.call("ControllerExpandVolume", volume_id=volume.volume_id, capacity_range=wanted)

    for _ in range(2):
        found = expand(required_bytes=2 * GiB)
        assert found.capacity_bytes == 2 * GiB and not found.node_expansion_required
    assert expand(required_bytes=1).capacity_bytes == 2 * GiB
    assert rig.controller.call("ControllerGetVolume", volume_id=volume.volume_id).volume.capacity_bytes == 2 * GiB
    limit = pb.CapacityRange(limit_bytes=GiB)
    ask = {"volume_id": volume.volume_id, "capacity_range": limit}
    assert rig.controller.refused("ControllerExpandVolume", **ask)[0] == "OUT_OF_RANGE"
    # The provisioner may ask once more for what it asked for at first, with what it was given.
    again = {"capacity_range": pb.CapacityRange(required_bytes=GiB)}
    assert made(rig, "expanded", **own(rig), **again).capacity_bytes == 2 * GiB
    remove(rig, volume.volume_id)
    ask = {"capacity_range": pb.CapacityRange(required_bytes=1)}
    assert rig.controller.refused("ControllerExpandVolume", volume_id=volume.volume_id, **ask)[0] == "NOT_FOUND"
    assert rig.controller.refused("ControllerExpandVolume", **ask)[0] == "INVALID_ARGUMENT"
    assert rig.controller.refused("ControllerExpandVolume", volume_id="v")[0] == "INVALID_ARGUMENT"
