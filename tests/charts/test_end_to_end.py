"""The whole of it without Kubernetes: every process as the rendered manifests start it, and what kubelet and the
provisioner ask of them over their sockets. What is put in the place of a container's paths and addresses: machine.py.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cachefs.fuse import FS_TYPE, all_mounts, find_mount, probe, unmount
from cachefs.model import volume_id
from cachefs.testing.fixtures import Bucket
from cachefs.testing.survivors import make_source, pid_of, reading, wait_for
from tests.charts.machine import Machine, until
from tests.charts.rendered import Manifest, manifests_in, render
from tests.csi.authority import Authority

grpc = pytest.importorskip(
    "grpc", reason="the libraries of the CSI driver are not installed: pip install 'cachefs[csi]'"
)
pb = pytest.importorskip("cachefs_csi.csi_pb2")

pytestmark = pytest.mark.skipif(not probe().can_mount, reason="needs root and /dev/fuse")

DRIVER = "csi.cachefs.io"
KUBELET = "/var/lib/kubelet"
CLAIMS = ("one", "two")
PODS = ("a", "b", "c")
ORDER = ("csi-node", "mounts", "csi-controller", "worker", "keeper", "master")
"""Kubernetes knows none, so each is started before what it needs."""
READER = pb.VolumeCapability(
    mount=pb.VolumeCapability.MountVolume(mount_flags=["profile=training"]),
    access_mode=pb.VolumeCapability.AccessMode(mode="MULTI_NODE_READER_ONLY"),
)


def values(bucket: Bucket) -> dict[str, Any]:
    secret = "csi.storage.k8s.io/provisioner-secret-"
    parameters = {
        "url": bucket.url,
        "subPath": "sets/${pvc.name}",
        f"{secret}name": "b",
        f"{secret}namespace": "storage",
    }
    return {
        # However full the disk of this machine is.
        "worker": {"tiers": {"disks": [{"hostPath": "/var/lib/cachefs/tier", "size": "256M"}]}, "keepFree": "16M"},
        "mounts": {"host": [{"name": "all", "path": "/"}]},
        "csi": {"storageClasses": [{"name": "data", "parameters": parameters, "mountOptions": ["profile=training"]}]},
        "warmup": {"loads": [{"name": "first", "paths": [f"/volumes/{volume_id('pvc-one')}"]}]},
    }


class Cluster:
    """What kubelet and the provisioner do for one volume each time."""

    def __init__(self, machine: Machine, manifests: list[Manifest], bucket: Bucket) -> None:
        self.machine = machine
        self.sockets = {
            "csi-node": machine.of_node(f"{KUBELET}/plugins/{DRIVER}/csi.sock"),
            "csi-controller": machine.directory / "volumes/csi-controller/socket/csi.sock",
        }
        (self.storage_class,) = [each for each in manifests if each["kind"] == "StorageClass"]
        options = bucket.options
        self.secret = {
            "AWS_ACCESS_KEY_ID": options["key"],
            "AWS_SECRET_ACCESS_KEY": options["secret"],
            "endpoint_url": options["endpoint_url"],
        }

    def call(self, component: str, method: str, **fields: Any) -> Any:
        service = "Identity" if method == "Probe" else "Node" if component == "csi-node" else "Controller"
        with grpc.insecure_channel(f"unix:{self.sockets[component]}") as channel:
            ask = channel.unary_unary(
                f"/csi.v1.{service}/{method}",
                request_serializer=lambda request: request.SerializeToString(),
                response_deserializer=getattr(pb, f"{method}Response").FromString,
            )
            return ask(getattr(pb, f"{method}Request")(**fields), timeout=60, wait_for_ready=True)

    def start(self, component: str) -> None:
        """And wait for it."""
        self.machine.start(component)
        self.wait_ready(component)

    def wait_ready(self, component: str) -> None:
        self.machine.wait_ready(component)
        if component in self.sockets:  # asked by the sidecar for the probe
            until(lambda: self.call(component, "Probe").ready.value, f"{component}: Probe")

    def create(self, claim: str) -> str:
        """As external-provisioner asks for it; the volume's id."""
        given = self.storage_class["parameters"]
        parameters = {key: value for key, value in given.items() if not key.startswith("csi.storage.k8s.io/")}
        parameters |= {"csi.storage.k8s.io/pvc/name": claim, "csi.storage.k8s.io/pvc/namespace": "default"}
        size = pb.CapacityRange(required_bytes=64 << 20)
        made = self.call(
            "csi-controller", "CreateVolume", name=f"pvc-{claim}", parameters=parameters, secrets=self.secret,
            volume_capabilities=[READER], capacity_range=size,
        ).volume  # fmt: skip
        assert dict(made.volume_context) == {"path": f"/volumes/{made.volume_id}"}
        return str(made.volume_id)

    def staging(self, claim: str) -> str:
        name = hashlib.sha256(claim.encode()).hexdigest()
        return str(self.machine.of_node(f"{KUBELET}/plugins/kubernetes.io/csi/{DRIVER}/{name}/globalmount"))

    def target(self, claim: str, pod: str) -> str:
        path = f"{KUBELET}/pods/{pod}-{claim}/volumes/kubernetes.io~csi/pvc-{claim}/mount"
        return str(self.machine.of_node(path))

    def stage(self, volume: str, claim: str) -> None:
        os.makedirs(self.staging(claim), 0o750, exist_ok=True)
        self.call(
            "csi-node", "NodeStageVolume", volume_id=volume, staging_target_path=self.staging(claim),
            volume_capability=READER, volume_context={"path": f"/volumes/{volume}"},
        )  # fmt: skip

    def publish(self, volume: str, claim: str, pod: str) -> Path:
        target = self.target(claim, pod)
        os.makedirs(os.path.dirname(target), 0o750, exist_ok=True)
        self.call(
            "csi-node", "NodePublishVolume", volume_id=volume, staging_target_path=self.staging(claim),
            target_path=target, volume_capability=READER, readonly=True,
        )  # fmt: skip
        return Path(target)

    def mounted(self) -> list[str]:
        return [each.mountpoint for each in all_mounts() if each.mountpoint.startswith(str(self.machine.directory))]


