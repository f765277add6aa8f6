"""What selects finds, what is named is there, and who may do what is as little as it can be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest

from tests.charts.rendered import (
    CELLS,
    LOADS,
    MANAGED_TLS,
    NAMESPACE,
    Manifest,
    containers,
    manifests,
    manifests_in,
    of_kind,
    one,
    pod_of,
    render,
    workloads,
)

PRIVILEGED = {"mounts", "csi", "tmpfs"}
"""Containers that mount for their node."""


def component(pod: Manifest) -> str:
    found: str = pod["metadata"]["labels"]["app.kubernetes.io/component"]
    return found


def selected(cell: str, selector: dict[str, Any]) -> list[Manifest]:
    labels = selector.get("matchLabels", selector)
    found = [pod for _, pod in workloads(cell) if labels.items() <= pod["metadata"]["labels"].items()]
    for wanted in (
        selector.get("matchExpressions", []) if "matchLabels" in selector or "matchExpressions" in selector else []
    ):
        found = [pod for pod in found if pod["metadata"]["labels"].get(wanted["key"]) in wanted["values"]]
    return found


def expressed(cell: str, selector: dict[str, Any]) -> list[Manifest]:
    return [
        pod
        for _, pod in workloads(cell)
        if all(pod["metadata"]["labels"].get(each["key"]) in each["values"] for each in selector["matchExpressions"])
    ]


def port_names(pod: Manifest) -> set[str]:
    return {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", [])}


@pytest.mark.parametrize("cell", CELLS)
def test_selectors_find_the_pods_of_one_workload(cell: str) -> None:
    for each in manifests(cell):
        kind, spec = each["kind"], each.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "DaemonSet"):
            assert selected(cell, spec["selector"]) == [spec["template"]], each["metadata"]
        elif kind == "Service":
            (pod,) = selected(cell, spec["selector"])
            assert {port["targetPort"] for port in spec["ports"]} <= port_names(pod)
        elif kind == "PodDisruptionBudget":
            assert len(selected(cell, spec["selector"])) == 1
        elif kind == "NetworkPolicy":
            (pod,) = selected(cell, spec["podSelector"])
            assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} <= port_names(pod)
        elif kind == "ServiceMonitor":
            (service,) = [
                other
                for other in of_kind(cell, "Service")
                if spec["selector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
            ]
            names = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in spec["endpoints"]} <= names
            assert spec["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]


@pytest.mark.parametrize("cell", CELLS)
def test_ports_and_probes_are_those_that_containers_listen_at(cell: str) -> None:
    probed = set()
    for each in containers(cell):
        ports = {port["name"]: port["containerPort"] for port in each.spec.get("ports", [])}
        assert len(set(ports.values())) == len(ports)
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in each.spec.get(kind, {}):
                assert each.spec[kind]["httpGet"]["port"] in ports
                assert each.spec[kind]["httpGet"]["path"] == ("/readyz" if kind == "readinessProbe" else "/healthz")
                probed.add(each.spec["name"])
        for flag, name in (("http", "metrics"), ("listen", "cachefs")):
            address = each.flag(flag)
            if address is not None:
                assert int(address.rpartition(":")[2]) == ports[name], each.spec["name"]
    assert probed >= {"master", "worker", "mounts"} | (set() if cell == "no csi" else {"csi"})
    # A probe that failed would end every mount of the node.
    (keeper,) = [each for each in containers(cell) if each.spec["name"] == "keeper"]
    assert "livenessProbe" not in keeper.spec


@pytest.mark.parametrize("cell", CELLS)
def test_ports_of_one_pod_and_of_one_node_are_different(cell: str) -> None:
    """Of pods with the node's network every port is one of the node."""
    of_nodes: list[int] = []
    for workload, pod in workloads(cell):
        ports = [port for each in pod["spec"]["containers"] for port in each.get("ports", [])]
        numbers = [port["containerPort"] for port in ports]
        # What it listens at, whether it is said in the manifest or not.
        words = [word for each in pod["spec"]["containers"] for word in each.get("args", [])]
        said = [re.fullmatch(r"--(?:http|listen|http-endpoint)=.*:(\d+)", word) for word in words]
        listening = [int(each[1]) for each in said if each is not None]
        assert sorted(listening) == sorted(numbers) and len(set(numbers)) == len(numbers), workload["metadata"]["name"]
        assert not any("hostPort" in port for port in ports)
        if pod["spec"].get("hostNetwork"):
            # Two on one node would be two of the same.
            assert workload["kind"] == "DaemonSet"
            of_nodes += numbers
    assert len(set(of_nodes)) == len(of_nodes)
    assert bool(of_nodes) is (cell in ("ipv6", "everything"))


