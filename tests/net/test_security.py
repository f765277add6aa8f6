"""Tokens and TLS over real sockets: who gets in, what it may ask, and what becomes of everybody else."""

from __future__ import annotations

import datetime
import gc
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from cachefs.model import AuthenticationError, ConfigError, HandshakeError, MiB, TransportError
from cachefs.net import (
    EVERYONE,
    Address,
    Answer,
    FileSlice,
    Hello,
    Peer,
    Role,
    Security,
    Service,
    Session,
    TcpAddress,
    TlsFiles,
    Tokens,
    UnixAddress,
    copy_tokens,
    load_tokens,
    make_security,
    new_tokens,
    open_background,
    open_peer,
    open_pool,
    serve,
    service,
)
from cachefs.wire import Connection, Handshake, Kind, Request, StreamRequest

TOKENS = {Role.CLIENT: "c" * 32, Role.WORKER: "w" * 32, Role.ADMIN: "a" * 32}
SECURITY = Security(Tokens(TOKENS))
LOOPBACK = TcpAddress("127.0.0.1", 0)
refused = pytest.mark.expect_warnings("the server says whom it refuses")


class WhoAmI(Request[str], frozen=True):
    pass


class Unlisted(Request[str], frozen=True):
    pass


class Secret(Request[str], frozen=True):
    pass


class Slice(Request[str], frozen=True):
    offset: int
    length: int


class Bytes(Request[str], frozen=True):
    count: int


class Numbers(StreamRequest[int], frozen=True):
    pass


