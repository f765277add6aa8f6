"""Every container's command line is one that our own commands take."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from cachefs_csi.main import main as csi_main

from cachefs.cli.main import main as cachefs_main
from cachefs.model import CachefsError
from cachefs.net import TcpAddress
from tests.charts.rendered import (
    CELLS,
    FIELDS,
    OTHERS,
    Container,
    container,
    containers,
    environment,
    expanded,
    pod_of,
)

PROGRAMS = {"cachefs": cachefs_main, "cachefs-csi": csi_main}


def run_by_shell(words: list[str], each: Container, directory: Path) -> list[str]:
    """What the program in a container's shell script is called with."""
    program = directory / "cachefs"
    program.write_text("#!/bin/sh\nprintf '%s\\0' cachefs \"$@\"\n")
    program.chmod(0o755)
    path = f"{directory}:{os.environ['PATH']}"
    done = subprocess.run(words, env={**environment(each), "PATH": path}, capture_output=True, check=True)
    assert not done.stderr
    return done.stdout.decode().split("\0")[:-1]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and its parameters. Raises what click and we do for wrong ones."""
    command: click.Command = PROGRAMS[words[0]]
    name, rest = words[0], words[1:]
    ctx: click.Context | None = None
    while isinstance(command, click.Group):
        ctx = command.make_context(name, list(rest[:1]) and rest, parent=ctx)
        found, inner, rest = command.resolve_command(ctx, rest)
        assert inner is not None and found is not None
        name, command = found, inner
    made = command.make_context(name, list(rest), parent=ctx)
    return name, made.params


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CACHEFS_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("cell", CELLS)
def test_our_commands_take_every_command_line(cell: str, tmp_path: Path) -> None:
    ran = set()
    for each in containers(cell):
        if each.spec["name"] in OTHERS:
            continue
        words = expanded(each)
        if words[0] == "/bin/sh":
            words = run_by_shell(words, each, tmp_path)
        name, _ = parsed(words)
        ran.add(name)
    wanted = {"master", "worker", "node-keeper", "node-mounts"}
    wanted |= {"load"} if cell in ("warm-up", "everything") else set()
    wanted |= set() if cell == "no csi" else {"node", "controller"}
    assert ran == wanted


def test_what_is_no_flag_is_found() -> None:
    words = [*expanded(container("defaults", "worker", "worker")), "--teir=ssd:/x:1G"]
    with pytest.raises((click.UsageError, CachefsError), match="teir"):
        parsed(words)


def test_a_worker_is_told_what_the_values_say() -> None:
    _, told = parsed(expanded(container("memory only", "worker", "worker")))
    (tier,) = told["tiers"]
    assert (tier.kind, tier.path, tier.capacity_bytes) == ("mem", "/dev/shm/cachefs", 32 * 2**30)
    assert told["advertise"] == TcpAddress("10.1.2.3", 7001)
    assert told["name"] == "node-7.example"
    assert told["labels"] == (("host", "node-7.example"),)
    assert told["master_address"] == TcpAddress("fast-cachefs-master.storage.svc.cluster.local", 7000)


def test_addresses_may_be_of_version_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "status.podIP", "fd00::12")
    _, told = parsed(expanded(container("ipv6", "worker", "worker")))
    assert told["advertise"] == TcpAddress("fd00::12", 7001)
    assert told["listen"] == TcpAddress("::", 7001)


@pytest.mark.parametrize(
    ("cell", "domain"),
    [
        ("tls of cert-manager", "fast-cachefs-worker.storage.svc.cluster.local"),
        ("tls given", "fast-cachefs-worker.storage.svc.corp.example"),
    ],
)
def test_with_tls_a_worker_advertises_a_name_that_a_wildcard_covers(cell: str, domain: str, tmp_path: Path) -> None:
    each = container(cell, "worker", "worker")
    _, told = parsed(run_by_shell(expanded(each), each, tmp_path))
    assert told["advertise"] == TcpAddress(f"10-1-2-3.{domain}", 7001)
    assert told["name"] == "node-7.example"


def test_places_come_from_values_and_labels_of_pods(tmp_path: Path) -> None:
    each = container("everything", "worker", "worker")
    _, told = parsed(run_by_shell(expanded(each), each, tmp_path))
    assert set(told["labels"]) == {("host", "node-7.example"), ("rack", "r7"), ("zone", "eu-1a")}


def test_a_master_is_told_its_under_stores() -> None:
    _, told = parsed(expanded(container("everything", "master", "master")))
    assert told["mounts"] == (("/data", "s3://bucket/prefix"), ("/other", "file:///srv/x"))
    assert told["ufs_options"] == (("endpoint_url", "http://minio:9000"),)
    assert told["sync_interval"] == -1
    assert (told["page_size"], told["block_size"]) == (4 * 2**20, 2**30)


def test_mounts_of_the_host_are_those_of_the_values() -> None:
    _, told = parsed(expanded(container("no csi", "mounts", "mounts")))
    assert told["static"] == (("/data", "/var/lib/cachefs/host/data"), ("/", "/var/lib/cachefs/host/all"))
    # Without any the service sees the directory as well, and unmounts those that there were.
    for cell in ("no csi", "defaults"):
        mounts = container(cell, "mounts", "mounts").spec["volumeMounts"]
        (found,) = [each for each in mounts if each["mountPath"] == "/var/lib/cachefs/host"]
        assert found["mountPropagation"] == "Bidirectional"


@pytest.mark.parametrize(
    ("cell", "driver"), [("another kubelet", "csi.cachefs.io"), ("everything", "two.csi.cachefs.io")]
)
def test_mounts_of_single_pods_are_where_the_mount_service_mounts_too(cell: str, driver: str) -> None:
    kubelet = "/data/kubelet" if cell == "another kubelet" else "/var/lib/kubelet"
    _, told = parsed(expanded(container(cell, "csi-node", "csi")))
    assert told["inline_dir"] == f"{kubelet}/plugins/{driver}/inline"
    for component, name in (("csi-node", "csi"), ("mounts", "mounts")):
        mounts = container(cell, component, name).spec["volumeMounts"]
        (found,) = [each for each in mounts if each["mountPath"] == kubelet]
        assert found["mountPropagation"] == "Bidirectional"


def test_loads_are_jobs_of_the_master() -> None:
    once, nightly = [parsed(expanded(each))[1] for each in containers("warm-up") if each.spec["name"] == "load"]
    if once["replicas"]:
        once, nightly = nightly, once
    assert once["spread"] and once["paths"] == ("/data/train", "/-odd name")
    assert nightly["replicas"] == 2 and nightly["limit"] == 500 * 2**20 and nightly["paths"] == ("/data",)


def test_the_tmpfs_is_made_as_large_as_the_tier() -> None:
    (init,) = pod_of("tmpfs of its own", "worker")["spec"]["initContainers"]
    assert init["args"][1:] == ["tmpfs", "/dev/shm/cachefs", f"{2**20}m"]


@pytest.mark.parametrize("cell", CELLS)
def test_no_secret_is_on_a_command_line(cell: str) -> None:
    for each in containers(cell):
        words = " ".join([*each.spec.get("command", []), *each.spec.get("args", [])])
        assert not re.search(r"password|AWS_|CACHEFS_UFS_OPTIONS|[A-Za-z0-9]{40}", words), each.spec["name"]
        # Values of variables are only fields of the pod: what is secret comes from Secrets.
        assert all("value" not in variable for variable in each.spec.get("env", []))