@pytest.fixture
def cluster(s3_bucket: Bucket) -> Iterator[Cluster]:
    with running(s3_bucket) as found:
        yield found


@pytest.fixture
def cluster_with_tls(s3_bucket: Bucket, tmp_path: Path) -> Iterator[Cluster]:
    names = {"master": "m-tls", "worker": "w-tls", "client": "c-tls"}
    with running(s3_bucket, tls={"enabled": True, "existingSecrets": names}, certificates=tmp_path / "tls") as found:
        yield found


@contextmanager
def running(s3_bucket: Bucket, certificates: Path | None = None, **more: Any) -> Iterator[Cluster]:
    """`certificates`: where to make those for TLS. `more`: values of the chart."""
    manifests = manifests_in(render({**values(s3_bucket), **more}))
    with tempfile.TemporaryDirectory(prefix="k8s-") as directory, ExitStack() as stack:
        machine = Machine(Path(directory), manifests)
        found = Cluster(machine, manifests, s3_bucket)
        stack.callback(clean_up, found)
        if certificates is not None:
            authority = Authority(certificates, machine.address)
            for role, secret in more["tls"]["existingSecrets"].items():
                pair = {f"tls.{kind}": (certificates / f"{role}.{kind}").read_bytes() for kind in ("crt", "key")}
                machine.give(secret, {**pair, "ca.crt": authority.ca.read_bytes()})
        for path in ("plugins_registry", "pods"):
            machine.of_node(f"{KUBELET}/{path}").mkdir(parents=True)
        for component in ORDER:
            machine.start(component)
        for component in ORDER:
            found.wait_ready(component)
        yield found
        machine.end()
        for component in ORDER:
            text = machine.log(component).read_text()
            assert "Traceback" not in text, f"{component}:\n{text}"
            assert found.secret["AWS_SECRET_ACCESS_KEY"] not in text, component


def clean_up(cluster: Cluster) -> None:
    """Whatever has happened."""
    mounted = cluster.mounted()
    for process in cluster.machine.processes.values():
        process.kill()
        process.wait()
    for mountpoint in mounted:
        for role in ("mount-keeper", "mount-server"):
            while (pid := pid_of(role, Path(mountpoint))) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for mountpoint in reversed(mounted):
        unmount(mountpoint, lazy=True)


