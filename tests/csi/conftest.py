"""The driver as kubelet and the provisioner meet it: processes of its own, asked over their sockets by a real gRPC
client; with a real cluster, a real S3 API, the real mount service and real mounts. One of each for all tests.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cachefs_csi import csi_pb2 as pb
from cachefs_csi.calls import SERVICES
from google.protobuf import message_factory

from cachefs.fuse import all_mounts, probe, unmount
from cachefs.testing.fixtures import BUCKET
from cachefs.testing.processes import READY_TIMEOUT_S, running
from cachefs.testing.s3server import S3Server
from tests.csi.authority import Authority

PATIENCE_S = 60.0
SECRET_IN_URL = "s3cr3t-in-the-options"


class Caller:
    """A process of the driver, and a client of it."""

    def __init__(self, socket: Path, log: Path, role: str, *flags: str | Path) -> None:
        self.socket = socket
        self.log_path = log
        self._command = [sys.executable, "-m", "cachefs_csi.main", role, "--endpoint", f"unix://{socket}", "--json"]
        self._command += map(str, flags)
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: grpc.Channel | None = None
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], READY_TIMEOUT_S)[0], self.log()
        line = self.process.stdout.readline()
        assert line, self.log()
        self.facts = json.loads(line)
        self.channel = grpc.insecure_channel(f"unix:{self.socket}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(number)
        status = self.process.wait(60)
        self.process.stdout.close()
        if self.channel is not None:
            self.channel.close()
        self.process = self.channel = None
        return status

    def kill_and_start(self) -> None:
        self.end(signal.SIGKILL)
        self.start()

    def log(self) -> str:
        return self.log_path.read_text()

    def future(self, method: str, timeout_s: float = PATIENCE_S, /, **fields: Any) -> Any:
        """A call under way, by the name that the specification has for it."""
        name, service = next((name, service) for name, service in SERVICES.items() if method in service.methods_by_name)
        found = service.methods_by_name[method]
        assert self.channel is not None
        ask = self.channel.unary_unary(
            f"/csi.v1.{name}/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(found.output_type).FromString,
        )
        request = message_factory.GetMessageClass(found.input_type)(**fields)
        return ask.future(request, timeout=timeout_s, wait_for_ready=True)

    def call(self, method: str, timeout_s: float = PATIENCE_S, /, **fields: Any) -> Any:
        """Raises grpc.RpcError."""
        return self.future(method, timeout_s, **fields).result()

    def refused(self, method: str, /, **fields: Any) -> tuple[str, str]:
        """The code and the sentence of a call that fails."""
        with pytest.raises(grpc.RpcError) as error:
            self.call(method, **fields)
        return error.value.code().name, error.value.details() or ""


def capability(mode: str = "MULTI_NODE_READER_ONLY", *flags: str, group: str = "") -> pb.VolumeCapability:
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags, volume_mount_group=group),
        access_mode=pb.VolumeCapability.AccessMode(mode=mode),
    )


class Rig:
    """What runs, for all tests of a process. Each test uses names of its own."""

    READER = capability()
    capability = staticmethod(capability)

    def __init__(self, directory: Path, server: S3Server, security: Callable[[str], list[str]] | None = None) -> None:
        """`security`: the flags for it, by who has them, as the chart divides them: master, worker, client, admin."""
        self.directory = directory
        self.security = security or (lambda role: ["--insecure"])
        self.s3_url = f"s3://{BUCKET}/csi"
        self.secrets = dict(server.ufs_options)
        """As of a Secret."""
        self.new_secrets = dict(server.new_ufs_options)
        """As of the same one, renewed."""
        self.master = ""
        self.service: subprocess.Popen[bytes] | None = None
        self.keeper: subprocess.Popen[bytes] | None = None
        self.controller = Caller(directory / "c.sock", directory / "controller.log", "controller")
        self.node = self.controller

    def start(self, stack: ExitStack) -> None:
        data = self.directory / "data"
        for name in ("one", "two"):
            (data / name / "dir").mkdir(parents=True)
            (data / name / "file").write_bytes(name.encode())
        (self.directory / "outside").mkdir()
        (self.directory / "outside" / "file").write_bytes(b"outside")
        (data / "one" / "out").symlink_to(self.directory / "outside")
        here = self.directory
        master = running(
            "master", "--data-dir", here / "master", "--listen", "127.0.0.1:0", "--mount", f"/={data.as_uri()}",
            "--page-size", "64K", *self.security("master"),
            stderr=stack.enter_context((here / "master.log").open("ab")),
        )  # fmt: skip
        self.master = stack.enter_context(master).facts["listen"]
        worker = running(
            "worker", "--name", "w", "--master", self.master, "--listen", "127.0.0.1:0", "--socket", here / "w.sock",
            "--tier", f"ssd:{here / 'tier'}:128M", *self.security("worker"),
            stderr=stack.enter_context((here / "worker.log").open("ab")),
        )  # fmt: skip
        stack.enter_context(worker)
        self.keeper = self.background("node-keeper", "--socket", here / "k.sock")
        stack.callback(self.end, self.keeper)
        self.start_service()
        stack.callback(lambda: self.end(self.service))
        # The node too: it may attach.
        asked = ("--master", self.master, *self.security("admin"), "--http", "127.0.0.1:0")
        self.controller = Caller(here / "c.sock", here / "controller.log", "controller", *asked)
        self.node = Caller(
            here / "n.sock", here / "node.log", "node", *asked, "--node-id", "node-1",
            "--mounts-socket", here / "m.sock",
            "--may-attach", "--inline-urls", "--inline-dir", here / "inline", "--max-volumes", "7",
            "--label", "zone=a", "--label", "rack=r1",
        )  # fmt: skip
        for each in (self.controller, self.node):
            each.start()
            stack.callback(each.end)

    def background(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self.directory / "service.log").open("ab") as log:
            command = [sys.executable, "-m", "cachefs", *map(str, arguments)]
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def start_service(self) -> None:
        here = self.directory
        self.service = self.background(
            "node-mounts", "--socket", here / "m.sock", "--keeper-socket", here / "k.sock",
            "--state-dir", here / "state",
            "--master", self.master, "--worker-socket", here / "w.sock", *self.security("client"),
        )  # fmt: skip

    @staticmethod
    def end(process: subprocess.Popen[bytes] | None) -> None:
        if process is not None:
            process.terminate()
            process.wait(60)

    # ---- one test's ------------------------------------------------------------------------------------------------

    @staticmethod
    def until(holds: Any) -> None:
        until(holds)

    def mounted(self, below: Path) -> list[str]:
        return [each.mountpoint for each in all_mounts() if each.mountpoint.startswith(str(below))]

    def kill_mount(self, mountpoint: str) -> None:
        """Its server and its keeper, so that it is dead; nobody mounts it again meanwhile."""
        assert self.service is not None
        self.service.kill()
        self.service.wait()
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_of(pid, mountpoint)]
        assert found
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with suppress(ProcessLookupError):  # servers end by themselves, too, without their service
                    os.kill(pid, number)
        until(lambda: is_gone(mountpoint))
        self.start_service()


def is_of(pid: int, mountpoint: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return mountpoint in words and bool({"mount-keeper", "mount-server"} & set(words))


def is_gone(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)
    except OSError:
        return True
    return False


def until(holds: Any, limit_s: float = PATIENCE_S) -> None:
    give_up_at = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Rig]:
    with running_rig(tmp_path_factory.mktemp("csi"), s3_server) as found:
        yield found


@contextmanager
def running_rig(
    directory: Path, s3_server: S3Server, security: Callable[[str], list[str]] | None = None
) -> Iterator[Rig]:
    if not probe().can_mount:
        pytest.skip("needs root and /dev/fuse")
    s3_server.put_objects(BUCKET, [("csi/file", b"of the bucket"), ("csi/sub/file", b"of the directory")])
    with ExitStack() as stack:
        found = Rig(directory, s3_server, security)
        stack.callback(unmount_all, directory)
        found.start(stack)
        yield found
    for log in directory.glob("*.log"):
        text = log.read_text()
        assert "Traceback" not in text, f"{log.name}:\n{text}"
        if log.name in ("controller.log", "node.log"):
            for secret in (found.secrets.get("secret", ""), SECRET_IN_URL):
                assert not secret or secret not in text, f"{log.name} has a secret"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    found = Authority(tmp_path_factory.mktemp("authority") / "ours")
    found.make_tokens()
    return found


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "theirs")


@pytest.fixture(scope="session")
def tls_rig(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, authority: Authority) -> Iterator[Rig]:
    """As `rig`, with tokens and TLS between all of them."""
    with running_rig(tmp_path_factory.mktemp("csi-tls"), s3_server, authority.flags) as found:
        yield found


def unmount_all(directory: Path) -> None:
    for each in reversed([each.mountpoint for each in all_mounts()]):
        if each.startswith(str(directory)):
            unmount(each, lazy=True)


class Pods:
    """The paths that kubelet would give for one volume of one test."""

    def __init__(self, rig: Rig, directory: Path, volume_id: str) -> None:
        self.rig = rig
        self.directory = directory
        self.volume_id = volume_id
        self.staging = str(directory / "globalmount")
        self.context = {"path": "/one"}

    def target(self, name: str) -> str:
        return str(self.directory / name)

    def stage(self, **changes: Any) -> Any:
        fields = {
            "volume_id": self.volume_id, "staging_target_path": self.staging, "volume_capability": Rig.READER,
            "volume_context": self.context,
        }  # fmt: skip
        return self.rig.node.call("NodeStageVolume", **{**fields, **changes})

    def publish_fields(self, name: str, **changes: Any) -> dict[str, Any]:
        return {
            "volume_id": self.volume_id, "staging_target_path": self.staging, "target_path": self.target(name),
            "volume_capability": Rig.READER, "readonly": True, "volume_context": self.context, **changes,
        }  # fmt: skip

    def publish(self, name: str, **changes: Any) -> str:
        self.rig.node.call("NodePublishVolume", **self.publish_fields(name, **changes))
        return self.target(name)

    def unpublish(self, name: str) -> None:
        self.rig.node.call("NodeUnpublishVolume", volume_id=self.volume_id, target_path=self.target(name))

    def unstage(self) -> None:
        self.rig.node.call("NodeUnstageVolume", volume_id=self.volume_id, staging_target_path=self.staging)

    def mounted(self) -> list[str]:
        return sorted(self.rig.mounted(self.directory))

    @staticmethod
    def shown(target: str) -> bytes:
        return Path(target, "file").read_bytes()


@pytest.fixture
def pods(rig: Rig, tmp_path: Path) -> Iterator[Pods]:
    """Of a static volume, of which nothing is left in the end."""
    found = Pods(rig, tmp_path, f"static-{tmp_path.name}")
    yield found
    known = [*(each for each in found.mounted() if each != found.staging), found.staging]
    for each in known[:-1]:
        rig.node.call("NodeUnpublishVolume", volume_id=found.volume_id, target_path=each)
    found.unstage()
    assert not found.mounted()
