"""The driver in a cluster with tokens and TLS, as the chart sets it up: controller, node plugin and mount service know
the master by an authority, and show it certificates; whoever has another authority is told so, without any secret.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from cachefs_csi import csi_pb2 as pb

from cachefs.net import Role, new_tokens
from cachefs.testing.node import node_of
from tests.csi.authority import Authority

SECRET = "s3cr3t-of-the-bucket"


@pytest.fixture
def rig(tls_rig: Any) -> Any:
    """So that `pods` are of this one."""
    return tls_rig


class Drivers:
    """Others than the rig's, with their own files for tokens and TLS."""

    def __init__(self, rig: Any, authority: Authority, directory: Path, stack: ExitStack) -> None:
        self._rig = rig
        self._authority = authority
        self._directory = directory
        self._stack = stack
        self._number = 0

    def start(self, role: str, *flags: str, master: str = "", mounts_socket: Path | None = None) -> Any:
        self._number += 1
        name = f"{role}-{self._number}"
        asked = ["--master", master or self._rig.master, "--http", "127.0.0.1:0", *flags]
        if role == "node":
            asked += [
                "--node-id",
                "n",
                "--may-attach",
                "--mounts-socket",
                mounts_socket or self._rig.directory / "m.sock",
            ]
        found = type(self._rig.node)(self._directory / f"{name}.sock", self._directory / f"{name}.log", role, *asked)
        found.start()
        self._stack.callback(self._end, found)
        return found

    def _end(self, found: Any) -> None:
        found.end()
        no_secret_in(found.log(), self._authority)


def no_secret_in(text: str, authority: Authority) -> None:
    assert SECRET not in text and "PRIVATE KEY" not in text and "Traceback" not in text
    tokens = authority.secrets()
    assert len(tokens) == 3 and not any(each in text for each in tokens)


@pytest.fixture
def drivers(rig: Any, authority: Authority, tmp_path: Path) -> Iterator[Drivers]:
    with ExitStack() as stack:
        yield Drivers(rig, authority, tmp_path, stack)


def test_from_the_claim_to_its_end(rig: Any, pods: Any, authority: Authority) -> None:
    for each in (rig.controller, rig.node):
        assert each.call("Probe").ready.value
    asked = {"parameters": {"url": rig.s3_url, "subPath": "sub"}, "secrets": rig.secrets}
    size = pb.CapacityRange(required_bytes=1 << 30)
    volume = rig.controller.call(
        "CreateVolume", name=pods.volume_id, volume_capabilities=[rig.READER], capacity_range=size, **asked
    ).volume
    pods.volume_id, pods.context = volume.volume_id, dict(volume.volume_context)
    pods.stage()
    assert pods.shown(pods.publish("pod")) == b"of the directory"
    # As after an upgrade: with connections of its own.
    rig.node.kill_and_start()
    pods.context = {}  # the master has to be asked
    pods.unpublish("pod")
    pods.unstage()
    pods.stage()
    assert pods.shown(pods.publish("pod")) == b"of the directory"
    pods.unpublish("pod")
    pods.unstage()
    rig.controller.call("DeleteVolume", volume_id=volume.volume_id)
    # And one that the node itself attaches.
    pods.volume_id, pods.context = f"static-{volume.volume_id}", {"url": rig.s3_url}
    pods.stage(secrets=rig.secrets)
    assert pods.shown(pods.publish("pod")) == b"of the bucket"
    pods.unpublish("pod")
    pods.unstage()
    for each in (rig.controller, rig.node):
        no_secret_in(each.log(), authority)


def claim(rig: Any) -> dict[str, Any]:
    return {
        "name": "refused", "volume_capabilities": [rig.READER], "parameters": {"url": rig.s3_url},
        "secrets": {**rig.secrets, "secret": SECRET},
    }  # fmt: skip


