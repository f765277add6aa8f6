"""A cluster with tokens: in this process, with TLS, and by real processes and commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner, Result

from cachefs.cli import main
from cachefs.model import AuthenticationError, HandshakeError
from cachefs.net import Role, Security, TlsFiles, Tokens, load_tokens, make_security, new_tokens, open_background
from cachefs.testing.cluster import running_cluster
from cachefs.testing.processes import running
from cachefs.worker import run_worker


def cachefs(*arguments: object, environment: Mapping[str, str] | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner(env=dict(environment or {})).invoke(main, [str(each) for each in arguments])


@pytest.mark.expect_warnings("the master says whom it refuses")
async def test_a_file_is_read_through_a_cluster_with_tokens_and_tls(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = os.urandom(300_000)
    (tmp_path / "data/file").write_bytes(content)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    new_tokens(str(tmp_path / "tokens"), list(Role))
    tokens = load_tokens(str(tmp_path / "tokens"))
    security = make_security(tokens, tls=TlsFiles(str(tmp_path / "cert.pem"), None, str(tmp_path / "ca.pem")))
    async with running_cluster(tmp_path, (tmp_path / "data").as_uri(), security=security) as cluster:
        async with cluster.client() as client:
            attr = await client.metadata.resolve("/file")
            assert await client.promote(attr.ino)
            fd = client.open_sealed(attr)
            assert fd is not None
            assert os.pread(fd, len(content) + 1, 0) == content
            os.close(fd)
            with pytest.raises(AuthenticationError, match="Pin needs the token of admin, not of client"):
                await client.pin(["/file"])
        async with cluster.client(security=security.presenting(Role.ADMIN)) as admin:
            assert (await admin.pin(["/file"])).files == 1
        stranger = Security(Tokens({Role.CLIENT: "x" * 32, Role.WORKER: "y" * 32}), client_tls=security.client_tls)
        with pytest.raises(HandshakeError):
            async with cluster.client(security=stranger.presenting(Role.CLIENT)):
                pass
        await cluster.stop("worker")
        refused = replace(cluster.worker_config, security=stranger.presenting(Role.WORKER))
        # A worker that is refused at its start ends, and says why.
        with pytest.RaisesGroup(HandshakeError, allow_unwrapped=True, flatten_subgroups=True):
            async with open_background() as nursery:
                await nursery.start(run_worker, refused)


def test_real_processes_with_tokens(tmp_path: Path) -> None:
    """And no token is anywhere to be seen: not in logs, arguments, environments, titles, answers or errors."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(b"content")
    whole, client, wrong = tmp_path / "whole", tmp_path / "client", tmp_path / "wrong"
    shown = [
        cachefs("token", "new", whole),
        cachefs("token", "copy", whole, client, "--roles", "client"),
        cachefs("token", "new", wrong, "--roles", "client,worker,admin"),
    ]
    assert [each.exit_code for each in shown] == [0, 0, 0]
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        running(
            *("master", "--data-dir", tmp_path / "master", "--listen", "127.0.0.1:0", "--log-level", "DEBUG"),
            *("--mount", f"/={(tmp_path / 'data').as_uri()}", "--tokens", whole),
            stderr=errors,
        ) as master,
        running(
            *("worker", "--name", "w", "--master", master.facts["listen"], "--listen", "127.0.0.1:0"),
            *("--socket", tmp_path / "socket", "--tier", f"ssd:{tmp_path / 'tier'}:64M", "--log-level", "DEBUG"),
            environment={"CACHEFS_TOKENS": str(whole)},
            stderr=errors,
        ) as worker,
    ):
        where = ["--master", master.facts["listen"]]
        listed = cachefs("ls", *where, "--tokens", client)
        assert (listed.exit_code, listed.output) == (0, "file\n"), listed.output
        report = cachefs("report", *where, "--json", environment={"CACHEFS_TOKENS": str(client)})
        (told,) = json.loads(report.stdout)["workers"]
        assert told["connected"] and told["status"]["name"] == "w"
        changed = cachefs("refresh", *where, "--tokens", whole)
        assert changed.exit_code == 0, changed.output
        refusals = {
            "the other side demands a token, see --tokens": cachefs("ls", *where),
            "does not accept our token": cachefs("ls", *where, "--tokens", wrong),
            "Refresh needs the token of admin, not of client": cachefs("refresh", *where, "--tokens", client),
            "--insecure: 'given with --tokens'": cachefs("ls", *where, "--tokens", client, "--insecure"),
        }
        for expected, result in refusals.items():
            assert result.exit_code == 1 and expected in result.output, result.output
        insecure = cachefs("ls", *where, "--insecure", environment={"CACHEFS_TOKENS": str(client)})
        assert "demands a token" in insecure.output
        stranger = subprocess.run(
            [
                *(sys.executable, "-m", "cachefs", "worker", "--name", "w2", "--master", master.facts["listen"]),
                *("--listen", "127.0.0.1:0", "--socket", tmp_path / "socket2", "--tokens", wrong),
                *("--tier", f"ssd:{tmp_path / 'tier2'}:64M", "--log-level", "ERROR"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert stranger.returncode == 1
        assert stranger.stderr == f"Error: {master.facts['listen']}: the other side does not accept our token\n"
        processes = [Path(f"/proc/{each.process.pid}/{what}") for each in (master, worker) for what in SEEN_BY_OTHERS]
        seen = b"".join(path.read_bytes() for path in processes)
    settings = cachefs("config", "show", "master", environment={"CACHEFS_TOKENS": str(whole)})
    assert str(whole)[:20] in settings.output
    results = [*shown, listed, report, changed, *refusals.values(), insecure, settings]
    everything = log.read_bytes() + seen + b"".join(result.output.encode() for result in results)
    assert b"connection refused from=127.0.0.1 role=client error=wrong token of client" in everything
    secrets = [each for path in (whole, wrong) for each in re.findall(rb'"(.*)"', path.read_bytes())]
    assert len(secrets) == 6 and all(len(secret) >= 32 for secret in secrets)
    assert not [secret for secret in secrets if secret in everything]


SEEN_BY_OTHERS = ("cmdline", "environ", "comm")


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Token files by what is in them."""
    made = {"all": list(Role), "client": [Role.CLIENT], "admin": [Role.ADMIN]}
    for name, roles in made.items():
        new_tokens(str(tmp_path / name), roles)
    return {name: tmp_path / name for name in made}


MASTER = ["master", "--data-dir", "/nowhere", "--listen", "127.0.0.1:0"]
FAR_MASTER = ["master", "--data-dir", "/nowhere", "--listen", "10.0.0.1:7000"]
WORKER = ["worker", "--master", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--socket", "/s", "--tier", "mem:/t:1M"]
MOUNT = ["mount", "/nowhere", "--master", "127.0.0.1:1"]
LS = ["ls", "--master", "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (MASTER, "--tokens: 'not given'"),
        (WORKER, "--tokens: 'not given'"),
        (MOUNT, "--tokens: 'not given'"),
        ([*MASTER, "--insecure", "--tokens", "{all}"], "--insecure: 'given with --tokens'"),
        ([*MASTER, "--insecure", "--tls-cert", "x"], "--insecure: 'given with --tls-cert'"),
        ([*FAR_MASTER, "--insecure"], "--listen: '10.0.0.1:7000' is not accepted; expected a loopback address"),
        ([*MASTER, "--tokens", "{client}"], "a file with the token of worker"),
        ([*WORKER, "--tokens", "{client}"], "a file with the token of worker"),
        ([*MOUNT, "--tokens", "{admin}"], "a file with the token of client"),
        ([*MASTER, "--tokens", "{all}", "--tls-key", "{all}"], "--tls-cert: 'not given'"),
        ([*MASTER, "--tokens", "{all}", "--tls-ca", "{ca}"], "--tls-cert: 'not given'"),
        ([*WORKER, "--tokens", "{all}", "--tls-cert", "{cert}"], "--tls-ca: 'not given'"),
        ([*MOUNT, "--tokens", "{all}", "--tls-cert", "{cert}"], "--tls-ca: 'not given'"),
        ([*LS, "--tls-ca", "{ca}"], "--tokens: 'not given'"),
        (["ls", "--master", "10.0.0.1:7000"], "--master: '10.0.0.1:7000' is not accepted; expected a loopback"),
        (["ls", "--master", "10.0.0.1:7000", "--insecure"], "--master: '10.0.0.1:7000' is not accepted"),
        ([*LS, "--tokens", "{all}x"], "that can be read"),
        (["token", "new", "{all}"], "no file is written over"),
        (["token", "new", "{all}x", "--roles", "client,root"], "some of client, worker, admin"),
        (["token", "copy", "{client}", "{all}x", "--roles", "admin"], "roles that"),
    ],
)
def test_flags_that_will_not_do(files: dict[str, Path], tmp_path: Path, arguments: list[str], expected: str) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    authority.issue_cert("a").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert"))
    known = {**files, "ca": tmp_path / "ca", "cert": tmp_path / "cert"}
    result = cachefs(*(each.format(**known) if "{" in each else each for each in arguments))
    assert result.exit_code in (1, 2), result.output
    assert expected in " ".join(result.output.split()), result.output
