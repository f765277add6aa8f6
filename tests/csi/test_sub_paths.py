"""Parts of volumes (subPath of a container): kubelet shows them by itself, with bind mounts of what is in a published
volume. Here with the same steps: each name of the path is opened without following a link, and what was opened is
bound by /proc/PID/fd.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import all_mounts, find_mount, unmount
from cachefs.testing.survivors import pid_of, wait_for

OF_DIRECTORY, OF_BUCKET = b"of the directory", b"of the bucket"
INLINE = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "pod"}


class Pod:
    """What kubelet does for one pod."""

    def __init__(self, pods: Any, uid: str) -> None:
        self._pods = pods
        self._rig = pods.rig
        self.directory = pods.directory / "pods" / uid
        self.target = self.directory / "volumes/kubernetes.io~csi/data/mount"
        self.parts = self.directory / "volume-subpaths/data"

    def publish(self, **changes: Any) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        fields = self._pods.publish_fields("", target_path=str(self.target), **changes)
        self._rig.node.call("NodePublishVolume", **fields)

    def show(self, path: str, index: int = 0) -> Path:
        """`doBindSubPath`: where the container's mount comes from."""
        fd = os.open(self.target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in path.split("/"):
                inner = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = inner
                assert not stat.S_ISLNK(os.fstat(fd).st_mode), f"{path}: kubelet refuses a link"
            place = self.parts / "main" / str(index)
            place.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                place.mkdir(0o750, exist_ok=True)
            else:
                place.touch(0o640)
            source = f"/proc/{os.getpid()}/fd/{fd}"
            subprocess.run(["mount", "--no-canonicalize", "-o", "bind", source, place], check=True)
        finally:
            os.close(fd)
        return place

    def clean_parts(self) -> None:
        """`CleanSubPaths`: before the volume is unpublished."""
        for place in sorted(self.parts.glob("*/*"), reverse=True):
            if find_mount(place) is not None:
                unmount(place)
            place.rmdir() if place.is_dir() else place.unlink()

    def unpublish(self) -> None:
        self._rig.node.call("NodeUnpublishVolume", volume_id=self._pods.volume_id, target_path=str(self.target))
        assert not os.path.lexists(self.target)

    def shown_parts(self) -> list[str]:
        return [each.mountpoint for each in all_mounts() if each.mountpoint.startswith(f"{self.parts}/")]


@pytest.fixture
def pod(pods: Any) -> Pod:
    """Of a volume of a bucket, staged and published, which has a directory and a file in it."""
    pods.context = {"url": pods.rig.s3_url}
    pods.stage(secrets=pods.rig.secrets)
    found = Pod(pods, "pod-1")
    found.publish()
    return found


def test_parts_are_shown_and_go_in_the_order_of_kubelet(pods: Any, pod: Pod) -> None:
    directory, file = pod.show("sub"), pod.show("sub/file", 1)
    assert os.listdir(directory) == ["file"]
    assert (directory / "file").read_bytes() == file.read_bytes() == OF_DIRECTORY
    for place in (directory, file):
        found = find_mount(place)
        assert found is not None and {"ro", "nosuid", "nodev"} <= found.options
    other = Pod(pods, "pod-2")
    other.publish()
    others = other.show("sub")
    pod.clean_parts()
    pod.unpublish()
    assert (others / "file").read_bytes() == OF_DIRECTORY
    other.clean_parts()
    other.unpublish()
    pods.unstage()
    assert pods.mounted() == []


def test_parts_that_are_still_shown_go_with_what_they_are_of(pods: Any, pod: Pod) -> None:
    """And those of no other pod."""
    other = Pod(pods, "pod-1-and-more")
    other.publish()
    pod.show("sub")
    pod.show("sub/file", 1)
    others = other.show("sub")
    assert len(pod.shown_parts()) == 2
    for _ in range(2):
        pod.unpublish()
    assert pod.shown_parts() == []
    # What kubelet has made for them it removes by itself, as long as nothing is in it.
    assert sorted(each.name for each in pod.parts.glob("*/*")) == ["0", "1"]
    pod.clean_parts()
    assert (others / "file").read_bytes() == OF_DIRECTORY
    code, message = pods.rig.node.refused(
        "NodeUnstageVolume", volume_id=pods.volume_id, staging_target_path=pods.staging
    )
    assert code == "FAILED_PRECONDITION" and str(others) in message and str(other.target) in message
    other.unpublish()
    pods.unstage()
    assert pods.mounted() == []


def test_a_part_that_is_nowhere_near_its_pod_keeps_the_volume_staged_until_it_goes(
    pods: Any, pod: Pod, tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    subprocess.run(["mount", "--bind", pod.target / "sub", place], check=True)
    pod.unpublish()
    ask = {"volume_id": pods.volume_id, "staging_target_path": pods.staging}
    code, message = pods.rig.node.refused("NodeUnstageVolume", **ask)
    assert code == "FAILED_PRECONDITION" and str(place) in message
    assert (place / "file").read_bytes() == OF_DIRECTORY
    unmount(place)
    pods.unstage()
    assert pods.mounted() == []


def test_parts_outlive_the_server(pods: Any, pod: Pod) -> None:
    directory, file = pod.show("sub"), pod.show("sub/file", 1)
    with open(directory / "file", "rb") as held:
        old = pid_of("mount-server", Path(pods.staging))
        assert old is not None
        os.kill(old, signal.SIGKILL)
        # What is looked at now waits for the next one.
        assert os.listdir(directory) == ["file"]
        assert (directory / "file").read_bytes() == file.read_bytes() == held.read() == OF_DIRECTORY
    wait_for("mount-server", Path(pods.staging), other_than=old)
    pod.clean_parts()
    pod.unpublish()


def test_parts_of_a_mount_that_died_are_made_anew_by_the_next_container(pods: Any, pod: Pod) -> None:
    pod.show("sub")
    pod.show("sub/file", 1)
    pods.rig.kill_mount(pods.staging)
    # The mount service has made another, or the driver does: kubelet asks for it again and again (requiresRepublish).
    pod.publish()
    # Neither dead, which would stop kubelet, nor the whole volume in their place.
    assert pod.shown_parts() == []
    assert (pod.target / "file").read_bytes() == OF_BUCKET
    assert (pod.show("sub") / "file").read_bytes() == pod.show("sub/file", 1).read_bytes() == OF_DIRECTORY
    pod.clean_parts()
    pod.unpublish()


def test_a_dead_mount_is_unstaged_with_parts_of_it(pods: Any, pod: Pod) -> None:
    places = [pod.show("sub"), pod.show("sub/file", 1)]
    pods.rig.kill_mount(pods.staging)
    pods.unstage()
    assert pods.mounted() == [] and pod.shown_parts() == [] and not os.path.lexists(pod.target)
    assert all(os.path.lexists(each) for each in places)
    pod.clean_parts()
    pod.unpublish()


def test_an_inline_volume_goes_with_parts_of_it(pods: Any) -> None:
    pods.volume_id = f"csi-{pods.volume_id}"
    pod = Pod(pods, "pod-1")
    writer = pods.rig.capability("SINGLE_NODE_WRITER")
    context = {**INLINE, "url": pods.rig.s3_url}
    pod.publish(staging_target_path="", volume_capability=writer, volume_context=context, secrets=pods.rig.secrets)
    assert (pod.show("sub") / "file").read_bytes() == OF_DIRECTORY
    pod.unpublish()
    assert pods.mounted() == [] and os.listdir(pods.rig.directory / "inline") == []


def test_a_link_in_the_store_leads_nowhere_on_the_node(pods: Any) -> None:
    """In a mount there are none: what a store has behind one is a directory of the volume, whoever opens it."""
    pods.stage()
    pod = Pod(pods, "pod-1")
    pod.publish()
    place = pod.show("out")
    found = find_mount(place)
    assert found is not None and found.root == "/out"
    assert os.stat(place).st_dev == os.stat(pod.target).st_dev == os.stat(place / "file").st_dev
    with pytest.raises(OSError):
        os.readlink(pod.target / "out")
    # Nor does one that is put there by somebody on the node: volumes are read-only.
    with pytest.raises(OSError):
        os.symlink("/etc", pod.target / "etc")
    pod.clean_parts()
    pod.unpublish()
