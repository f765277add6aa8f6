"""The identity service, of both processes."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from cachefs_csi import csi_pb2 as pb

import cachefs


@pytest.mark.parametrize("which", ["controller", "node"])
def test_who_it_is_and_what_it_can(rig: Any, which: str) -> None:
    caller = getattr(rig, which)
    info = caller.call("GetPluginInfo")
    assert (info.name, info.vendor_version) == ("csi.cachefs.io", cachefs.__version__)
    found = caller.call("GetPluginCapabilities").capabilities
    assert {each.service.type for each in found if each.HasField("service")} == {
        pb.PluginCapability.Service.Type.CONTROLLER_SERVICE
    }
    assert {each.volume_expansion.type for each in found if each.HasField("volume_expansion")} == {
        pb.PluginCapability.VolumeExpansion.Type.ONLINE
    }
    assert caller.call("Probe").ready.value


def test_the_node_is_not_ready_without_its_mount_service(rig: Any) -> None:
    rig.service.send_signal(signal.SIGSTOP)
    try:
        assert not rig.node.call("Probe").ready.value
    finally:
        rig.service.send_signal(signal.SIGCONT)
    rig.until(lambda: rig.node.call("Probe").ready.value)


def test_calls_that_are_not_there_are_unimplemented(rig: Any) -> None:
    ask = rig.controller.channel.unary_unary("/csi.v1.Controller/CreateSnapshot")
    with pytest.raises(Exception, match="UNIMPLEMENTED"):
        ask(b"", timeout=10)
    assert rig.node.refused("ControllerGetCapabilities")[0] == "UNIMPLEMENTED"
    assert rig.controller.refused("NodeGetInfo")[0] == "UNIMPLEMENTED"
