"""Tokens and certificates as the chart makes them are those that our processes take."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from cachefs.model import ConfigError
from cachefs.net import Role, TlsFiles, Tokens, load_tokens, make_security
from tests.charts.rendered import CHART, NAMESPACE, RELEASE, Manifest, helm, of_kind, pod_of, yaml

ROLES = {
    "master": {Role.CLIENT, Role.WORKER, Role.ADMIN},
    "worker": {Role.CLIENT, Role.WORKER},
    "client": {Role.CLIENT},
    "admin": {Role.CLIENT, Role.ADMIN},
}


def secrets(text: str) -> dict[str, dict[str, bytes]]:
    """Of rendered Secrets: name without the release's, and what is in them."""
    return {
        each["metadata"]["name"].removeprefix(f"{RELEASE}-cachefs-tokens-"): {
            name: base64.b64decode(value) for name, value in each["data"].items()
        }
        for each in yaml.safe_load_all(text)
        if each
    }


def written(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    path.chmod(0o400)
    return path


def test_each_secret_has_the_tokens_of_its_roles(tmp_path: Path) -> None:
    with helm.Chart.load(CHART) as chart:
        texts = [chart.render({}, name=RELEASE, namespace=NAMESPACE)["cachefs/templates/tokens.yaml"] for _ in range(2)]
    first, second = map(secrets, texts)
    assert first.keys() == ROLES.keys()
    loaded: dict[str, Tokens] = {}
    for name, roles in ROLES.items():
        loaded[name] = load_tokens(str(written(first[name]["tokens.toml"], tmp_path / name)))
        assert {role for role in Role if role in loaded[name]} == roles
        assert name == "master" or first[name].keys() == {"tokens.toml"}
    # One token for each role, which all that have it share; others in another release.
    for role in Role:
        lines = {
            line
            for each in first.values()
            for line in each["tokens.toml"].decode().splitlines()
            if line.startswith(role)
        }
        assert len(lines) == 1
        assert not lines & set(second["master"]["tokens.toml"].decode().splitlines())
    assert len({first["master"][role] for role in Role}) == 3


class _ApiServer(BaseHTTPRequestHandler):
    """As much of Kubernetes as `lookup` asks for: what there is, and one Secret."""

    kept: Manifest
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        found: dict[str, Any] | None = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
            "/version": {"major": "1", "minor": "30", "gitVersion": "v1.30.0"},
            "/api/v1": {
                "kind": "APIResourceList",
                "groupVersion": "v1",
                "resources": [{"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get", "list"]}],
            },
            f"/api/v1/namespaces/{NAMESPACE}/secrets/{self.kept['metadata']['name']}": self.kept,
        }.get(path)
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(found or missing).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def api_server(kept: Manifest) -> Iterator[tuple[str, list[str]]]:
    """(its URL, the paths it was asked for)"""
    asked: list[str] = []
    handler = type("Handler", (_ApiServer,), {"kept": kept, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_upgrade_keeps_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with helm.Chart.load(CHART) as chart:
        first = chart.render({}, name=RELEASE, namespace=NAMESPACE)["cachefs/templates/tokens.yaml"]
        (kept,) = [each for each in yaml.safe_load_all(first) if each and each["metadata"]["name"].endswith("-master")]
        with (
            api_server(kept) as (url, asked),
            helm.Config(kube_apiserver=url, kubeconfig_content="{}", namespace=NAMESPACE) as cluster,
        ):
            again = cluster.render(chart, {}, name=RELEASE, namespace=NAMESPACE, is_upgrade=True)
    assert secrets(again["cachefs/templates/tokens.yaml"]) == secrets(first)
    assert asked[-1].endswith(f"/secrets/{RELEASE}-cachefs-tokens-master")


def test_pods_that_are_not_root_make_the_file_theirs(tmp_path: Path) -> None:
    """kubelet gives Secrets to the pod's group: such a file is refused, and what the init container makes is not."""
    (init,) = pod_of("defaults", "master")["spec"]["initContainers"]
    (secret,) = [each for each in of_kind("defaults", "Secret") if each["metadata"]["name"].endswith("-master")]
    mounts = {each["mountPath"]: tmp_path / each["name"] for each in init["volumeMounts"]}
    for path in mounts.values():
        path.mkdir()
    given = mounts["/etc/cachefs/tokens-secret"] / "tokens.toml"
    given.write_bytes(base64.b64decode(secret["data"]["tokens.toml"]))
    given.chmod(0o440)
    with pytest.raises(ConfigError, match="0440"):
        load_tokens(str(given))
    command = list(init["command"])
    for inside, path in sorted(mounts.items(), reverse=True):
        command = [word.replace(f"{inside}/", f"{path}/") for word in command]
    subprocess.run(command, check=True, timeout=60)
    assert Role.ADMIN in load_tokens(str(mounts["/etc/cachefs/tokens"] / "tokens.toml"))


def tmpfs_command(place: Path, mebibytes: int) -> list[str]:
    """What the init container runs, for another place and size."""
    (init,) = pod_of("everything", "worker")["spec"]["initContainers"]
    assert init["name"] == "tmpfs" and init["args"][-1] == "512m"
    words = [*init["command"], *init["args"][:-1], f"{mebibytes}m"]
    return [word.replace("/dev/shm/cachefs", str(place)) for word in words]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("is_on_a_tmpfs", [False, True], ids=["on a disk", "in /dev/shm"])
def test_a_tmpfs_of_the_tiers_size_is_mounted_once(tmp_path: Path, is_on_a_tmpfs: bool) -> None:
    place, shm = tmp_path / "tier", tmp_path / "shm"
    place.mkdir()
    shm.mkdir()
    mounts = 0
    try:
        if is_on_a_tmpfs:
            # As container engines bind a directory of the node, which lies on a tmpfs that is too small.
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", shm], check=True, timeout=60)
            (shm / "cachefs").mkdir()
            subprocess.run(["mount", "--bind", shm / "cachefs", place], check=True, timeout=60)
            mounts = 1
        # As the pod is started, and started again; and after an upgrade to a larger tier.
        for mebibytes in (512, 512, 600):
            subprocess.run(tmpfs_command(place, mebibytes), check=True, timeout=60)
            mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            assert mounted.count(str(place)) == mounts + 1
            status = os.statvfs(place)
            assert status.f_blocks * status.f_frsize == mebibytes * 2**20
        # To a smaller one, which does not fit yet: the worker is started all the same, and evicts.
        (place / "block").write_bytes(bytes(3 * 2**20))
        subprocess.run(tmpfs_command(place, 2), check=True, timeout=60)
        assert (place / "block").stat().st_size == 3 * 2**20
    finally:
        for each in (place, place, shm):
            subprocess.run(["umount", each], check=False, timeout=60, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_tmpfs_that_somebody_else_mounted_for_it_is_left_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "tier"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "theirs", place], check=True, timeout=60)
    try:
        subprocess.run(tmpfs_command(place, 512), check=True, timeout=60)
        assert os.statvfs(place).f_blocks * os.statvfs(place).f_frsize == 2**20
    finally:
        subprocess.run(["umount", place], check=False, timeout=60)


def names_of_certificates(cell: str) -> dict[str, list[str]]:
    return {
        each["spec"]["secretName"].rpartition("-")[2]: each["spec"]["dnsNames"]
        for each in of_kind(cell, "Certificate")
        if "dnsNames" in each["spec"]
    }


@pytest.mark.parametrize(
    ("server", "host", "client"),
    [
        ("master", "fast-cachefs-master.storage.svc.cluster.local", "worker"),
        ("master", "fast-cachefs-master.storage.svc.cluster.local", "client"),
        ("worker", "10-1-2-3.fast-cachefs-worker.storage.svc.cluster.local", "client"),
        ("worker", "10-1-2-3.fast-cachefs-worker.storage.svc.cluster.local", "worker"),
    ],
)
def test_certificates_are_for_the_names_that_others_connect_to(
    server: str, host: str, client: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    contexts = {}
    tokens = Tokens({role: str(role) + "x" * 40 for role in Role})
    for role, names in names_of_certificates("tls of cert-manager").items():
        certificate = authority.issue_cert(*names)
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{role}.crt")
        certificate.private_key_pem.write_to_path(tmp_path / f"{role}.key")
        files = TlsFiles(str(tmp_path / f"{role}.crt"), str(tmp_path / f"{role}.key"), str(tmp_path / "ca.crt"))
        contexts[role] = make_security(tokens, Role.CLIENT, files)
    assert contexts.keys() == {"master", "worker", "client"}
    shake_hands(contexts[server].server_tls, contexts[client].client_tls, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        shake_hands(contexts[server].server_tls, contexts[client].client_tls, "other.storage.svc.cluster.local")


def shake_hands(server: ssl.SSLContext | None, client: ssl.SSLContext | None, host: str) -> None:
    assert server is not None and client is not None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(sides)
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    assert sides[1].getpeercert() or sides[1].getpeercert(binary_form=True)
