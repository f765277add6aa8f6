"""The protocol without sockets: every frame whole, byte by byte, cut, and followed by garbage."""

from __future__ import annotations

import inspect

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import CachefsError, ConfigError, LocalProtocolError, RemoteProtocolError, StaleError, errors
from cachefs.wire import (
    Connection,
    Frame,
    Hello,
    Kind,
    Limits,
    Request,
    RequestDecoder,
    decode_credit,
    decode_error,
    from_wire,
    messages,
    reply_type,
    to_wire,
)
from cachefs.wire.errorcodes import CODES
from cachefs.wire.frames import HEADER, MAGIC, VERSION

SMALL = Limits(meta_bytes=1000, payload_bytes=1000, descriptors=2)


class Ask(Request[str], frozen=True):
    text: str


def feed(connection: Connection, data: bytes, chunk: int = 1 << 20, descriptors: tuple[int, ...] = ()) -> list[Frame]:
    frames = []
    while data:
        with connection.get_buffer() as buffer:
            assert len(buffer) > 0
            count = min(len(buffer), chunk, len(data))
            buffer[:count] = data[:count]
        frames += connection.buffer_updated(count, descriptors)
        descriptors = ()
        data = data[count:]
    return frames


def pair(limits: Limits = SMALL) -> tuple[Connection, Connection]:
    """An asking and an answering side that have greeted each other."""
    asking, answering = Connection(asking=True, limits=limits), Connection(asking=False, limits=limits)
    feed(answering, asking.hello(Hello("client")))
    feed(asking, answering.hello(Hello("master", name="m")))
    return asking, answering


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_frames_arrive_as_they_were_sent(chunk: int) -> None:
    asking, answering = pair()
    assert asking.peer_hello == Hello("master", name="m")
    data = asking.head(Kind.REQUEST, 5, Ask("hi")) + asking.head(Kind.CANCEL, 5)
    first, second = feed(answering, data, chunk)
    assert (first.kind, first.request_id, bytes(first.payload)) == (Kind.REQUEST, 5, b"")
    assert RequestDecoder([Ask]).decode(first.meta) == Ask("hi")
    assert (second.kind, second.request_id) == (Kind.CANCEL, 5)
    (reply,) = feed(asking, answering.head(Kind.REPLY, 5, "x", 3) + b"abc", chunk)
    assert (reply.kind, reply.request_id, bytes(reply.payload)) == (Kind.REPLY, 5, b"abc")


def test_descriptors_go_with_their_frame() -> None:
    asking, answering = pair()
    plain = answering.head(Kind.REPLY, 1, "x")
    with_two = answering.head(Kind.REPLY, 2, "y", 0, 2)
    assert feed(asking, plain)[0].descriptors == ()
    assert feed(asking, with_two, descriptors=(10, 11))[0].descriptors == (10, 11)


def test_announced_descriptors_must_come() -> None:
    asking, answering = pair()
    with pytest.raises(RemoteProtocolError, match="descriptors"):
        feed(asking, answering.head(Kind.REPLY, 2, "y", 0, 2), descriptors=(10,))
    assert asking.drain_descriptors() == [10]


def header(**change: int | bytes) -> bytes:
    fields: dict[str, int | bytes] = {
        "magic": MAGIC,
        "version": VERSION,
        "kind": Kind.REQUEST,
        "descriptors": 0,
        "request_id": 1,
        "meta": 0,
        "payload": 0,
    }
    fields.update(change)
    return HEADER.pack(*fields.values())


@pytest.mark.parametrize(
    "bad",
    [
        header(magic=b"GE"),
        header(version=9),
        header(kind=77),
        header(kind=Kind.REPLY),
        header(kind=Kind.HELLO),
        header(request_id=0),
        header(meta=1001),
        header(payload=1001),
        header(descriptors=3),
    ],
)
def test_malformed_frames_break_the_connection(bad: bytes) -> None:
    _, answering = pair()
    with pytest.raises(RemoteProtocolError):
        feed(answering, bad)
    with pytest.raises(LocalProtocolError):
        answering.buffer_updated(0)


def test_the_first_frame_is_hello() -> None:
    with pytest.raises(RemoteProtocolError, match="before HELLO"):
        feed(Connection(asking=False), header())
    with pytest.raises(LocalProtocolError, match="HELLO"):
        Connection(asking=True).head(Kind.REQUEST, 1, Ask("x"))


@pytest.mark.parametrize(
    ("kind", "meta", "payload"), [(Kind.REQUEST, Ask("x" * 2000), 0), (Kind.REQUEST, Ask(""), 2000)]
)
def test_what_the_other_side_would_refuse_is_not_sent(kind: Kind, meta: object, payload: int) -> None:
    asking, _ = pair()
    with pytest.raises(LocalProtocolError, match="limit"):
        asking.head(kind, 1, meta, payload)
    with pytest.raises(LocalProtocolError, match="not for this side"):
        asking.head(Kind.REPLY, 1, "x")


@given(st.binary(max_size=200), st.integers(1, 50))
def test_garbage_raises_nothing_but_protocol_errors(garbage: bytes, chunk: int) -> None:
    _, answering = pair()
    try:
        frames = feed(answering, garbage, chunk)
        for frame in frames:
            RequestDecoder([Ask]).decode(frame.meta)
    except RemoteProtocolError:
        pass


@given(st.binary(max_size=100))
def test_garbage_in_metas(garbage: bytes) -> None:
    for decode in (RequestDecoder([Ask]).decode, decode_credit, decode_error):
        try:
            decode(garbage)
        except RemoteProtocolError:
            pass


def test_requests_that_a_service_does_not_accept() -> None:
    decoder = RequestDecoder([Ask])
    for wrong in ({"q": "Other"}, {"q": "Ask", "text": 5}, {"text": "x"}, [1], {"q": "Ask"}):
        with pytest.raises(RemoteProtocolError, match="refused"):
            decoder.decode(msgspec.msgpack.encode(wrong))


def test_every_message_says_what_answers_it() -> None:
    requests = [
        each
        for _, each in inspect.getmembers(messages, inspect.isclass)
        if each.__module__ == messages.__name__ and issubclass(each, msgspec.Struct) and each.__struct_config__.tag
    ]
    assert len(requests) > 10
    for request in requests:
        msgspec.msgpack.Decoder(reply_type(request))
    RequestDecoder(requests)


def test_every_error_has_a_code_and_arrives_as_itself() -> None:
    classes = {each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, CachefsError)}
    assert set(CODES.values()) == classes
    assert type(from_wire(to_wire(StaleError("old")))) is StaleError
    config = from_wire(to_wire(ConfigError("--key", "value", "something else")))
    assert isinstance(config, ConfigError) and (config.key, config.value) == ("--key", "value")


def test_unexpected_errors_tell_nothing() -> None:
    assert "secret" not in to_wire(RuntimeError("secret")).message
    assert type(from_wire(to_wire(RuntimeError("secret")))) is CachefsError
