"""The chart rendered with many values, by Helm's own engine, once each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_WHY = "the engines for charts are not installed: pip install 'cachefs[test-charts]'"
helm = pytest.importorskip("helm_python", reason=_WHY)
yaml = pytest.importorskip("yaml", reason=_WHY)

CHART = Path(__file__).parents[2] / "charts" / "cachefs"
RELEASE = "fast"
NAMESPACE = "storage"

Manifest = dict[str, Any]

OTHERS = {"provisioner", "resizer", "registrar", "liveness-probe", "tokens", "tmpfs"}
"""Containers that do not run us."""

FIELDS = {
    "spec.nodeName": "node-7.example",
    "status.podIP": "10.1.2.3",
    "metadata.labels['topology.kubernetes.io/zone']": "eu-1a",
}
"""Of a pod, for its environment."""

MANAGED_TLS = {"enabled": True, "certManager": {"enabled": True}}
GIVEN_TOKENS = {"existingSecrets": {role: f"my-{role}-tokens" for role in ("master", "worker", "client", "admin")}}
MONITORING = {each: {"enabled": True} for each in ("serviceMonitor", "prometheusRule", "dashboard")}
LOADS = {
    "loads": [
        {"name": "once", "paths": ["/data/train", "/-odd name"]},
        {
            "name": "nightly",
            "paths": ["/data"],
            "schedule": "0 4 * * *",
            "replicas": 2,
            "limit": "500M",
            "promote": "if-space",
        },
    ]
}
MOUNT_OPTIONS = {
    "profile": "training",
    "open-mode": "auto",
    "promote": "always",
    "open-wait": "16M",
    "max-read": "1M",
    "read-ahead": "4M",
    "max-background": 128,
    "threads": 16,
    "attr-timeout": "5m",
    "entry-timeout": "5m",
    "negative-timeout": "0",
    "uid": 1000,
    "gid": 4294967294,
    "umask": "022",
    "xattr": True,
    "hung-after": "20s",
    "patience": "1m",
}

CELLS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tls of cert-manager": {"tls": MANAGED_TLS},
    "tls of an issuer": {
        "tls": {
            "enabled": True,
            "certManager": {"enabled": True, "issuer": {"name": "vault", "kind": "ClusterIssuer"}, "duration": "2160h"},
        }
    },
    "tls given": {
        "tls": {"enabled": True, "existingSecrets": {"master": "m-tls", "worker": "w-tls", "client": "c-tls"}},
        "clusterDomain": "corp.example",
    },
    "no csi": {
        "csi": {"enabled": False},
        "mounts": {"host": [{"name": "data", "path": "/data"}, {"name": "all", "path": "/"}]},
    },
    "memory only": {"worker": {"tiers": {"memory": {"enabled": True, "size": "32G"}, "disks": []}}},
    "tmpfs of its own": {"worker": {"tiers": {"memory": {"enabled": True, "size": "1T", "mountTmpfs": True}}}},
    "given secrets": {
        "tokens": GIVEN_TOKENS,
        "master": {"credentials": {"existingSecret": "bucket", "workersToo": True}},
        "imagePullSecrets": [{"name": "registry"}],
    },
    "monitoring": {"monitoring": MONITORING},
    "network policy": {
        "networkPolicy": {
            "enabled": True,
            "monitoringFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "clientsFrom": [{"podSelector": {"matchLabels": {"app": "tools"}}}],
        }
    },
    "warm-up": {"warmup": LOADS},
    "ipv6": {"listenAddress": "[::]", "fullnameOverride": "kv", "worker": {"hostNetwork": True}},
    "another kubelet": {
        "kubeletDir": "/data/kubelet",
        "runDir": "/run/two",
        "mounts": {"stateDir": "/data/mounts", "hostDir": "/data/mnt", "host": [{"name": "a-1", "path": "/a b's"}]},
    },
    "everything": {
        "tls": MANAGED_TLS,
        "monitoring": MONITORING,
        "networkPolicy": {"enabled": True},
        "warmup": LOADS,
        "image": {"repository": "registry.example:5000/cachefs", "tag": "1.2.3", "pullPolicy": "Always"},
        "logLevel": "DEBUG",
        "topology": {"labels": {"rack": "r7"}, "fromPodLabels": {"zone": "topology.kubernetes.io/zone"}},
        "master": {
            "mounts": [{"path": "/data", "url": "s3://bucket/prefix"}, {"path": "/other", "url": "file:///srv/x"}],
            "ufsOptions": {"endpoint_url": "http://minio:9000"},
            "credentials": {"existingSecret": "bucket"},
            "syncInterval": "-1",
            "pageSize": "4M",
            "blockSize": "1G",
            "persistence": {"size": "100Gi", "storageClass": "local-nvme"},
            "podDisruptionBudget": {"maxUnavailable": 0},
            "serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/cachefs"},
            "nodeSelector": {"pool": "system"},
            "priorityClassName": "high",
        },
        "worker": {
            "hostNetwork": True,
            "tiers": {
                "memory": {"enabled": True, "size": "512M", "mountTmpfs": True},
                "disks": [{"hostPath": "/nvme0/cachefs", "size": "3T"}, {"hostPath": "/nvme1/cachefs", "size": "3T"}],
            },
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
                    }
                }
            },
        },
        "mounts": {"host": [{"name": "data", "path": "/data"}], "options": MOUNT_OPTIONS},
        "csi": {
            "driverName": "two.csi.cachefs.io",
            "inlineUrls": True,
            "mayAttach": True,
            "secretNamespaces": ["team-a", "team-b"],
            "controller": {"replicas": 2},
            "storageClasses": [
                {
                    "name": "team-a",
                    "parameters": {
                        "url": "s3://team-a",
                        "subPath": "${pvc.namespace}/${pvc.name}",
                        "ufs.endpoint_url": "https://s3.example.com",
                        "csi.storage.k8s.io/provisioner-secret-name": "team-a-bucket",
                        "csi.storage.k8s.io/provisioner-secret-namespace": "team-a",
                    },
                    "mountOptions": ["profile=training"],
                    "annotations": {"storageclass.kubernetes.io/is-default-class": "false"},
                },
                {
                    "name": "shared",
                    "parameters": {"path": "/data", "quota": "none"},
                    "reclaimPolicy": "Retain",
                    "volumeBindingMode": "WaitForFirstConsumer",
                    "allowVolumeExpansion": False,
                },
            ],
        },
    },
}


class Container(NamedTuple):
    pod: str
    """Component, or name of the job."""
    spec: dict[str, Any]
    is_init: bool

    def flag(self, name: str) -> str | None:
        """The value of --name, if it is there once."""
        found = [each.partition("=")[2] for each in self.spec.get("args", []) if each.startswith(f"--{name}=")]
        assert len(found) <= 1, found
        return found[0] if found else None


def render(values: dict[str, Any]) -> dict[str, str]:
    """Name -> text."""
    with helm.Chart.load(CHART) as chart:
        rendered: dict[str, str] = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return rendered


def manifests_in(rendered: dict[str, str]) -> list[Manifest]:
    found = [each for name, text in rendered.items() if name.endswith(".yaml") for each in yaml.safe_load_all(text)]
    return [each for each in found if each]


@cache
def files(cell: str) -> dict[str, str]:
    return render(CELLS[cell])


@cache
def _manifests(cell: str) -> str:
    return json.dumps(manifests_in(files(cell)))


def manifests(cell: str) -> list[Manifest]:
    """Anew each time: a test may change them."""
    found: list[Manifest] = json.loads(_manifests(cell))
    return found


def of_kind(cell: str, kind: str) -> list[Manifest]:
    return [each for each in manifests(cell) if each["kind"] == kind]


def one(cell: str, kind: str, name: str) -> Manifest:
    (found,) = [each for each in of_kind(cell, kind) if each["metadata"]["name"] == name]
    return found


def workloads(cell: str) -> Iterator[tuple[Manifest, Manifest]]:
    """(workload, template of its pods)."""
    return workloads_in(manifests(cell))


def workloads_in(found: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    for each in found:
        if each["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield each, each["spec"]["template"]
        elif each["kind"] == "CronJob":
            yield each, each["spec"]["jobTemplate"]["spec"]["template"]


def pod_of(cell: str, component: str) -> Manifest:
    """The template of its pods."""
    (found,) = [
        pod for _, pod in workloads(cell) if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return found


def containers(cell: str) -> Iterator[Container]:
    for workload, pod in workloads(cell):
        name = workload["metadata"]["name"]
        for each in pod["spec"].get("initContainers", []):
            yield Container(name, each, True)
        for each in pod["spec"]["containers"]:
            yield Container(name, each, False)


def container(cell: str, component: str, name: str) -> Container:
    pod = pod_of(cell, component)
    (found,) = [each for each in pod["spec"]["containers"] if each["name"] == name]
    return Container(component, found, False)


def environment(each: Container) -> dict[str, str]:
    """As kubelet makes it."""
    return {
        variable["name"]: FIELDS[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in each.spec.get("env", [])
    }


def expanded(each: Container) -> list[str]:
    """Command and arguments with their $(VARIABLES). What is not known kubelet leaves as it is."""
    known = environment(each)

    def value(match: re.Match[str]) -> str:
        assert match[1] in known, f"{each.spec['name']}: {match[0]} is not in its environment"
        return known[match[1]]

    words = [*each.spec["command"], *each.spec["args"]]
    if words[:2] == ["/bin/sh", "-c"]:
        # Of a shell's $( ) kubelet takes nothing: no name of a variable follows.
        return words[:3] + [re.sub(r"\$\((\w+)\)", value, word) for word in words[3:]]
    return [re.sub(r"\$\((\w+)\)", value, word) for word in words]