def make_service(file: Path) -> Service:
    async def who(request: WhoAmI, session: Session) -> str:
        return str(session.role)

    async def secret(request: Any, session: Session) -> str:
        return "told"

    async def part(request: Slice, session: Session) -> Answer[str]:
        fd = os.open(file, os.O_RDONLY)
        return Answer("", FileSlice(fd, request.offset, request.length), on_sent=lambda: os.close(fd))

    async def made(request: Bytes, session: Session) -> Answer[str]:
        return Answer("", bytes(range(256)) * (request.count // 256))

    async def numbers(request: Numbers, session: Session) -> AsyncGenerator[int, None]:
        for number in range(20):
            yield number

    made_service = Service(
        {
            WhoAmI: EVERYONE,
            Slice: EVERYONE,
            Bytes: EVERYONE,
            Numbers: frozenset({Role.CLIENT}),
            Secret: frozenset({Role.WORKER}),
        }
    )
    made_service.on(WhoAmI, who)
    made_service.on_at_once(Secret, lambda request, session: "told")
    made_service.on(Unlisted, secret)
    made_service.on(Slice, part)
    made_service.on(Bytes, made)
    made_service.on_stream(Numbers, numbers)
    return made_service


@asynccontextmanager
async def serving(
    directory: Path, security: Security | None = SECURITY, address: Address = LOOPBACK
) -> AsyncIterator[Address]:
    """At the end it still answers those who mean well."""
    file = directory / "file"
    file.write_bytes(bytes(range(256)) * 16384)
    async with open_background() as nursery:

        async def run(task_status: trio.TaskStatus[list[Address]]) -> None:
            served = make_service(file)
            await serve(served, [address], hello=Hello("server"), security=security, task_status=task_status)

        (bound,) = await nursery.start(run)
        yield bound
        async with peer_of(bound, security, Role.WORKER) as peer:
            expected = "worker" if security and isinstance(address, TcpAddress) else "None"
            assert (await peer.call(WhoAmI())).message == expected


@asynccontextmanager
async def peer_of(address: Address, security: Security | None, role: Role = Role.CLIENT) -> AsyncIterator[Peer]:
    presenting = security and security.presenting(role)
    with trio.fail_after(60):
        async with open_peer(address, Hello("client"), security=presenting) as peer:
            yield peer


async def fails(address: Address, security: Security | None, match: str, error: type[Exception]) -> str:
    """Soon, and whoever asks is told so in these words."""
    with pytest.raises(error, match=match) as raised:
        async with peer_of(address, security):
            pass
    return str(raised.value)


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", list(Role))
async def test_a_session_knows_what_was_proved(tmp_path: Path, role: Role) -> None:
    async with serving(tmp_path) as address, peer_of(address, SECURITY, role) as peer:
        assert (await peer.call(WhoAmI())).message == role


@refused
async def test_a_wrong_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = Security(Tokens({Role.CLIENT: "not the right one at all, not it".replace(" ", "-")}))
    async with serving(tmp_path) as address:
        text = await fails(address, wrong, "does not accept our token", HandshakeError)
    (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "from=127.0.0.1" in record.getMessage() and "wrong token of client" in record.getMessage()
    for token in (*TOKENS.values(), "not-the-right"):
        assert token not in text + caplog.text


@refused
async def test_no_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        await fails(address, None, "demands a token", HandshakeError)


@refused
async def test_a_role_without_a_token_there(tmp_path: Path) -> None:
    only_workers = Security(Tokens({Role.WORKER: TOKENS[Role.WORKER]}))
    async with serving(tmp_path, only_workers) as address:
        await fails(address, SECURITY, "does not accept our token", HandshakeError)


async def test_a_server_without_tokens_is_not_believed(tmp_path: Path) -> None:
    async with serving(tmp_path, None) as address:
        await fails(address, SECURITY, "has no tokens", HandshakeError)


@refused
async def test_a_server_that_does_not_know_the_token(tmp_path: Path) -> None:
    """It plays the asker's own proof back, and takes whatever it is told."""

    async def impostor(stream: trio.SocketStream) -> None:
        connection = Connection(asking=False, handshake=Handshake(Tokens({Role.CLIENT: "x" * 40}), asking=False))
        await stream.send_all(connection.hello(Hello("server")))
        received = b""
        while len(received) < 100 or received.count(b"cF") < 2:
            received += await stream.receive_some()
        await stream.send_all(received[received.rindex(b"cF\x01\x08") :])
        await stream.receive_some()

    async with open_background() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, impostor, [listener])
        address = TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
        await fails(address, SECURITY, "wrong token", HandshakeError)


async def exchanged(address: Address, sends: list[bytes]) -> list[Kind]:
    """What a server answers to these bytes, until it hangs up or has answered with as many frames."""
    assert isinstance(address, TcpAddress)
    reader = Connection(asking=True, handshake=Handshake(SECURITY.tokens, asking=True, presents=Role.CLIENT))
    reader.hello(Hello("client"))
    kinds: list[Kind] = []
    stream = await trio.open_tcp_stream(address.host, address.port)
    async with stream:
        for data in sends:
            await stream.send_all(data)
        with trio.fail_after(60):
            try:
                while data := await stream.receive_some():
                    while data:
                        with reader.get_buffer() as buffer:
                            count = min(len(buffer), len(data))
                            buffer[:count] = data[:count]
                        data = data[count:]
                        kinds += [frame.kind for frame in reader.buffer_updated(count)]
            except AuthenticationError:
                kinds.append(Kind.ERROR)
            except trio.BrokenResourceError:
                pass
    return kinds


@refused
async def test_a_replayed_handshake(tmp_path: Path) -> None:
    """Everything that a good asker has sent, recorded and sent again."""
    recorded: list[bytes] = []
    async with serving(tmp_path) as address:

        async def relay(stream: trio.SocketStream) -> None:
            assert isinstance(address, TcpAddress)
            there = await trio.open_tcp_stream(address.host, address.port)

            async def forward() -> None:
                async for data in stream:
                    recorded.append(data)
                    await there.send_all(data)

            async with stream, there, trio.open_nursery() as nursery:
                nursery.start_soon(forward)
                async for data in there:
                    await stream.send_all(data)

        async with open_background() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, relay, [listener])
            through = TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
            async with peer_of(through, SECURITY) as peer:
                assert (await peer.call(WhoAmI())).message == "client"
        assert len(recorded) >= 2
        assert await exchanged(address, [b"".join(recorded)]) == [Kind.HELLO, Kind.ERROR]


@refused
async def test_requests_before_the_proof(tmp_path: Path) -> None:
    plain = Connection(asking=True)
    plain.hello(Hello("client"))
    async with serving(tmp_path) as address:
        asker = Connection(asking=True, handshake=Handshake(SECURITY.tokens, asking=True, presents=Role.CLIENT))
        sent = asker.hello(Hello("client")) + plain.head(Kind.REQUEST, 1, Secret())
        # Closed with what was sent unread, so that the HELLO may be lost.
        assert await exchanged(address, [sent]) in ([], [Kind.HELLO])


async def test_silence_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says hello and proves nothing is not waited for longer than whoever says nothing."""
    async with serving(tmp_path) as address:
        asker = Connection(asking=True, handshake=Handshake(SECURITY.tokens, asking=True, presents=Role.CLIENT))
        with monkeypatch.context() as patch:
            # For this one alone: whoever means well may be slow.
            patch.setattr(service, "HELLO_TIMEOUT_S", 0.2)
            assert await exchanged(address, [asker.hello(Hello("client"))]) == [Kind.HELLO]


async def test_roles_may_ask_what_the_table_says(tmp_path: Path) -> None:
    async with serving(tmp_path) as address:
        for role in Role:
            async with peer_of(address, SECURITY, role) as peer:
                for request, roles in ((Secret(), "worker"), (Unlisted(), "admin worker")):
                    if role in roles.split():
                        assert (await peer.call(request)).message == "told"
                    else:
                        with pytest.raises(AuthenticationError, match=f"needs the token of .*, not of {role}"):
                            await peer.call(request)
                async with peer.stream(Numbers()) as numbers:
                    if role is Role.CLIENT:
                        assert [number async for number in numbers] == list(range(20))
                    else:
                        with pytest.raises(AuthenticationError, match="needs the token of client"):
                            await anext(numbers)
                # A refusal is the end of the request, not of the connection.
                assert (await peer.call(WhoAmI())).message == role


async def test_unix_sockets_ask_the_kernel(tmp_path: Path) -> None:
    """No token is needed, or looked at: with one or without, the same user may ask everything."""
    async with serving(tmp_path, SECURITY, UnixAddress(str(tmp_path / "socket"))) as address:
        for security in (None, SECURITY):
            async with peer_of(address, security) as peer:
                assert (await peer.call(Secret())).message == "told"


@refused
async def test_a_pool_that_is_refused_says_why_each_time(tmp_path: Path) -> None:
    wrong = Security(Tokens({Role.CLIENT: "x" * 32}), Role.CLIENT)
    async with serving(tmp_path) as address, open_pool(address, Hello("client"), security=wrong) as pool:
        for _ in range(3):
            with pytest.raises(HandshakeError, match="does not accept our token"):
                await pool.call(WhoAmI())


# ---- files with tokens ---------------------------------------------------------------------------------------------


def test_token_files(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    os.umask(previous := os.umask(0))
    assert previous is not None
    new_tokens(str(whole), list(Role))
    copy_tokens(str(whole), str(part), [Role.CLIENT])
    assert whole.stat().st_mode & 0o777 == part.stat().st_mode & 0o777 == 0o600
    assert load_tokens(str(whole)).roles == sorted(Role)
    assert load_tokens(str(part)).roles == [Role.CLIENT]
    (line,) = [each for each in part.read_text().splitlines() if each.startswith("client")]
    assert line in whole.read_text().splitlines()
    again = tmp_path / "again"
    new_tokens(str(again), list(Role))
    assert not set(again.read_text().splitlines()[1:]) & set(whole.read_text().splitlines()[1:])


def test_no_file_is_written_over(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    whole = tmp_path / "whole"
    new_tokens(str(whole), list(Role))
    for path in (there, link, tmp_path / "no/such/directory"):
        with pytest.raises(ConfigError):
            new_tokens(str(path), list(Role))
        with pytest.raises(ConfigError):
            copy_tokens(str(whole), str(path), [Role.CLIENT])
    assert there.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    copy_tokens(str(whole), str(tmp_path / "part"), [Role.CLIENT])
    with pytest.raises(ConfigError, match="client"):
        copy_tokens(str(tmp_path / "part"), str(tmp_path / "more"), [Role.ADMIN])
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601])
def test_a_file_that_others_can_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "tokens"
    new_tokens(str(path), list(Role))
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"its mode is 0{mode:o}, chmod 600"):
        load_tokens(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to give a file away")
def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    new_tokens(str(path), list(Role))
    os.chown(path, 4321, 0)
    with pytest.raises(ConfigError, match="of this user or of root, not of user 4321"):
        load_tokens(str(path))


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'client = "{SECRET}"', "32 to 4096"),
        (f'clint = "{SECRET * 3}"', "one of client, worker, admin"),
        (f'{SECRET * 3} = "client"', "one of client, worker, admin"),
        (f"client = {SECRET}", "a TOML file"),
        (f'client = "{SECRET * 3}"\nworker = "{SECRET * 3}"', "another one for each role"),
        (f'client = ["{SECRET * 3}"]', "a text"),
        (f'client = "{SECRET * 3} {SECRET}"', "visible ASCII"),
        ("", "at least one"),
        ("# " + SECRET * 10000, "at least one"),
    ],
)
def test_files_that_will_not_do_are_not_shown(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=expected) as raised:
        load_tokens(str(path))
    error: BaseException | None = raised.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("/dev/null")):
        with pytest.raises(ConfigError, match="--tokens"):
            load_tokens(str(path))


def test_security_shows_nothing() -> None:
    shown = repr(SECURITY.presenting(Role.ADMIN))
    assert "roles=" in shown
    assert not any(token in shown for token in TOKENS.values())


# ---- TLS -----------------------------------------------------------------------------------------------------------


class Certificates:
    """PEM files of two authorities that do not know each other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authorities = {name: trustme.CA() for name in ("ours", "theirs")}
        for name, authority in self._authorities.items():
            authority.cert_pem.write_to_path(str(directory / f"{name}.pem"))

    def ca(self, name: str = "ours") -> str:
        return str(self._directory / f"{name}.pem")

    def issue(self, *hosts: str, by: str = "ours", **options: Any) -> str:
        issued = self._authorities[by].issue_cert(*hosts, **options)
        path = self._directory / f"{len(os.listdir(self._directory))}.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        return str(path)

    def security(self, cert: str | None = None, ca: str | None = None, key: str | None = None) -> Security:
        return make_security(Tokens(TOKENS), tls=TlsFiles(cert, key, ca))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def mutual(certificates: Certificates) -> Security:
    """Of a process that serves and asks, on this machine."""
    return certificates.security(certificates.issue("127.0.0.1", "localhost"), certificates.ca())


@pytest.fixture(scope="module")
def shows_none(certificates: Certificates) -> Security:
    """Of a process that only asks."""
    return certificates.security(ca=certificates.ca())


async def test_everything_goes_through_tls(tmp_path: Path, mutual: Security) -> None:
    """Small and large answers, parts of files, streams, many at once, both ways at once."""
    content = bytes(range(256)) * 16384
    async with serving(tmp_path, mutual) as address, peer_of(address, mutual) as peer:
        assert (await peer.call(WhoAmI())).message == "client"
        for offset, length in ((0, len(content)), (1, 1), (3, 700_001), (5, 0)):
            assert (await peer.call(Slice(offset, length))).payload == content[offset : offset + length]
        for count in (0, 256, 16384, 16640, 5 * MiB):
            assert bytes((await peer.call(Bytes(count))).payload) == bytes(range(256)) * (count // 256)
        async with peer.stream(Numbers()) as numbers:
            assert [number async for number in numbers] == list(range(20))

        async def ask(number: int) -> None:
            part = (await peer.call(Slice(number * 1000, 300_000))).payload
            assert part == content[number * 1000 : number * 1000 + 300_000]

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(ask, number)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        with trio.move_on_after(0.01):
            await peer.call(Bytes(16 * MiB))
        assert (await peer.call(WhoAmI())).message == "client"
        assert len(os.listdir("/proc/self/fd")) == before


async def test_what_is_sent_cannot_be_read_on_the_way(tmp_path: Path, mutual: Security) -> None:
    seen = bytearray()
    async with serving(tmp_path, mutual) as address, open_background() as nursery:

        async def relay(stream: trio.SocketStream) -> None:
            assert isinstance(address, TcpAddress)
            there = await trio.open_tcp_stream(address.host, address.port)

            async def forward(source: trio.SocketStream, target: trio.SocketStream) -> None:
                async for data in source:
                    seen.extend(data)
                    await target.send_all(data)

            async with stream, there, trio.open_nursery() as both:
                both.start_soon(forward, stream, there)
                await forward(there, stream)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay, [listener])
        async with peer_of(TcpAddress("127.0.0.1", listener.socket.getsockname()[1]), mutual) as peer:
            assert len((await peer.call(Slice(0, 4096))).payload) == 4096
    assert len(seen) > 4096 and bytes(range(256)) not in seen and b"WhoAmI" not in seen and b"Slice" not in seen


async def test_a_server_may_show_a_certificate_and_demand_none(
    tmp_path: Path, certificates: Certificates, shows_none: Security
) -> None:
    cert = certificates.issue("localhost", "127.0.0.1")
    security = certificates.security(cert, None)
    async with open_background() as nursery:

        async def run(task_status: trio.TaskStatus[list[Address]]) -> None:
            served = make_service(tmp_path / "file")
            await serve(served, [LOOPBACK], hello=Hello("server"), security=security, task_status=task_status)

        (bound,) = await nursery.start(run)
        for host in ("127.0.0.1", "localhost"):
            async with peer_of(TcpAddress(host, bound.port), shows_none) as peer:
                assert (await peer.call(WhoAmI())).message == "client"


@refused
async def test_tokens_are_demanded_over_tls_too(tmp_path: Path, certificates: Certificates, mutual: Security) -> None:
    stranger = Security(
        Tokens({Role.CLIENT: "x" * 32}), client_tls=mutual.client_tls, certificate_sha256=mutual.certificate_sha256
    )
    async with serving(tmp_path, mutual) as address:
        await fails(address, stranger, "does not accept our token", HandshakeError)


@refused
async def test_a_plain_client_on_a_tls_port(tmp_path: Path, mutual: Security, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, mutual) as address:
        await fails(address, SECURITY, "it speaks TLS, see --tls-ca", TransportError)
        await fails(address, None, "it speaks TLS, see --tls-ca", TransportError)
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(lines) == 2 and all("from=127.0.0.1" in line and "does not speak TLS" in line for line in lines)


@refused
async def test_a_tls_client_on_a_plain_port(tmp_path: Path, mutual: Security) -> None:
    async with serving(tmp_path, SECURITY) as address:
        await fails(address, mutual, "does not speak TLS", TransportError)


@refused
async def test_garbage_on_a_tls_port(tmp_path: Path, mutual: Security) -> None:
    async with serving(tmp_path, mutual) as address:
        assert isinstance(address, TcpAddress)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\x00\x05hello" * 10, b"\x16\x03"):
            stream = await trio.open_tcp_stream(address.host, address.port)
            async with stream:
                await stream.send_all(garbage)
                await stream.send_eof()
                with trio.fail_after(60):
                    async for _ in stream:
                        pass


async def test_silence_on_a_tls_port(tmp_path: Path, mutual: Security, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, mutual) as address:
        assert isinstance(address, TcpAddress)
        with monkeypatch.context() as patch:
            patch.setattr(service, "HELLO_TIMEOUT_S", 0.2)
            stream = await trio.open_tcp_stream(address.host, address.port)
            async with stream:
                with trio.fail_after(60):
                    assert await stream.receive_some() == b""


@refused
async def test_certificates_that_are_refused(tmp_path: Path, certificates: Certificates, mutual: Security) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    expired = certificates.issue("127.0.0.1", not_before=past - datetime.timedelta(days=1), not_after=past)
    cases: Mapping[str, str] = {
        certificates.issue("127.0.0.1", by="theirs"): "unable to get local issuer certificate|self-signed|self signed",
        expired: "certificate has expired",
        certificates.issue("10.1.2.3", "elsewhere.example"): "IP address mismatch|not valid for '127.0.0.1'",
    }
    for cert, expected in cases.items():
        # A server does not care what host it is: it knows itself by it, to be asked at the end.
        security = certificates.security(cert)
        async with open_background() as nursery:

            async def run(
                served: Security = security, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
            ) -> None:
                made = make_service(tmp_path / "file")
                await serve(made, [LOOPBACK], hello=Hello("server"), security=served, task_status=task_status)

            (bound,) = await nursery.start(run)
            await fails(bound, mutual, expected, TransportError)


@refused
async def test_certificates_of_askers(tmp_path: Path, certificates: Certificates, mutual: Security) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    expired = certificates.issue("127.0.0.1", not_before=past - datetime.timedelta(days=1), not_after=past)
    async with serving(tmp_path, mutual) as address:
        for cert in (None, certificates.issue("127.0.0.1", by="theirs"), expired):
            asking = certificates.security(cert, certificates.ca())
            await fails(address, asking, "refuses this side's TLS, or its certificate", TransportError)


@refused
async def test_somebody_between_with_a_certificate_of_the_same_authority(
    tmp_path: Path, certificates: Certificates, mutual: Security
) -> None:
    """It passes on what is inside of TLS, the handshake of tokens too, which notices."""
    between = certificates.security(certificates.issue("127.0.0.1"), certificates.ca())
    async with serving(tmp_path, mutual) as address, open_background() as nursery:

        async def relay(stream: trio.SocketStream) -> None:
            assert between.server_tls is not None and between.client_tls is not None
            assert isinstance(address, TcpAddress)
            here = trio.SSLStream(stream, between.server_tls, server_side=True, https_compatible=True)
            tcp = await trio.open_tcp_stream(address.host, address.port)
            there = trio.SSLStream(tcp, between.client_tls, server_hostname=address.host, https_compatible=True)

            async def forward(source: Any, target: Any) -> None:
                try:
                    async for data in source:
                        await target.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

            async with here, there, trio.open_nursery() as both:
                both.start_soon(forward, here, there)
                await forward(there, here)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, relay, [listener])
        through = TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
        await fails(through, mutual, "does not accept our token", HandshakeError)


