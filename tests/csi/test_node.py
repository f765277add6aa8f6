"""The node service in the order in which kubelet asks, in others, and with everything that can be missing or wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.node import Node, NodeConfig
from cachefs_csi.node_volumes import NodeVolumes

from cachefs.client import open_volumes
from cachefs.fuse import find_mount, open_mount, open_node_mounts, unmount
from cachefs.net import TcpAddress

INLINE = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "pod"}


def test_info_and_capabilities(rig: Any) -> None:
    info = rig.node.call("NodeGetInfo")
    assert (info.node_id, info.max_volumes_per_node) == ("node-1", 7)
    segments = {"topology.csi.cachefs.io/zone": "a", "topology.csi.cachefs.io/rack": "r1"}
    assert dict(info.accessible_topology.segments) == segments
    found = rig.node.call("NodeGetCapabilities").capabilities
    names = {pb.NodeServiceCapability.RPC.Type.Name(each.rpc.type) for each in found}
    assert names == {"STAGE_UNSTAGE_VOLUME", "GET_VOLUME_STATS", "VOLUME_CONDITION", "VOLUME_MOUNT_GROUP"}


def test_the_sequence_of_kubelet_with_every_step_repeated(rig: Any, pods: Any) -> None:
    for _ in range(2):
        pods.stage()
    for name in ("first", "second", "first"):
        target = pods.publish(name)
        assert pods.shown(target) == b"one"
        found = find_mount(target)
        assert found is not None and {"ro", "nosuid", "nodev"} <= found.options
        with pytest.raises(OSError) as refused:
            Path(target, "new").touch()
        assert refused.value.errno == errno.EROFS
    code, message = rig.node.refused("NodeUnstageVolume", volume_id=pods.volume_id, staging_target_path=pods.staging)
    assert code == "FAILED_PRECONDITION" and pods.target("first") in message
    for name in ("first", "first", "second"):
        pods.unpublish(name)
        assert not os.path.lexists(pods.target(name))
    for _ in range(2):
        pods.unstage()
    assert pods.mounted() == []


def test_the_whole_life_of_a_volume_that_the_controller_made(rig: Any, pods: Any) -> None:
    asked = {"parameters": {"url": rig.s3_url, "subPath": "sub"}, "secrets": rig.secrets}
    size = pb.CapacityRange(required_bytes=1 << 30)
    volume = rig.controller.call(
        "CreateVolume", name=pods.volume_id, volume_capabilities=[rig.READER], capacity_range=size, **asked
    ).volume
    pods.volume_id = volume.volume_id
    # As the provisioner hands it on; and without anything, as somebody writes it by hand.
    for context in ({**volume.volume_context, "storage.kubernetes.io/csiProvisionerIdentity": "p"}, {}):
        pods.context = context
        pods.stage()
        assert pods.shown(pods.publish("pod")) == b"of the directory"
        pods.unpublish("pod")
        pods.unstage()
    rig.controller.call("DeleteVolume", volume_id=volume.volume_id)
    assert rig.node.refused("NodeStageVolume", volume_id=volume.volume_id, staging_target_path=pods.staging,
                            volume_capability=rig.READER)[0] == "NOT_FOUND"  # fmt: skip


def test_the_same_at_once_is_done_once(rig: Any, pods: Any) -> None:
    with ThreadPoolExecutor(12) as threads:
        for each in [threads.submit(pods.stage) for _ in range(4)]:
            each.result()
        for each in [threads.submit(pods.publish, f"pod-{number % 3}") for number in range(12)]:
            each.result()
        assert len(pods.mounted()) == 4
        for each in [threads.submit(pods.unpublish, f"pod-{number % 3}") for number in range(12)]:
            each.result()
    assert pods.mounted() == [pods.staging]


@pytest.mark.parametrize("moment_s", [None, 0.0, 0.01, 0.05, 0.2])
def test_the_plugin_is_killed_between_and_during_calls(rig: Any, pods: Any, moment_s: float | None) -> None:
    """None: between them. Whatever it had done, the same calls again do the rest."""

    def killed_during(method: str, **fields: Any) -> None:
        if moment_s is not None:
            call = rig.node.future(method, **fields)
            # Steps of a call take from under a millisecond (a bind mount) to a few tenths of a second (a server that
            # starts), and are no events that are seen from here: these moments fall into different ones of them. The
            # test holds at whichever.
            time.sleep(moment_s)
            rig.node.end(signal.SIGKILL)
            with suppress(grpc.RpcError, grpc.FutureCancelledError):  # or it was answered before the kill
                call.result()
            rig.node.start()
        else:
            rig.node.kill_and_start()
        rig.node.call(method, **fields)

    volume = {"volume_id": pods.volume_id}
    stage = {"staging_target_path": pods.staging, "volume_capability": rig.READER, "volume_context": pods.context}
    killed_during("NodeStageVolume", **volume, **stage)
    killed_during("NodePublishVolume", **pods.publish_fields("pod"))
    assert pods.shown(pods.target("pod")) == b"one"
    assert pods.mounted() == sorted([pods.staging, pods.target("pod")])
    killed_during("NodeUnpublishVolume", **volume, target_path=pods.target("pod"))
    killed_during("NodeUnstageVolume", **volume, staging_target_path=pods.staging)
    assert pods.mounted() == [] and not os.path.lexists(pods.target("pod"))


def test_readers_do_not_notice_that_the_plugin_and_the_service_are_killed(rig: Any, pods: Any) -> None:
    pods.stage()
    targets = [pods.publish(f"pod-{number}") for number in range(3)]
    with open(Path(targets[0], "file"), "rb") as file:
        rig.node.kill_and_start()
        rig.service.kill()
        rig.service.wait()
        rig.start_service()
        for target in targets:
            assert pods.shown(target) == b"one"
        assert file.read() == b"one"
    for number in range(3):
        pods.publish(f"pod-{number}")
        pods.unpublish(f"pod-{number}")


def test_a_dead_mount_is_abnormal_and_replaced_at_publish(rig: Any, pods: Any) -> None:
    pods.stage()
    first = pods.publish("first")
    rig.kill_mount(pods.staging)
    with pytest.raises(OSError) as dead:
        os.statvfs(first)
    assert dead.value.errno == errno.ENOTCONN
    stats = rig.node.call("NodeGetVolumeStats", volume_id=pods.volume_id, volume_path=first)
    assert stats.volume_condition.abnormal and "not connected" in stats.volume_condition.message
    for name in ("second", "first"):
        assert pods.shown(pods.publish(name)) == b"one"
    stats = rig.node.call("NodeGetVolumeStats", volume_id=pods.volume_id, volume_path=first)
    assert not stats.volume_condition.abnormal
    assert {each.unit for each in stats.usage} == {pb.VolumeUsage.Unit.BYTES, pb.VolumeUsage.Unit.INODES}
    assert pods.mounted() == sorted([pods.staging, first, pods.target("second")])


def test_a_dead_mount_is_replaced_at_stage(rig: Any, pods: Any) -> None:
    pods.stage()
    rig.kill_mount(pods.staging)
    pods.stage()
    assert pods.shown(pods.staging) == b"one"


@pytest.mark.parametrize("target", ["corrupted", "left", "empty", "half"])
def test_stale_targets_are_put_right(rig: Any, pods: Any, target: str) -> None:
    pods.stage()
    path = pods.target(target)
    os.mkdir(path, 0o755)
    if target == "corrupted":
        fd, _ = open_mount(path, "dead")
        os.close(fd)
    elif target == "left":
        os.chmod(path, 0)
    elif target == "half":
        subprocess.run(["mount", "--bind", pods.staging, path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,rw,suid,dev", path], check=True)
    assert pods.shown(pods.publish(target)) == b"one"
    found = find_mount(path)
    assert found is not None and {"ro", "nosuid", "nodev"} <= found.options
    unmount(path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0
    pods.unpublish(target)


@pytest.mark.parametrize("target", ["link", "file", "entries", "foreign", "no parent"])
def test_targets_that_are_not_ours_are_refused_and_left_alone(rig: Any, pods: Any, tmp_path: Path, target: str) -> None:
    pods.stage()
    path = Path(pods.target(target))
    if target == "link":
        path.symlink_to(tmp_path)
    elif target == "file":
        path.write_bytes(b"mine")
    elif target == "no parent":
        path = path / "below"
    else:
        path.mkdir()
        if target == "entries":
            (path / "mine").write_bytes(b"mine")
        else:
            subprocess.run(["mount", "-t", "tmpfs", "others", path], check=True)
    before = os.lstat(path) if target != "no parent" else None
    fields = pods.publish_fields(target, target_path=str(path))
    code, message = rig.node.refused("NodePublishVolume", **fields)
    assert code == "INVALID_ARGUMENT" and str(path) in message
    if before is not None:
        assert os.lstat(path).st_mode == before.st_mode
    if target == "foreign":
        unmount(path)


REQUIRED = {
    "NodeStageVolume": ["volume_id", "staging_target_path", "volume_capability"],
    "NodeUnstageVolume": ["volume_id", "staging_target_path"],
    "NodePublishVolume": ["volume_id", "target_path", "volume_capability"],
    "NodeUnpublishVolume": ["volume_id", "target_path"],
    "NodeGetVolumeStats": ["volume_id", "volume_path"],
}


@pytest.mark.parametrize(
    ("method", "missing"), [(method, each) for method, found in REQUIRED.items() for each in found]
)
def test_missing_fields_are_named(rig: Any, tmp_path: Path, method: str, missing: str) -> None:
    values = {
        "volume_id": "v", "volume_capability": rig.READER, "staging_target_path": str(tmp_path / "s"),
        "target_path": str(tmp_path / "t"), "volume_path": str(tmp_path / "p"),
    }  # fmt: skip
    code, message = rig.node.refused(method, **{name: values[name] for name in REQUIRED[method] if name != missing})
    assert code == "INVALID_ARGUMENT" and missing in message


def test_what_is_not_staged_is_not_published(rig: Any, pods: Any) -> None:
    assert rig.node.refused("NodePublishVolume", **pods.publish_fields("pod"))[0] == "FAILED_PRECONDITION"
    without = pods.publish_fields("pod", staging_target_path="")
    assert rig.node.refused("NodePublishVolume", **without)[0] == "FAILED_PRECONDITION"
    assert not os.path.lexists(pods.target("pod"))


def test_unknown_volumes(rig: Any, tmp_path: Path) -> None:
    unknown = {"volume_id": "vol-" + "0" * 32}
    where = str(tmp_path / "nothing")
    ask = {"staging_target_path": where, "volume_capability": rig.READER}
    assert rig.node.refused("NodeStageVolume", **unknown, **ask)[0] == "NOT_FOUND"
    rig.node.call("NodeUnpublishVolume", **unknown, target_path=where)
    rig.node.call("NodeUnstageVolume", **unknown, staging_target_path=where)
    assert rig.node.refused("NodeGetVolumeStats", **unknown, volume_path=where)[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    "mode",
    ["SINGLE_NODE_WRITER", "SINGLE_NODE_SINGLE_WRITER", "SINGLE_NODE_MULTI_WRITER", "MULTI_NODE_SINGLE_WRITER",
     "MULTI_NODE_MULTI_WRITER"],
)  # fmt: skip
def test_who_wants_to_write_is_told_what_to_ask_for(rig: Any, pods: Any, mode: str) -> None:
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_context": pods.context}
    code, message = rig.node.refused("NodeStageVolume", volume_capability=rig.capability(mode), **ask)
    assert code == "INVALID_ARGUMENT" and "ReadOnlyMany" in message


@pytest.mark.parametrize(
    ("flag", "part"),
    [("open-mode=fast", "open-mode"), ("attr-timeout=long", "attr-timeout"), ("colour=red", "colour"),
     ("master=1.2.3.4:5", "master"), ("rw", "rw"), ("UPPER", "UPPER")],
)  # fmt: skip
def test_mount_options_that_will_not_do_are_named(rig: Any, pods: Any, flag: str, part: str) -> None:
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_context": pods.context}
    wanted = rig.capability("MULTI_NODE_READER_ONLY", flag)
    code, message = rig.node.refused("NodeStageVolume", volume_capability=wanted, **ask)
    assert code == "INVALID_ARGUMENT" and part in message
    assert pods.mounted() == []


def test_mount_options_and_the_group_of_the_pod(rig: Any, pods: Any) -> None:
    wanted = rig.capability("MULTI_NODE_READER_ONLY", "ro", "open-mode=cached", "--umask=027", group="4242")
    pods.stage(volume_capability=wanted)
    status = os.stat(Path(pods.staging, "file"))
    assert status.st_gid == 4242 and not status.st_mode & 0o027
    # Of a pod with another group, which comes after kubelet has forgotten that it is staged.
    pods.stage(volume_capability=rig.capability("MULTI_NODE_READER_ONLY", "open-mode=cached", "umask=027", group="7"))
    assert os.stat(Path(pods.staging, "file")).st_gid == 4242
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_context": {"path": "/two"}}
    assert rig.node.refused("NodeStageVolume", volume_capability=wanted, **ask)[0] == "ALREADY_EXISTS"


def test_a_static_volume_with_a_url(rig: Any, pods: Any) -> None:
    pods.context = {"url": rig.s3_url}
    for _ in range(2):
        pods.stage(secrets=rig.secrets)
    assert pods.shown(pods.publish("pod")) == b"of the bucket"


def test_a_static_volume_whose_secret_is_renewed_is_staged_with_that_one(rig: Any, pods: Any) -> None:
    pods.context = {"url": rig.s3_url}
    pods.stage(secrets=rig.secrets)
    wrong = {**rig.secrets, "secret": "not-that-secret"}
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER}
    code, message = rig.node.refused("NodeStageVolume", **ask, volume_context=pods.context, secrets=wrong)
    assert code == "PERMISSION_DENIED" and "not-that-secret" not in message
    assert pods.shown(pods.publish("pod")) == b"of the bucket"
    pods.stage(secrets=rig.new_secrets)
    assert pods.shown(pods.target("pod")) == b"of the bucket"


def options_at_master(rig: Any, volume_id: str) -> dict[str, str]:
    with closing(sqlite3.connect(f"file:{rig.directory}/master/namespace.db?mode=ro", uri=True)) as db:
        (text,) = db.execute("SELECT options FROM volumes WHERE volume_id = ?", (volume_id,)).fetchone()
    found: dict[str, str] = json.loads(text)
    return found


def test_a_dynamic_volume_whose_secret_is_renewed_is_staged_with_that_one(rig: Any, pods: Any) -> None:
    """That of the class for stages; without one nothing changes."""
    parameters = {"url": rig.s3_url, "ufs.endpoint_url": rig.secrets["endpoint_url"]}
    keys = {name: rig.secrets[name] for name in ("key", "secret")}
    asked = {"name": f"pvc-{pods.directory.name}", "parameters": parameters, "volume_capabilities": [rig.READER]}
    made = rig.controller.call("CreateVolume", **asked, secrets=keys).volume
    pods.volume_id, pods.context = made.volume_id, dict(made.volume_context)
    pods.stage()
    pods.stage(secrets=keys)
    assert pods.shown(pods.publish("pod")) == b"of the bucket"
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER}
    ask["volume_context"] = pods.context
    for wrong, says in (
        ({**keys, "secret": "not-that-secret"}, "PERMISSION_DENIED"),
        ({**keys, "AWS_ENDPOINT_URL": "http://not-that-secret"}, "ALREADY_EXISTS"),
    ):
        code, message = rig.node.refused("NodeStageVolume", **ask, secrets=wrong)
        assert code == says and "not-that-secret" not in message
    assert options_at_master(rig, made.volume_id) == rig.secrets
    renewed = {"AWS_ACCESS_KEY_ID": rig.new_secrets["key"], "AWS_SECRET_ACCESS_KEY": rig.new_secrets["secret"]}
    pods.stage(secrets=renewed)
    assert options_at_master(rig, made.volume_id) == rig.new_secrets
    assert pods.shown(pods.target("pod")) == b"of the bucket"
    # The provisioner, asked again, finds it.
    again = rig.controller.call("CreateVolume", **asked, secrets=renewed).volume
    assert again.volume_id == made.volume_id
    assert rig.secrets["secret"] not in rig.node.log()


@pytest.mark.expect_warnings("that the Secret is not used is told")
async def test_a_master_that_is_away_holds_up_no_stage_of_a_volume_that_was_made(tmp_path: Path) -> None:
    made, context = "vol-" + "0" * 32, {"path": "/volumes/x"}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        config = NodeConfig("node-1", "csi.cachefs.io", may_attach=True)
        mounts_socket = str(tmp_path / "m.sock")
        async with (
            open_volumes(TcpAddress("127.0.0.1", unused.getsockname()[1]), patience_s=0.1) as volumes,
            open_node_mounts(mounts_socket) as mounts,
        ):
            node = Node(config, volumes, mounts, NodeVolumes(mounts, str(tmp_path)))
            with trio.fail_after(30):
                assert await node._path_of(made, context, {"key": "k", "secret": "s"}) == "/volumes/x"


def test_a_driver_that_may_not_attach_says_so(rig: Any, pods: Any, tmp_path: Path) -> None:
    asked = ("--master", rig.master, "--insecure", "--node-id", "n", "--mounts-socket", rig.directory / "m.sock")
    node = type(rig.node)(tmp_path / "s", rig.directory / "may-not.log", "node", *asked)
    node.start()
    try:
        ask = {"volume_capability": rig.READER, "staging_target_path": pods.staging, "secrets": rig.secrets}
        url = {"url": rig.s3_url}
        code, message = node.refused("NodeStageVolume", volume_id=pods.volume_id, volume_context=url, **ask)
        assert code == "INVALID_ARGUMENT" and "--may-attach is not given" in message
        fields = pods.publish_fields("pod", volume_context={**INLINE, **url}, secrets=rig.secrets)
        code, message = node.refused("NodePublishVolume", **fields)
        assert code == "INVALID_ARGUMENT" and "--inline-urls is not given" in message
        assert not os.path.lexists(pods.target("pod")) and pods.mounted() == []
        # A volume that was made is mounted with the credentials that it has.
        made = rig.controller.call(
            "CreateVolume", name=f"pvc-{tmp_path.name}", parameters={"path": "/one"}, volume_capabilities=[rig.READER]
        ).volume
        pods.volume_id, context = made.volume_id, dict(made.volume_context)
        node.call("NodeStageVolume", volume_id=made.volume_id, volume_context=context, **ask)
        assert "not used, see --may-attach" in node.log()
    finally:
        node.end()


def test_a_caller_that_gives_up_is_told_so_and_may_come_again(rig: Any, pods: Any) -> None:
    fields = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER}
    assert rig.service is not None
    os.kill(rig.service.pid, signal.SIGSTOP)  # nothing is answered, so that the call is under way for sure

    def is_told() -> bool:
        """One that is cancelled before the driver has read it is no call."""
        call = rig.node.future("NodeStageVolume", **fields, volume_context=pods.context)
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=0.5)
        call.cancel()
        return "method=NodeStageVolume code=CANCELLED" in rig.node.log()

    try:
        rig.until(is_told)
    finally:
        os.kill(rig.service.pid, signal.SIGCONT)
    pods.stage()
    assert pods.shown(pods.staging) == b"one"


def test_an_inline_volume_is_a_mount_of_its_own(rig: Any, pods: Any) -> None:
    """Kubernetes says that it is written, as its description has no access mode."""
    ask = {"staging_target_path": "", "volume_capability": rig.capability("SINGLE_NODE_WRITER")}
    pods.volume_id = f"csi-{pods.volume_id}"
    contexts = {
        "first": {**INLINE, "path": "/one", "mountOptions": "open-mode=cached,attr-timeout=1m"},
        "second": {**INLINE, "url": rig.s3_url},
    }
    for name, shown in (("first", b"one"), ("second", b"of the bucket"), ("first", b"one")):
        secrets = rig.secrets if name == "second" else {}
        assert pods.shown(pods.publish(name, volume_context=contexts[name], secrets=secrets, **ask)) == shown
        rig.node.kill_and_start()
    code, message = rig.node.refused(
        "NodePublishVolume", **pods.publish_fields("third", volume_context=contexts["first"], readonly=False, **ask)
    )
    assert code == "INVALID_ARGUMENT" and "readOnly: true" in message
    for name in ("first", "first", "second"):
        pods.unpublish(name)
    assert pods.mounted() == [] and os.listdir(rig.directory / "inline") == []


def test_a_call_that_takes_longer_than_its_caller_waits_can_be_repeated(rig: Any, pods: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        rig.node.call("NodeStageVolume", 0.05, volume_id=pods.volume_id, staging_target_path=pods.staging,
                      volume_capability=rig.READER, volume_context=pods.context)  # fmt: skip
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    pods.stage()
    assert pods.shown(pods.staging) == b"one"
