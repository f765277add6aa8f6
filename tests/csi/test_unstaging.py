"""Unstaging while somebody still uses the volume: it is refused as long as that can be seen, nothing is changed by it,
who reads reads on, and the same call works once nobody does.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from cachefs.fuse import is_mounted

CONTENT = b"of the bucket"


@pytest.fixture
def staged(pods: Any) -> Any:
    pods.context = {"url": pods.rig.s3_url}
    pods.stage(secrets=pods.rig.secrets)
    return pods


def refused(pods: Any) -> str:
    """What is said; and what there was is there."""
    before = pods.mounted()
    fields = {"volume_id": pods.volume_id, "staging_target_path": pods.staging}
    code, message = pods.rig.node.refused("NodeUnstageVolume", **fields)
    # Kubernetes tries again at any code; this one says that something else has to be done first.
    assert code == "FAILED_PRECONDITION"
    assert pods.mounted() == before
    stats = pods.rig.node.call("NodeGetVolumeStats", volume_id=pods.volume_id, volume_path=pods.staging)
    assert not stats.volume_condition.abnormal
    # Not only what was open: it is served as before.
    assert Path(pods.staging, "sub/file").read_bytes() == b"of the directory"
    return message


def test_a_file_that_is_open_below_the_staging_path(staged: Any) -> None:
    with open(Path(staged.staging, "file"), "rb") as file:
        message = refused(staged)
        assert "files on it are open" in message and staged.staging in message
        assert file.read() == CONTENT
        # A pod that comes just now is not kept from it.
        assert staged.shown(staged.publish("pod")) == CONTENT
        staged.unpublish("pod")
        refused(staged)
    staged.unstage()
    assert staged.mounted() == []


def test_a_process_that_stands_below_the_staging_path(staged: Any) -> None:
    with subprocess.Popen(["cat"], cwd=Path(staged.staging, "sub"), stdin=subprocess.PIPE) as process:
        try:
            assert "a shell stands in it" in refused(staged)
        finally:
            process.communicate()
    staged.unstage()
    assert staged.mounted() == []


def test_a_publish_that_is_left(staged: Any) -> None:
    target = staged.publish("pod")
    with open(Path(target, "file"), "rb") as file:
        assert target in refused(staged)
        assert file.read(2) == CONTENT[:2]
        staged.publish("another")
        staged.unpublish("another")
        assert file.read() == CONTENT[2:]
    staged.unpublish("pod")
    staged.unstage()
    assert staged.mounted() == []


def test_a_reader_that_outlives_its_pod_reads_on_what_is_cached_and_holds_nothing_up(staged: Any) -> None:
    """An unpublished target that is in use is out of the tree, where nobody sees it any more."""
    target = staged.publish("pod")
    assert staged.shown(target) == CONTENT
    with open(Path(target, "file"), "rb") as file:
        staged.unpublish("pod")
        assert not os.path.lexists(target)
        assert file.read(2) == CONTENT[:2]
        staged.unstage()
        assert staged.mounted() == []
        assert file.read() == CONTENT[2:]
    # It can be had again at once.
    staged.stage(secrets=staged.rig.secrets)
    assert staged.shown(staged.publish("pod")) == CONTENT
    staged.unpublish("pod")


def test_a_plugin_that_is_killed_while_it_is_refused(staged: Any) -> None:
    fields = {"volume_id": staged.volume_id, "staging_target_path": staged.staging}
    with open(Path(staged.staging, "file"), "rb") as file:
        service = staged.rig.service.pid
        os.kill(service, signal.SIGSTOP)  # so that it is not refused before
        try:
            call = staged.rig.node.future("NodeUnstageVolume", **fields)
            with pytest.raises(grpc.FutureTimeoutError):
                call.result(timeout=0.5)
            staged.rig.node.end(signal.SIGKILL)
            with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
                call.result()
            staged.rig.node.start()
        finally:
            os.kill(service, signal.SIGCONT)
        refused(staged)
        assert file.read() == CONTENT
    staged.unstage()
    assert not is_mounted(staged.staging)