async def test_old_versions_of_tls_are_refused(mutual: Security) -> None:
    for context in (mutual.server_tls, mutual.client_tls):
        assert context is not None
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert mutual.client_tls is not None and mutual.client_tls.check_hostname


def test_pem_files_that_will_not_do(tmp_path: Path, certificates: Certificates) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    cert, other, ca = certificates.issue("a"), certificates.issue("b"), certificates.ca()
    missing = str(tmp_path / "missing")
    for files, key in (
        (TlsFiles(str(garbage), None, ca), "--tls-cert"),
        (TlsFiles(ca, None, ca), "--tls-cert"),
        (TlsFiles(cert, other, ca), "--tls-cert"),
        (TlsFiles(missing, None, ca), "--tls-cert"),
        (TlsFiles(cert, missing, ca), "--tls-cert"),
        (TlsFiles(None, cert, ca), "--tls-cert"),
        (TlsFiles(cert, None, missing), "--tls-ca"),
        (TlsFiles(cert, None, str(garbage)), "--tls-ca"),
    ):
        with pytest.raises(ConfigError) as raised:
            make_security(Tokens(TOKENS), tls=files)
        assert raised.value.key.startswith(key)


def test_a_passphrase_is_not_asked_for(tmp_path: Path, certificates: Certificates) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    cert = certificates.issue("a")
    key = load_pem_private_key(Path(cert).read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a passphrase of some length"))
    )
    with pytest.raises(ConfigError, match="without a passphrase"):
        make_security(Tokens(TOKENS), tls=TlsFiles(cert, str(locked), None))