def test_no_two_components_have_the_same_ports_by_default() -> None:
    """So that it makes no difference who gets the node's network, and one rule of a firewall tells them apart."""
    found = [
        (port["containerPort"], component(pod))
        for _, pod in workloads("defaults")
        for each in pod["spec"]["containers"]
        for port in each.get("ports", [])
        if port["name"] != "healthz"
    ]
    assert len({port for port, _ in found}) == len(found) == 7


@pytest.mark.parametrize("cell", ["monitoring", "network policy", "everything"])
def test_who_has_metrics_is_scraped_and_may_be(cell: str) -> None:
    def with_metrics(pods: Iterable[Manifest]) -> set[str]:
        return {component(pod) for pod in pods if "metrics" in port_names(pod)}

    wanted = with_metrics(pod for _, pod in workloads(cell))
    assert wanted == {"master", "worker", "mounts", "csi-node", "csi-controller"}
    if cell != "network policy":
        services = [
            each
            for monitor in of_kind(cell, "ServiceMonitor")
            for each in of_kind(cell, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
        ]
        assert {component(pod) for each in services for pod in selected(cell, each["spec"]["selector"])} == wanted
    if cell != "monitoring":
        allowed = {
            component(pod): rule.get("from")
            for policy in of_kind(cell, "NetworkPolicy")
            for rule in policy["spec"]["ingress"]
            if rule["ports"] == [{"port": "metrics"}]
            for pod in selected(cell, policy["spec"]["podSelector"])
        }
        given = CELLS[cell]["networkPolicy"].get("monitoringFrom")
        assert allowed == dict.fromkeys(wanted, given)


def test_a_network_policy_lets_in_who_asks() -> None:
    for cell, may_load in (("network policy", False), ("everything", True)):
        asking = {"master", "worker", "mounts", "csi-node", "csi-controller"} | ({"warmup"} if may_load else set())
        for asked, askers in (("master", asking), ("worker", {"worker", "mounts"})):
            (policy,) = [
                each
                for each in of_kind(cell, "NetworkPolicy")
                if selected(cell, each["spec"]["podSelector"]) == [pod_of(cell, asked)]
            ]
            (rule,) = [each for each in policy["spec"]["ingress"] if each["ports"] == [{"port": "cachefs"}]]
            assert {component(pod) for pod in expressed(cell, rule["from"][0]["podSelector"])} == askers


@pytest.mark.parametrize("cell", CELLS)
def test_what_pods_mount_is_there(cell: str) -> None:
    here = manifests(cell)
    accounts = {each["metadata"]["name"] for each in here if each["kind"] == "ServiceAccount"}
    for workload, pod in workloads(cell):
        spec = pod["spec"]
        assert spec["serviceAccountName"] in accounts
        volumes = {each["name"]: each for each in spec["volumes"]}
        volumes |= {each["metadata"]["name"]: each for each in workload["spec"].get("volumeClaimTemplates", [])}
        assert len(volumes) == len(spec["volumes"]) + len(workload["spec"].get("volumeClaimTemplates", []))
        used = set()
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            paths = [mount["mountPath"] for mount in each["volumeMounts"]]
            assert len(set(paths)) == len(paths)
            used |= {mount["name"] for mount in each["volumeMounts"]}
        assert used == volumes.keys(), workload["metadata"]["name"]


@pytest.mark.parametrize("cell", CELLS)
def test_secrets_are_those_of_the_chart_or_given(cell: str) -> None:
    made = {each["metadata"]["name"] for each in of_kind(cell, "Secret")}
    made |= {each["spec"]["secretName"] for each in of_kind(cell, "Certificate")}
    given = {
        "m-tls",
        "w-tls",
        "c-tls",
        "bucket",
        *(f"my-{each}-tokens" for each in ("master", "worker", "client", "admin")),
    }
    for _, pod in workloads(cell):
        asked = {each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each}
        asked |= {
            source["secretRef"]["name"] for each in pod["spec"]["containers"] for source in each.get("envFrom", [])
        }
        assert asked <= made | given
        if cell != "given secrets":
            assert not any(name.startswith("my-") for name in asked)


def test_each_role_has_its_own_tokens_and_no_others() -> None:
    roles = {
        "master": "master",
        "worker": "worker",
        "mounts": "client",
        "csi-node": "client",
        "csi-controller": "admin",
        "warmup": "admin",
        "keeper": None,
    }
    for cell in ("given secrets", "warm-up"):
        for _, pod in workloads(cell):
            mine = [
                each["secret"]["secretName"]
                for each in pod["spec"]["volumes"]
                if "secret" in each and each["name"].startswith("tokens")
            ]
            role = roles[component(pod)]
            named = f"my-{role}-tokens" if cell == "given secrets" else f"fast-cachefs-tokens-{role}"
            assert mine == ([named] if role else []), component(pod)
    # Who may attach has to be an admin, and nobody is by default.
    secrets = [
        each["secret"]["secretName"] for each in pod_of("everything", "csi-node")["spec"]["volumes"] if "secret" in each
    ]
    assert secrets == ["fast-cachefs-tokens-admin", "fast-cachefs-tls-client"]


@pytest.mark.parametrize("cell", CELLS)
def test_only_who_mounts_is_privileged(cell: str) -> None:
    for workload, pod in workloads(cell):
        spec = pod["spec"]
        for each in [*spec["containers"], *spec.get("initContainers", [])]:
            security = each["securityContext"]
            is_bidirectional = any(mount.get("mountPropagation") == "Bidirectional" for mount in each["volumeMounts"])
            is_driver_of_nodes = each["name"] != "csi" or component(pod) == "csi-node"
            if each["name"] in PRIVILEGED and is_driver_of_nodes:
                assert security["privileged"] and is_bidirectional, each["name"]
            else:
                assert not is_bidirectional
                assert security["allowPrivilegeEscalation"] is False
                assert security["capabilities"] == {"drop": ["ALL"]}
                assert "privileged" not in security
            assert security["readOnlyRootFilesystem"] is True
            assert each["resources"]["requests"] and each["resources"]["limits"]["memory"], workload["metadata"]["name"]
        if component(pod) in ("master", "csi-controller", "warmup"):
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 65532
        assert spec["automountServiceAccountToken"] is (component(pod) == "csi-controller")
        assert not {"hostPID", "hostIPC"} & spec.keys()
        # Variables such as CACHEFS_MASTER_PORT would be taken for settings.
        assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize("cell", CELLS)
def test_workers_and_mounts_see_tiers_at_the_same_paths(cell: str) -> None:
    def tiers(name: str) -> dict[str, tuple[str, bool]]:
        pod = pod_of(cell, name)["spec"]
        paths = {each["name"]: each["hostPath"]["path"] for each in pod["volumes"] if each["name"].startswith("tier")}
        return {
            paths[each["name"]]: (each["mountPath"], each["readOnly"])
            for each in pod["containers"][0]["volumeMounts"]
            if each["name"] in paths
        }

    written, read = tiers("worker"), tiers("mounts")
    assert written and written.keys() == read.keys()
    assert all(inside == path and not is_read_only for path, (inside, is_read_only) in written.items())
    assert all(inside == path and is_read_only for path, (inside, is_read_only) in read.items())


def test_roles_give_what_the_sidecars_need_and_nothing_of_all_namespaces_secrets() -> None:
    (role,) = of_kind("defaults", "ClusterRole")
    granted = {
        (group, what): rule["verbs"]
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for what in rule["resources"]
    }
    assert not any("*" in (*key, *verbs) for key, verbs in granted.items())
    assert ("", "secrets") not in granted and ("", "pods") not in granted
    assert granted["", "persistentvolumes"] == ["get", "list", "watch", "create", "patch", "delete"]
    for cell, namespaces in (("defaults", {NAMESPACE}), ("everything", {"team-a", "team-b"})):
        named = [each for each in of_kind(cell, "Role") if each["rules"][0]["resources"] == ["secrets"]]
        assert {each["metadata"]["namespace"] for each in named} == namespaces
        assert all(each["rules"] == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}] for each in named)
    for cell in CELLS:
        here = manifests(cell)
        names = {(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in here}
        assert len(names) == len(here), cell
        for each in here:
            if each["kind"].endswith("RoleBinding") or each["kind"] == "RoleBinding":
                where = None if each["roleRef"]["kind"] == "ClusterRole" else each["metadata"]["namespace"]
                assert (each["roleRef"]["kind"], where, each["roleRef"]["name"]) in names
                assert all(("ServiceAccount", who["namespace"], who["name"]) in names for who in each["subjects"])


def test_the_driver_is_what_its_node_plugin_says() -> None:
    for cell, name, modes in (
        ("defaults", "csi.cachefs.io", ["Persistent", "Ephemeral"]),
        ("everything", "two.csi.cachefs.io", ["Persistent", "Ephemeral"]),
    ):
        driver = one(cell, "CSIDriver", name)["spec"]
        assert driver["attachRequired"] is False and driver["podInfoOnMount"] is True
        assert driver["volumeLifecycleModes"] == modes
        for each in containers(cell):
            if each.spec["name"] == "csi":
                assert each.flag("driver-name") == name
        (registrar,) = [each for each in containers(cell) if each.spec["name"] == "registrar"]
        path = f"/var/lib/kubelet/plugins/{name}"
        assert registrar.flag("kubelet-registration-path") == f"{path}/csi.sock"
        (socket,) = [each for each in pod_of(cell, "csi-node")["spec"]["volumes"] if each["name"] == "socket"]
        assert socket["hostPath"]["path"] == path
    assert {each["provisioner"] for each in of_kind("everything", "StorageClass")} == {"two.csi.cachefs.io"}
    classes = {each["metadata"]["name"]: each for each in of_kind("everything", "StorageClass")}
    assert classes["team-a"]["allowVolumeExpansion"] and not classes["shared"]["allowVolumeExpansion"]


@pytest.mark.parametrize("cell", CELLS)
def test_images_are_those_of_the_values(cell: str) -> None:
    ours = "registry.example:5000/cachefs:1.2.3" if cell == "everything" else "ghcr.io/cachefs/cachefs:0.1.0"
    images = {each.spec["image"] for each in containers(cell)}
    others = {image for image in images if image.startswith("registry.k8s.io/sig-storage/")}
    assert images - others == {ours}
    assert len(others) == (0 if cell == "no csi" else 4)
    if cell == "given secrets":
        assert all(pod["spec"]["imagePullSecrets"] == [{"name": "registry"}] for _, pod in workloads(cell))


def test_updates_replace_all_but_keepers() -> None:
    strategies = {
        component(each["spec"]["template"]): each["spec"]["updateStrategy"] for each in of_kind("defaults", "DaemonSet")
    }
    assert strategies.pop("keeper") == {"type": "OnDelete"}
    assert strategies.keys() == {"worker", "mounts", "csi-node"}
    assert all(each["rollingUpdate"]["maxUnavailable"] for each in strategies.values())


WRITABLE = ("/var/lib/", "/run/", "/dev/shm/")
"""Where systems for nodes that are read-only otherwise (Talos, Bottlerocket, Container-Optimized OS) can be written."""


@pytest.mark.parametrize("cell", ["defaults", "no csi", "memory only"])
def test_directories_of_nodes_are_where_every_node_can_be_written(cell: str) -> None:
    paths = [
        volume["hostPath"]["path"]
        for _, pod in workloads(cell)
        for volume in pod["spec"]["volumes"]
        if "hostPath" in volume
    ]
    assert len(paths) > 5
    assert [path for path in paths if not path.startswith(WRITABLE)] == []


def test_what_a_job_runs_is_part_of_its_name_as_jobs_cannot_be_changed() -> None:
    (job,) = of_kind("warm-up", "Job")
    assert job["metadata"]["name"].startswith("fast-cachefs-warmup-once-")
    names = {job["metadata"]["name"]}
    for other in (
        {"image": {"tag": "2"}},
        {"warmup": {"resources": {"limits": {"memory": "1Gi"}}}},
        {"master": {"port": 7777}},
        {"tls": MANAGED_TLS},
        {"imagePullSecrets": [{"name": "registry"}]},
        {"warmup": {"loads": [{"name": "once", "paths": ["/other"]}]}},
    ):
        values = {"warmup": {}, **other}
        values["warmup"] = {**LOADS, **values["warmup"]}
        (changed,) = [each for each in manifests_in(render(values)) if each["kind"] == "Job"]
        assert changed["spec"] != job["spec"]
        names.add(changed["metadata"]["name"])
    assert len(names) == 7
    # What it does not run changes nothing: it would be loaded again for nothing.
    (same,) = [
        each for each in manifests_in(render({"warmup": LOADS, "worker": {"filesAhead": 7}})) if each["kind"] == "Job"
    ]
    assert same == job


@pytest.mark.parametrize(
    ("cell", "request_mi", "limit_mi"),
    [
        ("defaults", 512, 640),
        ("memory only", 512 + 32 * 1024, 640 + 32 * 1024),
        ("tmpfs of its own", 512 + 2**20, 640 + 2**20),
    ],
)
def test_a_worker_may_use_the_memory_of_its_tier(cell: str, request_mi: int, limit_mi: int) -> None:
    (worker,) = [each for each in containers(cell) if each.spec["name"] == "worker"]
    assert worker.spec["resources"]["requests"]["memory"] == f"{request_mi}Mi"
    assert worker.spec["resources"]["limits"]["memory"] == f"{limit_mi}Mi"


def test_mounts_may_use_the_memory_of_all_of_them() -> None:
    entries_mi = -(-1_000_000 * 350 // 2**20)
    for cell, count in (("defaults", 16), ("no csi", 2), ("everything", 17)):
        (mounts,) = [each for each in containers(cell) if each.spec["name"] == "mounts"]
        assert mounts.spec["resources"]["limits"]["memory"] == f"{128 + count * (256 + entries_mi)}Mi"
        assert mounts.spec["resources"]["requests"]["memory"] == f"{384 + entries_mi}Mi"