def why_not_ready(driver: Any) -> str:
    """By its probes."""
    assert not driver.call("Probe").ready.value
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://{driver.facts['http']}/readyz")
    with error.value as answer:
        text = answer.read().decode()
    assert answer.status == 503 and "not ready error=" in driver.log()
    return text


def test_who_is_not_trusted_or_trusts_not_is_told_why(
    rig: Any, pods: Any, drivers: Drivers, authority: Authority, other_authority: Authority
) -> None:
    """As UNAVAILABLE, since a master may be started again with another certificate. All at once: they try for 10 s."""
    ours, theirs = authority.flags("admin"), authority.flags("admin", other_authority)
    elsewhere = f"localhost:{rig.master.rpartition(':')[2]}"
    refused = "the other side's certificate is refused: "
    created = ("CreateVolume", claim(rig))
    static = {
        "volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER,
        "volume_context": {"url": rig.s3_url}, "secrets": {**rig.secrets, "secret": SECRET},
    }  # fmt: skip
    cases = [
        # Another authority than the master's.
        (drivers.start("controller", *theirs), created, f"{rig.master}: {refused}"),
        (drivers.start("node", *theirs), ("NodeStageVolume", static), f"{rig.master}: {refused}"),
        # The right one, and a master whose certificate has another name.
        (drivers.start("controller", *ours, master=elsewhere), created, f"{elsewhere}: {refused}"),
        # The right one, and a certificate of our own that is not from it.
        (drivers.start("controller", *theirs[:3], ours[3]), created, "the other side refuses this side's TLS, or its"),
        # None.
        (drivers.start("controller", ours[0]), created, "it speaks TLS, see --tls-ca"),
    ]
    assert f"{rig.master}: {refused}" in why_not_ready(cases[0][0])
    calls = [driver.future(method, **fields) for driver, (method, fields), _ in cases]
    for call, (_, _, said) in zip(calls, cases, strict=True):
        with pytest.raises(grpc.RpcError) as error:
            call.result()
        message = error.value.details() or ""
        assert said in message and error.value.code() is grpc.StatusCode.UNAVAILABLE
        no_secret_in(message, authority)
    assert pods.mounted() == []


@pytest.mark.slow  # as long as a mount waits for the master at its start
def test_a_mount_service_that_knows_another_authority_mounts_nothing(
    rig: Any, pods: Any, drivers: Drivers, authority: Authority, other_authority: Authority, tmp_path: Path
) -> None:
    """And whoever wants the volume is told what its server said."""
    with node_of(tmp_path / "service", "--master", rig.master, *authority.flags("client", other_authority)) as service:
        service.start_keeper()
        service.start_mounts("--patience", "1s")
        node = drivers.start("node", *authority.flags("admin"), mounts_socket=service.mounts_socket)
        fields = {"volume_id": pods.volume_id, "staging_target_path": pods.staging, "volume_capability": rig.READER}
        code, message = node.refused("NodeStageVolume", **fields, volume_context=pods.context)
        assert code == "UNAVAILABLE" and pods.staging in message and "certificate is refused" in message
        no_secret_in(message, authority)
        assert pods.mounted() == [] and service.states() == {}
        no_secret_in(service.log.read_text(), authority)


def test_the_right_authority_with_the_wrong_tokens_is_denied(
    rig: Any, drivers: Drivers, authority: Authority, tmp_path: Path
) -> None:
    """That does not get right by itself."""
    new_tokens(str(tmp_path / "wrong.toml"), [Role.CLIENT, Role.ADMIN])
    flags = [f"--tokens={tmp_path / 'wrong.toml'}", *authority.flags("admin")[1:]]
    controller = drivers.start("controller", *flags)
    code, message = controller.refused("CreateVolume", **claim(rig))
    assert code == "UNAUTHENTICATED" and "the other side does not accept our token" in message
    no_secret_in(message, authority)
    assert controller.refused("Probe")[0] == "FAILED_PRECONDITION"