def test_a_volume_from_the_claim_to_its_end(cluster: Cluster, s3_bucket: Bucket, tmp_path: Path) -> None:
    machine = cluster.machine
    make_source(tmp_path, 40)
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    s3_bucket.put({f"sets/{claim}/{name}": content for claim in CLAIMS for name, content in files.items()})
    before = s3_bucket.contents()

    volumes = {claim: cluster.create(claim) for claim in CLAIMS}
    assert volumes["one"] == volume_id("pvc-one")
    machine.kill("csi-controller")
    cluster.start("csi-controller")  # it has forgotten nothing
    assert cluster.create("one") == volumes["one"]
    done = machine.run_job("warmup")
    assert done.returncode == 0, done.stdout + done.stderr

    for claim, volume in volumes.items():
        cluster.stage(volume, claim)
    with ExitStack() as stack:
        readers = [
            stack.enter_context(reading(cluster.publish(volume, claim, pod), tmp_path, 1))
            for claim, volume in volumes.items()
            for pod in PODS
        ]
        # On the node there is the mount of the values, too.
        everything = machine.of_node("/var/lib/cachefs/host/all")
        until(lambda: find_mount(everything) is not None, "the mount of the values")
        assert (everything / "volumes" / volumes["two"] / "warm/000").read_bytes() == files["warm/000"]

        machine.kill("csi-node")
        cluster.start("csi-node")
        server = wait_for("mount-server", Path(cluster.staging("one")))
        os.kill(server, signal.SIGKILL)
        wait_for("mount-server", Path(cluster.staging("one")), other_than=server)
        # As containers are killed: all of their processes at once.
        keepers = {claim: wait_for("mount-keeper", Path(cluster.staging(claim))) for claim in CLAIMS}
        machine.kill("keeper")
        for pid in keepers.values():
            os.kill(pid, signal.SIGKILL)
        cluster.start("keeper")
        for claim, pid in keepers.items():
            wait_for("mount-keeper", Path(cluster.staging(claim)), other_than=pid)
        servers = [wait_for("mount-server", Path(cluster.staging(claim))) for claim in CLAIMS]
        machine.kill("mounts")
        for pid in servers:
            with suppress(ProcessLookupError):  # they end by themselves, too, without their service
                os.kill(pid, signal.SIGKILL)
        cluster.start("mounts")
        for claim, volume in volumes.items():
            found = cluster.call(
                "csi-node", "NodeGetVolumeStats", volume_id=volume, volume_path=cluster.target(claim, "a")
            )
            assert not found.volume_condition.abnormal, found
            cluster.publish(volume, claim, "a")  # kubelet asks again and again
        reports = [each.stop() for each in readers]
    assert [report.errors for report in reports] == [[]] * 6
    assert all({"held", "mapped", "large", "warm", "cold", "listing"} <= set(report.gaps) for report in reports)

    for claim, volume in volumes.items():
        for pod in PODS:
            target = cluster.target(claim, pod)
            cluster.call("csi-node", "NodeUnpublishVolume", volume_id=volume, target_path=target)
            assert not os.path.lexists(target)
        staging = cluster.staging(claim)
        cluster.call("csi-node", "NodeUnstageVolume", volume_id=volume, staging_target_path=staging)
        assert find_mount(staging) is None
        cluster.call("csi-controller", "DeleteVolume", volume_id=volume)
    assert cluster.call("csi-controller", "ListVolumes").entries == []
    assert s3_bucket.contents() == before
    # What is left is the mount of the values, which stays where its pods go.
    assert cluster.mounted() == [str(everything)]
    mount = find_mount(everything)
    assert mount is not None and mount.fs_type == FS_TYPE


def test_with_tls_between_all_of_them(cluster_with_tls: Cluster, s3_bucket: Bucket, tmp_path: Path) -> None:
    cluster, machine = cluster_with_tls, cluster_with_tls.machine
    s3_bucket.put({"sets/one/file": b"content"})
    volume = cluster.create("one")
    cluster.stage(volume, "one")
    assert (cluster.publish(volume, "one", "a") / "file").read_bytes() == b"content"
    # Each finds the others again.
    for component in ("csi-node", "csi-controller", "master"):
        machine.kill(component)
        cluster.start(component)
    assert cluster.create("one") == volume
    cluster.call("csi-node", "NodeUnpublishVolume", volume_id=volume, target_path=cluster.target("one", "a"))
    cluster.call("csi-node", "NodeUnstageVolume", volume_id=volume, staging_target_path=cluster.staging("one"))
    cluster.call("csi-controller", "DeleteVolume", volume_id=volume)
    # It is what they speak with the master.
    context = ssl.create_default_context(cafile=tmp_path / "tls/ca.crt")
    context.load_cert_chain(tmp_path / "tls/client.crt", tmp_path / "tls/client.key")
    with (
        socket.create_connection((machine.address, 7000), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname=machine.address) as link,
    ):
        assert (link.version() or "").startswith("TLS")
