"""Values are documented, and wrong ones are refused with what is right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import pytest

from cachefs.cli.main import load_command
from tests.charts.rendered import CHART, MOUNT_OPTIONS, helm, manifests_in, yaml

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"worker": {"tires": {}}}, r"/worker'.*'tires' not allowed"),
    ({"wrker": {}}, "'wrker' not allowed"),
    (
        {"worker": {"tiers": {"disks": [{"hostPath": "/x", "size": "100Gi"}]}}},
        r"/worker/tiers/disks/0/size'.*'100Gi' does not match",
    ),
    ({"worker": {"tiers": {"disks": [{"hostPath": "x", "size": "1G"}]}}}, r"/disks/0/hostPath'.*'x' does not match"),
    ({"worker": {"tiers": {"disks": [{"hostPath": "/x"}]}}}, r"missing property 'size'"),
    ({"worker": {"keepFree": "95%"}}, r"/worker/keepFree'.*'95%' does not match"),
    ({"worker": {"filesAhead": 1001}}, r"/worker/filesAhead'.*maximum: got 1,001, want 1,000"),
    ({"worker": {"promote": "sometimes"}}, r"'always', 'if-space', 'never'"),
    ({"worker": {"port": 0}}, r"/worker/port'.*minimum"),
    ({"csi": {"nodePlugin": {"httpPort": 65536}}}, r"/csi/nodePlugin/httpPort'.*maximum: got 65,536, want 65,535"),
    ({"worker": {"maxUnavailable": "0%"}}, r"/worker/maxUnavailable"),
    ({"master": {"mounts": [{"path": "data", "url": "s3://x"}]}}, r"/master/mounts/0/path'.*'data' does not match"),
    ({"master": {"mounts": [{"path": "/data", "url": "bucket"}]}}, r"/master/mounts/0/url'.*'bucket' does not match"),
    ({"master": {"mounts": [{"path": "/d", "url": "s3://x", "options": {}}]}}, r"'options' not allowed"),
    ({"master": {"ufsOptions": {"secret": "x"}}}, r"/master/ufsOptions"),
    ({"master": {"replicas": 3}}, r"'replicas' not allowed"),
    ({"master": {"persistence": {"size": "20G"}}}, r"/master/persistence/size"),
    ({"master": {"syncInterval": "soon"}}, r"/master/syncInterval"),
    ({"mounts": {"options": {"master": "evil:7000"}}}, r"/mounts/options'.*'master' not allowed"),
    ({"mounts": {"options": {"open-mode": "fast"}}}, r"/mounts/options/open-mode'.*'passthrough'"),
    ({"mounts": {"host": [{"name": "../etc", "path": "/"}]}}, r"/mounts/host/0/name"),
    ({"csi": {"driverName": "UPPER"}}, r"/csi/driverName"),
    ({"csi": {"controller": {"replicas": 0}}}, r"/csi/controller/replicas'.*minimum"),
    ({"csi": {"storageClasses": [{"name": "x", "parameters": {"bucket": "b"}}]}}, r"'bucket'"),
    ({"csi": {"sidecars": {"provisioner": "csi-provisioner"}}}, r"/csi/sidecars/provisioner"),
    ({"logLevel": "TRACE"}, r"'DEBUG', 'INFO', 'WARNING', 'ERROR'"),
    ({"listenAddress": "127.0.0.1"}, r"/listenAddress"),
    ({"tls": {"enabled": "yes"}}, r"/tls/enabled'.*want boolean"),
    ({"networkPolicy": {"monitoringFrom": [{}]}}, r"/networkPolicy/monitoringFrom/0"),
    ({"warmup": {"loads": [{"name": "x", "paths": []}]}}, r"/warmup/loads/0/paths'.*minItems"),
    ({"topology": {"labels": {"zone": ""}}}, r"/topology/labels/zone"),
    ({"fullnameOverride": "a.b"}, r"/fullnameOverride'.*'a.b' does not match"),
    ({"fullnameOverride": "1a"}, r"/fullnameOverride'.*'1a' does not match"),
]

TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"tokens": {"existingSecrets": {"master": "x"}}}, "either all of master, worker, client and admin, or none"),
    ({"tls": {"enabled": True}}, "all of master, worker and client are needed, or certManager.enabled"),
    (
        {"tls": {"enabled": True, "existingSecrets": {"master": "x"}, "certManager": {"enabled": True}}},
        "either existingSecrets or certManager.enabled",
    ),
    ({"worker": {"tiers": {"disks": []}}}, "worker.tiers: at least one"),
    ({"master": {"port": 9100}}, "master.httpPort: 9100 is master.port too"),
    ({"worker": {"httpPort": 7001, "hostNetwork": True}}, "worker.httpPort: 7001 is worker.port too"),
    ({"csi": {"controller": {"httpPort": 9808}}}, "csi.controller.httpPort: 9808 is that of the liveness sidecar"),
    ({"csi": {"nodePlugin": {"httpPort": 9808}}}, "csi.nodePlugin.httpPort: 9808 is that of the liveness sidecar"),
    ({"csi": {"inlineUrls": True}}, "csi.inlineUrls needs csi.mayAttach"),
    (
        {"csi": {"inlineUrls": True, "mayAttach": True, "inlineVolumes": False}},
        "csi.inlineUrls needs csi.inlineVolumes",
    ),
    (
        {"warmup": {"loads": [{"name": "x", "paths": ["/a"]}, {"name": "x", "paths": ["/b"]}]}},
        "warmup.loads: x: the name is there twice",
    ),
    (
        {
            "fullnameOverride": "training-platform-of-the-vision-team",
            "warmup": {"loads": [{"name": "nightly-images", "paths": ["/a"], "schedule": "0 4 * * *"}]},
        },
        r"warmup.loads: nightly-images: the name .* has 58 characters, and Kubernetes takes 52",
    ),
    ({"csi": {"storageClasses": [{"name": "x", "parameters": {}}]}}, "x: parameters needs exactly one of url and path"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[json.dumps(values) for values, _ in WRONG])
def test_the_schema_refuses(values: dict[str, Any], message: str) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmValuesError, match=message):
        chart.validate_schema(values)
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmError):
        chart.render(values)


@pytest.mark.parametrize(("values", "message"), TOGETHER, ids=[json.dumps(values) for values, _ in TOGETHER])
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], message: str) -> None:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        with pytest.raises(helm.HelmRenderError, match=message):
            chart.render(values)


def test_releases_may_be_called_what_helm_takes() -> None:
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render({}, name="v1.2-cache", namespace="x")
        (service,) = [each for each in manifests_in(rendered) if each["kind"] == "Service" and "worker" in str(each)][
            :1
        ]
        assert re.fullmatch("[a-z][a-z0-9-]{0,62}", service["metadata"]["name"])
        with pytest.raises(helm.HelmRenderError, match='would begin with "1-cachefs", and Services must begin'):
            chart.render({}, name="1", namespace="x")


def test_the_readme_is_that_of_the_values() -> None:
    made = subprocess.run(
        [sys.executable, CHART.parent / "values_table.py"], capture_output=True, check=True, text=True, timeout=120
    )
    assert (CHART / "README.md").read_text() == made.stdout, (
        "run: python charts/values_table.py > charts/cachefs/README.md"
    )


def leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path


def test_every_value_is_documented() -> None:
    documented = [
        line.split("`")[1] for line in (CHART / "README.md").read_text().splitlines() if line.startswith("| `")
    ]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for leaf in leaves(values):
        assert any(leaf == row or leaf.startswith(f"{row}.") for row in documented), f"{leaf} has no comment"
    assert len(set(documented)) == len(documented)


def test_the_schema_knows_every_value_and_no_others() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(part: dict[str, Any], values: dict[str, Any], path: str) -> None:
        names = set(part["properties"]) - ({"global"} if not path else set())
        assert names == set(values), path
        assert part["additionalProperties"] is False, path
        for name, value in values.items():
            inner = part["properties"][name]
            if "properties" in inner and path + name != "mountsoptions":
                check(inner, value, path + name)

    check(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


def test_options_of_mounts_are_flags_of_mounts() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    allowed = schema["properties"]["mounts"]["properties"]["options"]["properties"]
    flags = {
        name.removeprefix("--"): option
        for option in load_command("mount").params
        if isinstance(option, click.Option)
        for name in option.opts
    }
    assert set(MOUNT_OPTIONS) == set(allowed) <= set(flags)
    for name, rule in allowed.items():
        kind = flags[name].type
        if isinstance(kind, click.Choice):
            found = rule.get("enum") or schema["definitions"][rule["$ref"].rpartition("/")[2]]["enum"]
            assert list(kind.choices) == found, name
        elif isinstance(kind, click.IntRange):
            assert (rule["minimum"], rule["maximum"]) == (kind.min, kind.max), name
