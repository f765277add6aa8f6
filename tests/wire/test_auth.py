"""The handshake without sockets: who knows the token gets in, and nobody who heard, changed or replayed one does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import AuthenticationError, ConfigError, LocalProtocolError, RemoteProtocolError
from cachefs.wire import Connection, Handshake, Hello, Kind, Limits, Request, Role, Tokens
from cachefs.wire.frames import HEADER, MAGIC, VERSION

CLIENT, WORKER, ADMIN = ("c" * 32, "w" * 32, "a" * 32)
GOLDEN_PROOF = "0074da15de6a8fdeb900575039b7ff6f95a7693cc0dbff3db4ac7105fe2fbe4e"
"""Made from the description in `auth`, not by its code."""
ALL = Tokens({Role.CLIENT: CLIENT, Role.WORKER: WORKER, Role.ADMIN: ADMIN})


class Ask(Request[str], frozen=True):
    text: str


def side(*, asking: bool, tokens: Tokens | None = ALL, role: Role = Role.CLIENT, binding: bytes = b"") -> Connection:
    handshake = None
    if tokens is not None:
        handshake = Handshake(tokens, asking=asking, presents=role if asking else None)
        handshake.binding = binding
    return Connection(asking=asking, handshake=handshake)


def feed(connection: Connection, data: bytes) -> list[Kind]:
    kinds = []
    while data:
        with connection.get_buffer() as buffer:
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
        data = data[count:]
        kinds += [frame.kind for frame in connection.buffer_updated(count)]
    return kinds


def greeted(asking: Connection, answering: Connection) -> None:
    """Both HELLOs have arrived."""
    theirs, ours = answering.hello(Hello("master")), asking.hello(Hello("client"))
    feed(answering, ours)
    feed(asking, theirs)


def proved(asking: Connection, answering: Connection) -> None:
    feed(answering, asking.auth())
    feed(asking, answering.auth())


@pytest.mark.parametrize("role", list(Role))
def test_both_prove_themselves(role: Role) -> None:
    asking, answering = side(asking=True, role=role), side(asking=False)
    greeted(asking, answering)
    assert not asking.is_open and not answering.is_open and answering.role is None
    proved(asking, answering)
    assert asking.is_open and answering.is_open and answering.role is role
    assert feed(answering, asking.head(Kind.REQUEST, 1, Ask("x"))) == [Kind.REQUEST]
    assert feed(asking, answering.head(Kind.REPLY, 1, "x")) == [Kind.REPLY]


def test_the_proof_is_what_it_was() -> None:
    """Two versions understand each other: HELLO and AUTH as they are on the wire today."""
    handshake = Handshake(ALL, asking=True, presents=Role.CLIENT)
    handshake._nonce = b"n" * 32
    asking = Connection(asking=True, handshake=handshake)
    hello = asking.hello(Hello("client"))
    assert hello[HEADER.size :] == b"\x83\xa4role\xa6client\xa5nonce\xc4 " + b"n" * 32 + b"\xa5token\xa6client"
    feed(asking, frame(Kind.HELLO, msgspec.msgpack.encode(Hello("master", nonce=b"m" * 32))))
    handshake.binding = b"b" * 32
    assert asking.auth() == HEADER.pack(MAGIC, VERSION, Kind.AUTH, 0, 0, 34, 0) + b"\xc4 " + bytes.fromhex(GOLDEN_PROOF)


def test_the_wrong_token_of_the_asker() -> None:
    wrong = Tokens({Role.CLIENT: "x" * 32})
    asking, answering = side(asking=True, tokens=wrong), side(asking=False)
    greeted(asking, answering)
    with pytest.raises(AuthenticationError, match="wrong token of client") as raised:
        feed(answering, asking.auth())
    assert not answering.is_open
    with pytest.raises(LocalProtocolError):
        answering.auth()
    with pytest.raises(AuthenticationError, match="does not accept our token"):
        feed(asking, answering.refusal(raised.value))


def test_an_answerer_that_does_not_know_the_token() -> None:
    asking, impostor = side(asking=True), side(asking=False, tokens=Tokens({Role.CLIENT: "x" * 32}))
    greeted(asking, impostor)
    asking.auth()
    assert impostor.handshake is not None
    impostor.handshake.proved = True  # It does not care.
    with pytest.raises(AuthenticationError, match="wrong token"):
        feed(asking, impostor.auth())
    assert not asking.is_open


@pytest.mark.parametrize(("asker", "answerer"), [(ALL, None), (None, ALL)])
def test_no_side_goes_on_without_tokens(asker: Tokens | None, answerer: Tokens | None) -> None:
    """Neither a plain server nor a plain client makes the other one give up what it demands."""
    asking, answering = side(asking=True, tokens=asker), side(asking=False, tokens=answerer)
    ours, theirs = asking.hello(Hello("client")), answering.hello(Hello("master"))
    with pytest.raises(AuthenticationError, match="demands a token" if asker is None else "has no tokens"):
        feed(asking, theirs)
    if answerer is not None:
        with pytest.raises(AuthenticationError, match="has no tokens"):
            feed(answering, ours)


def test_a_role_whose_token_the_answerer_has_not() -> None:
    asking, answering = side(asking=True, role=Role.ADMIN), side(asking=False, tokens=Tokens({Role.CLIENT: CLIENT}))
    with pytest.raises(AuthenticationError, match="no token of that role"):
        greeted(asking, answering)


def test_another_role_than_the_one_that_is_proved() -> None:
    """The token of a client does not make an admin."""
    asking, answering = side(asking=True), side(asking=False)
    theirs, ours = answering.hello(Hello("master")), asking.hello(Hello("client"))
    claimed = ours.replace(b"\xa5token\xa6client", b"\xa5token\xa5admin")
    meta = len(claimed) - HEADER.size
    feed(answering, HEADER.pack(MAGIC, VERSION, Kind.HELLO, 0, 0, meta, 0) + claimed[HEADER.size :])
    feed(asking, theirs)
    with pytest.raises(AuthenticationError, match="wrong token of admin"):
        feed(answering, asking.auth())


@pytest.mark.parametrize("nonce", [b"", b"n", b"n" * 31])
def test_a_nonce_that_is_none(nonce: bytes) -> None:
    answering = side(asking=False)
    answering.hello(Hello("master"))
    with pytest.raises(AuthenticationError):
        feed(answering, frame(Kind.HELLO, msgspec.msgpack.encode(Hello("client", nonce=nonce, token="client"))))


def test_a_replayed_handshake() -> None:
    """What was recorded of one connection opens no other one, in either direction."""
    asking, answering = side(asking=True), side(asking=False)
    hellos = asking.hello(Hello("client")), answering.hello(Hello("master"))
    feed(answering, hellos[0])
    feed(asking, hellos[1])
    asked = asking.auth()
    feed(answering, asked)
    answered = answering.auth()
    feed(asking, answered)

    another = side(asking=False)
    another.hello(Hello("master"))
    feed(another, hellos[0])
    with pytest.raises(AuthenticationError):
        feed(another, asked)

    late = side(asking=True)
    late.hello(Hello("client"))
    feed(late, hellos[1])
    late.auth()
    with pytest.raises(AuthenticationError):
        feed(late, answered)


def test_a_proof_is_not_played_back_to_its_maker() -> None:
    asking, answering = side(asking=True), side(asking=False)
    greeted(asking, answering)
    with pytest.raises(AuthenticationError):
        feed(asking, asking.auth())


def test_somebody_between_two_tls_connections() -> None:
    """The proofs pass through, but each side has seen another certificate."""
    asking, answering = side(asking=True, binding=b"1" * 32), side(asking=False, binding=b"2" * 32)
    greeted(asking, answering)
    with pytest.raises(AuthenticationError):
        feed(answering, asking.auth())


@given(st.booleans(), st.integers(0, 400), st.integers(1, 255))
def test_a_changed_bit_of_a_handshake(of_asker: bool, at: int, change: int) -> None:
    asking, answering = side(asking=True), side(asking=False)
    ours, theirs = asking.hello(Hello("client", "name")), answering.hello(Hello("master", "name", "abcd"))
    changed = bytearray(ours if of_asker else theirs)
    changed[at % len(changed)] ^= change
    # What is announced as longer never becomes whole, and as shorter begins a frame that is none.
    with pytest.raises((AuthenticationError, RemoteProtocolError, LocalProtocolError)):
        feed(answering, bytes(changed) if of_asker else ours)
        feed(asking, theirs if of_asker else bytes(changed))
        proved(asking, answering)
    assert not (asking.is_open and answering.is_open)


# ---- rules ---------------------------------------------------------------------------------------------------------


def frame(kind: Kind, meta: bytes = b"", request_id: int = 0, payload: int = 0) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, 0, request_id, len(meta), payload) + meta


@pytest.mark.parametrize("kind", [Kind.REQUEST, Kind.CANCEL, Kind.CREDIT, Kind.HELLO, Kind.ERROR])
@pytest.mark.parametrize("request_id", [0, 1])
def test_nothing_is_taken_from_an_asker_before_its_proof(kind: Kind, request_id: int) -> None:
    asking, answering = side(asking=True), side(asking=False)
    greeted(asking, answering)
    with pytest.raises(RemoteProtocolError, match="before AUTH"):
        feed(answering, frame(kind, b"\x01", request_id))


@pytest.mark.parametrize("kind", [Kind.REPLY, Kind.ITEM, Kind.HELLO])
def test_nothing_is_taken_from_an_answerer_before_its_proof(kind: Kind) -> None:
    asking, answering = side(asking=True), side(asking=False)
    greeted(asking, answering)
    with pytest.raises(RemoteProtocolError, match="before AUTH"):
        feed(asking, frame(kind, b"\x01", 1))


@pytest.mark.parametrize(
    "bad",
    [
        frame(Kind.AUTH, msgspec.msgpack.encode(b"short")),
        frame(Kind.AUTH, msgspec.msgpack.encode("x" * 32)),
        frame(Kind.AUTH, b"\xc4"),
        frame(Kind.AUTH, msgspec.msgpack.encode(b"x" * 32), request_id=1),
        frame(Kind.AUTH, msgspec.msgpack.encode(b"x" * (Limits.auth_bytes))),
        frame(Kind.AUTH, msgspec.msgpack.encode(b"x" * 32), payload=1),
    ],
)
def test_malformed_proofs(bad: bytes) -> None:
    asking, answering = side(asking=True), side(asking=False)
    greeted(asking, answering)
    with pytest.raises(RemoteProtocolError):
        feed(answering, bad)
    assert not answering.is_open


def test_auth_is_sent_and_taken_once_and_only_with_tokens() -> None:
    asking, answering = side(asking=True), side(asking=False)
    with pytest.raises(LocalProtocolError):
        asking.auth()
    greeted(asking, answering)
    with pytest.raises(LocalProtocolError, match="proves itself first"):
        answering.auth()
    with pytest.raises(LocalProtocolError, match="AUTH comes first"):
        asking.head(Kind.REQUEST, 1, Ask("x"))
    sent = asking.auth()
    feed(answering, sent)
    with pytest.raises(RemoteProtocolError, match="not for this side"):
        feed(answering, sent)
    with pytest.raises(LocalProtocolError):
        asking.auth()
    plain, other = side(asking=True, tokens=None), side(asking=False, tokens=None)
    greeted(plain, other)
    with pytest.raises(LocalProtocolError):
        plain.auth()
    with pytest.raises(RemoteProtocolError, match="not for this side"):
        feed(other, sent)


def test_a_refusal_is_short() -> None:
    """Whoever answers has proved nothing, so that it is given no room, and what it says is not shown."""
    asking, answering = side(asking=True), side(asking=False)
    greeted(asking, answering)
    header = HEADER.pack(MAGIC, VERSION, Kind.ERROR, 0, 0, Limits.meta_bytes, 0)
    with pytest.raises(RemoteProtocolError, match="limit"):
        feed(asking, header)


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["short", "x" * 31, "x" * 5000, "with a space " * 4, "ü" * 40, "\n" * 40, ""])
def test_tokens_that_will_not_do(token: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Tokens({Role.CLIENT: token})
    assert "not shown" in str(raised.value) and (not token or token not in str(raised.value))


def test_two_roles_with_one_token_are_none() -> None:
    with pytest.raises(ConfigError, match="another one for each role"):
        Tokens({Role.CLIENT: CLIENT, Role.ADMIN: CLIENT})


def test_tokens_show_nothing() -> None:
    handshake = Handshake(ALL, asking=True, presents=Role.CLIENT)
    for shown in (repr(ALL), str(ALL), f"{ALL!r}", repr(handshake), repr(Connection(asking=True, handshake=handshake))):
        assert CLIENT not in shown and WORKER not in shown and ADMIN not in shown
    with pytest.raises(LocalProtocolError) as raised:
        Handshake(Tokens({Role.CLIENT: CLIENT}), asking=True, presents=Role.ADMIN)
    assert CLIENT not in str(raised.value)
