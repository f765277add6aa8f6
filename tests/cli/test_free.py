"""`cachefs free` of a worker that stops in the middle of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from cachefs.cli.main import main
from cachefs.client import Client
from cachefs.model import BlockId
from cachefs.testing.processes import running
from cachefs.wire.messages import FreeReply

FILES = 3


def test_a_worker_that_does_not_answer_is_named_and_what_it_has_confirmed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(FILES):
        (data / str(number)).write_bytes(bytes(1000))
    options = {"CACHEFS_UFS_OPTIONS": json.dumps({"settle": "0"})}
    listen = ("--listen", "127.0.0.1:0", "--insecure")
    of_master = ("--data-dir", tmp_path / "master", "--mount", f"/={data.as_uri()}", *listen)
    free = Client.free
    asked: list[BlockId] = []
    monkeypatch.setattr("cachefs.cli.free._BATCH", 1)
    with running("master", *of_master, environment=options) as master:
        ask = ("--master", master.facts["listen"], "--insecure")
        place = ("--socket", tmp_path / "w.sock", "--tier", f"ssd:{tmp_path}/tier:64M", "--name", "w1")
        with running("worker", *ask, "--listen", "127.0.0.1:0", *place) as worker:

            async def free_and_stop(client: Client, blocks: list[BlockId]) -> FreeReply:
                asked.extend(blocks)
                if len(asked) == 2:
                    monkeypatch.setattr("cachefs.client.client._FREED_WITHIN_S", 0.5)
                    worker.process.send_signal(signal.SIGSTOP)
                return await free(client, blocks)

            monkeypatch.setattr(Client, "free", free_and_stop)
            assert CliRunner().invoke(main, ["load", "/", *ask]).exit_code == 0
            try:
                done = CliRunner().invoke(main, ["free", "/", *ask, "--json"])
            finally:
                worker.process.send_signal(signal.SIGCONT)
    assert done.exit_code == 1 and len(asked) == 2
    facts = json.loads(done.stdout)
    assert (facts["blocks"], facts["unconfirmed"], facts["failed"]) == (1, ["w1"], [])
    assert "worker w1 of this host does not answer within 0.5 s" in done.stderr
