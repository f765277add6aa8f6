"""Pods started as kubelet starts them, from their manifests, on this machine and without an engine for containers.

What a container would see in its own file system and network lies elsewhere here. All that is put in the place of
something else, in command lines and probes:

| in a manifest | here |
|---|---|
| a path on a hostPath volume | the same path below DIRECTORY/node |
| a path on a volume of the pod | DIRECTORY/volumes/POD/VOLUME; with its files, where it is a Secret |
| 0.0.0.0, the address of the pod, the name of the master's Service | one address of 127.0.0.0/8 |
| the image | the commands of this Python |

A container that is not privileged has no capability, cannot get one, and does not see the node's directories that it
does not mount. And everybody is root: the users of containers are checked in test_consistency.py.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.charts.rendered import (
    FIELDS,
    NAMESPACE,
    OTHERS,
    RELEASE,
    Container,
    Manifest,
    environment,
    expanded,
    workloads_in,
)

LIMIT_S = 60.0
_HIDE = """
umount --all --lazy --types fuse.cachefs || true  # no more than an engine leaves of the node's mounts
while [ "$1" != -- ]; do [ ! -d "$1" ] || mount -t tmpfs none "$1"; shift; done
shift
exec "$@"
"""


def until(holds: Any, what: str) -> None:
    give_up_at = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < give_up_at, f"{what} did not come to be within {LIMIT_S:g} s"
        time.sleep(0.02)


class Machine:
    """`directory`: short, as sockets lie in it."""

    def __init__(self, directory: Path, manifests: list[Manifest]) -> None:
        self.directory = directory
        self.node = directory / "node"
        self.address = f"127.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}.{1 + os.getpid() // 32768 % 254}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._secrets = {each["metadata"]["name"]: each["data"] for each in manifests if each["kind"] == "Secret"}
        self._pods = {
            pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["spec"] for _, pod in workloads_in(manifests)
        }

    def give(self, secret: str, files: Mapping[str, bytes]) -> None:
        """A Secret that the chart does not make."""
        self._secrets[secret] = {name: base64.b64encode(content).decode() for name, content in files.items()}

    # ---- pods --------------------------------------------------------------------------------------------------------

    def start(self, component: str) -> None:
        """Its own containers; those of others, such as sidecars, are left out."""
        self._prepare(component)
        for each in self._ours(component):
            with self.log(component).open("ab") as log:
                self.processes[component] = subprocess.Popen(
                    self.command(component, each),
                    env=self._environment(each),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def run_job(self, component: str) -> subprocess.CompletedProcess[str]:
        """To its end."""
        self._prepare(component)
        (spec,) = self._ours(component)
        return self._run(component, spec)

    def _prepare(self, component: str) -> None:
        spec = self._pods[component]
        for volume in spec["volumes"]:
            self._make(component, volume)
        for each in spec.get("initContainers", []):
            done = self._run(component, each)
            assert done.returncode == 0, done.stderr

    def _run(self, component: str, spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(component, spec),
            env=self._environment(spec),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def wait_ready(self, component: str) -> None:
        """As the probes say that its containers have."""
        for each in self._ours(component):
            ports = {port["name"]: port["containerPort"] for port in each.get("ports", [])}
            for kind in ("startupProbe", "readinessProbe"):
                probe = each.get(kind, {})
                if "exec" in probe:
                    words = self._elsewhere(component, each, probe["exec"]["command"])
                    until(lambda words=words: subprocess.run(words).returncode == 0, f"{component}: {words}")
                elif "httpGet" in probe and probe["httpGet"]["port"] != "healthz":  # that is a sidecar's
                    url = f"http://{self.address}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
                    until(lambda url=url: self._answers(component, url), f"{component}: {url}")

    def metrics(self, component: str) -> str:
        """As it is scraped."""
        (each,) = self._ours(component)
        (port,) = [port["containerPort"] for port in each["ports"] if port["name"] == "metrics"]
        with urllib.request.urlopen(f"http://{self.address}:{port}/metrics", timeout=LIMIT_S) as answer:
            return str(answer.read().decode())

    def kill(self, component: str) -> None:
        process = self.processes.pop(component)
        process.kill()
        process.wait()

    def end(self) -> None:
        """All of them, as for a node that is shut down."""
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for component, process in self.processes.items():
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{component} does not end: {self.log(component).read_text()}") from None
        self.processes.clear()

    def log(self, component: str) -> Path:
        return self.directory / f"{component}.log"

    def of_node(self, path: str) -> Path:
        """Where a path of the node is here."""
        return self.node / path.lstrip("/")

    # ---- in the place of an engine -----------------------------------------------------------------------------------

    def command(self, component: str, spec: dict[str, Any]) -> list[str]:
        container = Container(component, {"args": [], **spec}, False)
        words = self._elsewhere(component, spec, expanded(container))
        security = spec["securityContext"]
        if security.get("privileged"):
            return words
        assert security["capabilities"] == {"drop": ["ALL"]} and security["allowPrivilegeEscalation"] is False
        alone = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _HIDE, "sh", *self._hidden(component)]
        return [*alone, "--", "setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *words]

    def _hidden(self, component: str) -> list[str]:
        """Directories of the node that other pods have."""
        own, others = (
            {volume["hostPath"]["path"] for volume in volumes if "hostPath" in volume}
            for volumes in (
                self._pods[component]["volumes"],
                [volume for spec in self._pods.values() for volume in spec["volumes"]],
            )
        )
        return [str(self.of_node(path)) for path in sorted(others - own)]

    def _elsewhere(self, component: str, spec: dict[str, Any], words: Sequence[str]) -> list[str]:
        volumes = {each["name"]: each for each in self._pods[component]["volumes"]}
        places = {
            each["mountPath"]: str(self._place(component, volumes.get(each["name"], {"name": each["name"]})))
            for each in sorted(spec["volumeMounts"], key=lambda each: -len(each["mountPath"]))
        }
        paths = re.compile(rf"((?<=://)|(?<![\w/.-]))({'|'.join(map(re.escape, places))})(?=$|[/:=])")
        names = (f"{RELEASE}-cachefs-master.{NAMESPACE}.svc.cluster.local", "0.0.0.0", FIELDS["status.podIP"])
        found = []
        for word in words:
            for name in names:
                word = word.replace(name, self.address)
            found.append(paths.sub(lambda match: places[match[2]], word))
        return found

    def _place(self, component: str, volume: dict[str, Any]) -> Path:
        if "hostPath" in volume:
            return self.of_node(volume["hostPath"]["path"])
        return self.directory / "volumes" / component / volume["name"]

    def _make(self, component: str, volume: dict[str, Any]) -> None:
        place = self._place(component, volume)
        if volume.get("hostPath", {}).get("type") == "Directory":
            assert place.is_dir(), f"kubelet would not start {component}: {place} is not there"
        place.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            data = self._secrets[volume["secret"]["secretName"]]
            for item in volume["secret"].get("items") or [{"key": name, "path": name} for name in data]:
                file = place / item["path"]
                file.write_bytes(base64.b64decode(data[item["key"]]))
                file.chmod(volume["secret"]["defaultMode"])

    def _ours(self, component: str) -> list[dict[str, Any]]:
        return [each for each in self._pods[component]["containers"] if each["name"] not in OTHERS]

    @staticmethod
    def _environment(spec: dict[str, Any]) -> dict[str, str]:
        assert "envFrom" not in spec
        return {**environment(Container("", spec, False)), "PATH": f"{Path(sys.executable).parent}:{os.defpath}"}

    def _answers(self, component: str, url: str) -> bool:
        assert self.processes[component].poll() is None, self.log(component).read_text()
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
