"""Processes with the wrong token, none, or without TLS, and a recorded handshake: each ends soon, and harms nobody."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import trio
import trustme

from cachefs.model import AuthenticationError, HandshakeError, TransportError
from cachefs.net import (
    Hello,
    Role,
    Security,
    TcpAddress,
    TlsFiles,
    load_tokens,
    make_security,
    new_tokens,
    open_background,
    open_peer,
)
from cachefs.testing.real_cluster import PAGE, RealCluster, promoted, real_cluster
from cachefs.wire import Connection, Kind
from cachefs.wire.cluster import AskBlocks, ReadBlock
from cachefs.wire.messages import GetMasterStatus

CONTENT = random.Random(1).randbytes(3 * PAGE + 1)
SOON_S = 120.0
"""Within which all of them have to be told, on however slow a machine."""


async def outcome(*arguments: str | Path) -> tuple[int | None, str]:
    """Exit status of a command as a process of its own, and what it said."""
    with trio.fail_after(SOON_S):
        done = await trio.run_process(
            [sys.executable, "-m", "cachefs", *map(str, arguments)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return done.returncode, done.stderr.decode()


async def handshake_of(address: TcpAddress, security: Security) -> bytes:
    """Everything that an asker who is let in has sent until it had its first answer."""
    sent = bytearray()

    async def relay(stream: trio.SocketStream) -> None:
        there = await trio.open_tcp_stream(address.host, address.port)

        async def forward() -> None:
            async for data in stream:
                sent.extend(data)
                await there.send_all(data)

        async with stream, there, trio.open_nursery() as nursery:
            nursery.start_soon(forward)
            async for data in there:
                await stream.send_all(data)

    async with open_background() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay, [listener])
        through = TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
        async with open_peer(through, Hello("client"), security=security) as peer:
            await peer.call(GetMasterStatus())
    return bytes(sent)


async def answers_to(address: TcpAddress, sent: bytes, security: Security) -> list[Kind]:
    """What comes back until the other side hangs up."""
    reader = Connection(asking=True, handshake=security.asking())
    reader.hello(Hello("client"))
    kinds: list[Kind] = []
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(sent)
        try:
            async for received in stream:
                data = bytes(received)
                while data:
                    with reader.get_buffer() as buffer:
                        count = min(len(buffer), len(data))
                        buffer[:count] = data[:count]
                    data = data[count:]
                    kinds += [frame.kind for frame in reader.buffer_updated(count)]
        except AuthenticationError:
            kinds.append(Kind.ERROR)
    return kinds


def address_of(cluster: RealCluster, name: str) -> TcpAddress:
    host, _, port = cluster.processes[name].facts["listen"].rpartition(":")
    return TcpAddress(host, int(port))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(CONTENT)
    for name in ("tokens", "wrong"):
        new_tokens(str(tmp_path / name), list(Role))
    return tmp_path / "data"


def as_worker(cluster: RealCluster, name: str) -> list[str | Path]:
    directory = cluster.directory
    return [
        *("worker", "--name", name, "--master", f"127.0.0.1:{cluster.port}", "--listen", "127.0.0.1:0"),
        *("--socket", directory / f"{name}.socket", "--tier", f"ssd:{directory / name}.tier:16M"),
        *("--log-level", "ERROR"),
    ]


async def test_strangers_are_sent_away_and_the_cluster_goes_on(data: Path, tmp_path: Path) -> None:
    tokens = load_tokens(str(tmp_path / "tokens"))
    async with (
        real_cluster(
            tmp_path,
            data.as_uri(),
            workers=["a"],
            ufs_options={"settle": "0"},
            flags=("--tokens", tmp_path / "tokens"),
            security=Security(tokens),
        ) as cluster,
        cluster.client("a") as client,
    ):
        attr = await client.metadata.resolve("/file")
        master, worker = TcpAddress("127.0.0.1", cluster.port), address_of(cluster, "a")
        wrong = Security(load_tokens(str(tmp_path / "wrong")))
        read = ReadBlock(attr.key, 0, 0, PAGE, "home", attr.ino)
        said: dict[str, tuple[int | None, str]] = {}

        async def start(name: str, *arguments: str | Path) -> None:
            said[name] = await outcome(*as_worker(cluster, name), *arguments)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, "wrong-token", "--tokens", tmp_path / "wrong")
            nursery.start_soon(start, "no-token", "--insecure")
            for role in (Role.CLIENT, Role.WORKER):
                for address in (master, worker):
                    with pytest.raises(HandshakeError, match="does not accept our token"):
                        async with open_peer(address, Hello("worker"), security=wrong.presenting(role)):
                            pass
            for address in (master, worker):
                with pytest.raises(TransportError):
                    async with open_peer(address, Hello("worker")) as peer:
                        await peer.call(read)
            mine = Security(tokens, Role.CLIENT)
            recorded = await handshake_of(master, mine)
            for address in (master, worker):
                with trio.fail_after(SOON_S):
                    assert await answers_to(address, recorded, mine) == [Kind.HELLO, Kind.ERROR]
            # One that may ask, for what its role may not.
            for address, request in ((worker, read), (master, AskBlocks([(attr.key, 0)], True))):
                async with open_peer(address, Hello("worker"), security=Security(tokens, Role.CLIENT)) as peer:
                    with pytest.raises(AuthenticationError, match="needs the token of"):
                        await peer.call(request)
        for name, (status, text) in said.items():
            assert status == 1, (name, status, text)
            assert not (tmp_path / f"{name}.socket").exists()
        assert "does not accept our token" in said["wrong-token"][1]
        assert "demands a token" in said["no-token"][1]
        assert [each.name for each in (await client.master_status()).workers] == ["a"]
        with trio.fail_after(SOON_S):
            assert await promoted(client, "/file") == CONTENT


async def test_plain_and_tls_do_not_meet(data: Path, tmp_path: Path) -> None:
    """Neither whoever speaks plainly to a port with TLS, nor whoever wants TLS where there is none."""
    authority, others = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca"))
    others.cert_pem.write_to_path(str(tmp_path / "other-ca"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert"))
    others.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "other-cert"))
    tokens = tmp_path / "tokens"
    tls = make_security(load_tokens(str(tokens)), tls=TlsFiles(str(tmp_path / "cert"), None, str(tmp_path / "ca")))
    with_tls = ("--tls-cert", tmp_path / "cert", "--tls-ca", tmp_path / "ca")
    of_others = ("--tls-cert", tmp_path / "other-cert", "--tls-ca", tmp_path / "other-ca")
    plain_directory = tmp_path / "plain"
    plain_directory.mkdir()
    async with (
        real_cluster(
            tmp_path,
            data.as_uri(),
            workers=["a"],
            ufs_options={"settle": "0"},
            flags=("--tokens", tokens, *with_tls),
            security=tls,
        ) as cluster,
        real_cluster(plain_directory, data.as_uri(), flags=("--tokens", tokens)) as plain,
        cluster.client("a") as client,
    ):
        asked = {
            "plain to tls": (cluster.port, ("--tokens", tokens)),
            "tls to plain": (plain.port, ("--tokens", tokens, "--tls-ca", tmp_path / "ca")),
            "another authority": (cluster.port, ("--tokens", tokens, *of_others)),
        }
        said: dict[str, tuple[int | None, str]] = {}

        async def ask(what: str, port: int, *flags: str | Path) -> None:
            said[what] = await outcome("ls", "--master", f"127.0.0.1:{port}", *flags)

        async with trio.open_nursery() as nursery:
            for what, (port, flags) in asked.items():
                nursery.start_soon(ask, what, port, *flags)
            for address in (TcpAddress("127.0.0.1", cluster.port), address_of(cluster, "a")):
                plainly = Security(tls.tokens, Role.WORKER)
                with pytest.raises(TransportError, match="it speaks TLS, see --tls-ca"), trio.fail_after(SOON_S):
                    async with open_peer(address, Hello("worker"), security=plainly):
                        pass
        assert [status for status, _ in said.values()] == [1, 1, 1]
        assert "it speaks TLS, see --tls-ca" in said["plain to tls"][1]
        with trio.fail_after(SOON_S):
            assert await promoted(client, "/file") == CONTENT
