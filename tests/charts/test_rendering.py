"""Every set of values renders to manifests that every supported Kubernetes takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import cachefs
from tests.charts.rendered import CELLS, CHART, NAMESPACE, RELEASE, Manifest, files, helm, manifests, yaml

kubernetes_validate = pytest.importorskip("kubernetes_validate")

CUSTOM = {
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
}
"""Of operators. No schema of Kubernetes says what is right."""

_STANDARD = Counter(
    {
        "ServiceAccount": 6,
        "Secret": 4,
        "Service": 5,
        "DaemonSet": 4,
        "StatefulSet": 1,
        "Deployment": 1,
        "PodDisruptionBudget": 1,
        "CSIDriver": 1,
        "ClusterRole": 1,
        "ClusterRoleBinding": 1,
        "Role": 2,
        "RoleBinding": 2,
    }
)
_TLS = Counter({"Certificate": 3})
_OWN_AUTHORITY = Counter({"Certificate": 1, "Issuer": 2})
_MONITORING = Counter({"ServiceMonitor": 5, "PrometheusRule": 1, "ConfigMap": 1})
_WARMUP = Counter({"ServiceAccount": 1, "Job": 1, "CronJob": 1})

KINDS = {
    "defaults": _STANDARD,
    "tls of cert-manager": _STANDARD + _TLS + _OWN_AUTHORITY,
    "tls of an issuer": _STANDARD + _TLS,
    "tls given": _STANDARD,
    "no csi": Counter(
        {"ServiceAccount": 4, "Secret": 4, "Service": 3, "DaemonSet": 3, "StatefulSet": 1, "PodDisruptionBudget": 1}
    ),
    "memory only": _STANDARD,
    "tmpfs of its own": _STANDARD,
    "given secrets": _STANDARD - Counter({"Secret": 4}),
    "monitoring": _STANDARD + _MONITORING,
    "network policy": _STANDARD + Counter({"NetworkPolicy": 5}),
    "warm-up": _STANDARD + _WARMUP,
    "ipv6": _STANDARD,
    "another kubelet": _STANDARD,
    "everything": _STANDARD
    + _TLS
    + _OWN_AUTHORITY
    + _MONITORING
    + _WARMUP
    + Counter({"NetworkPolicy": 5, "PodDisruptionBudget": 1, "StorageClass": 2, "Role": 1, "RoleBinding": 1}),
}


def oldest_and_newest() -> tuple[str, str]:
    supported = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert supported.startswith(">=") and supported.endswith("-0")
    return supported.removeprefix(">=").removesuffix("-0"), kubernetes_validate.latest_version()


def unlike(many: Iterator[Manifest]) -> list[Manifest]:
    return [json.loads(text) for text in dict.fromkeys(json.dumps(each, sort_keys=True) for each in many)]


@pytest.mark.parametrize("cell", CELLS)
def test_each_kind_is_rendered_as_often_as_it_should(cell: str) -> None:
    assert Counter(each["kind"] for each in manifests(cell)) == KINDS[cell]


@pytest.mark.parametrize("cell", CELLS)
def test_helm_finds_nothing_to_complain_of(cell: str) -> None:
    for version in oldest_and_newest():
        report = helm.lint(CHART, CELLS[cell], strict=True, namespace=NAMESPACE, kube_version=f"v{version}")
        complaints = [each for each in report["messages"] if each["severity"] > 1]
        assert report["total_charts_linted"] == 1 and not complaints and not report["errors"], report


@pytest.mark.parametrize("which", [0, 1], ids=["oldest", "newest"])
def test_kubernetes_takes_every_manifest(which: int, schemas_read_once: None) -> None:
    version = oldest_and_newest()[which]
    validated: Counter[str] = Counter()
    for each in unlike(manifest for cell in CELLS for manifest in manifests(cell)):
        if (each["apiVersion"], each["kind"]) in CUSTOM:
            continue
        assert version.startswith(kubernetes_validate.validate(each, version, strict=True)), each
        validated[each["kind"]] += 1
    # Of every built-in kind there is, at least one of each cell's own.
    assert set(validated) == {kind for kinds in KINDS.values() for kind in kinds} - {kind for _, kind in CUSTOM}
    assert validated["DaemonSet"] >= 20 and validated["StatefulSet"] >= 6


def test_what_kubernetes_does_not_take_is_found(schemas_read_once: None) -> None:
    for which in oldest_and_newest():
        (wrong,) = [each for each in manifests("defaults") if each["kind"] == "StatefulSet"]
        wrong["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
        with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
            kubernetes_validate.validate(wrong, which, strict=True)


@pytest.mark.parametrize("example", sorted((CHART / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_takes_the_examples(example: Path, schemas_read_once: None) -> None:
    documents = list(yaml.safe_load_all(example.read_text()))
    assert documents
    for version in oldest_and_newest():
        for each in documents:
            assert version.startswith(kubernetes_validate.validate(each, version, strict=True))
            volumes = each["spec"].get("template", each).get("spec", {}).get("volumes", []) if "spec" in each else []
            drivers = [volume["csi"]["driver"] for volume in volumes if "csi" in volume]
            drivers += [each["provisioner"]] if each["kind"] == "StorageClass" else []
            drivers += [each["spec"]["csi"]["driver"]] if each["kind"] == "PersistentVolume" else []
            assert all(driver == "csi.cachefs.io" for driver in drivers)


def test_the_chart_installs_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == cachefs.__version__


@pytest.mark.parametrize("cell", CELLS)
def test_the_notes_are_for_what_was_installed(cell: str) -> None:
    notes = files(cell)["cachefs/templates/NOTES.txt"]
    name = "kv" if cell == "ipv6" else f"{RELEASE}-cachefs"
    assert f"{name}-master.{NAMESPACE}.svc." in notes
    assert ("TLS is off" in notes) == ("tls" not in cell and cell != "everything")
    assert ("Tokens were made by the chart" in notes) == (cell != "given secrets")
    assert "<no value>" not in "".join(files(cell).values())
