"""Typed requests: a struct per request, tagged with its name on the wire, that knows the type of its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar, get_args

import msgspec

from cachefs.model import RemoteProtocolError
from cachefs.wire.frames import DECODE_ERRORS

R = TypeVar("R")


class _Tagged(msgspec.Struct, frozen=True, tag_field="q", tag=str):
    """Tagged with the name of its class."""


class _Nothing(_Tagged, frozen=True):
    """A request that asks for nothing; no service answers it."""


class Request(_Tagged, Generic[R], frozen=True):
    """A request with one answer of type R: `class Lookup(Request[LookupReply], frozen=True)`."""


class StreamRequest(_Tagged, Generic[R], frozen=True):
    """A request answered by a stream of R."""


AnyRequest = Request[Any] | StreamRequest[Any]


def reply_type(request_class: type[Any]) -> Any:
    """The R of a request class. Raises TypeError for a class that names none."""
    for base in getattr(request_class, "__orig_bases__", ()):
        arguments = get_args(base)
        if arguments and not isinstance(arguments[0], TypeVar):
            return arguments[0]
    raise TypeError(f"{request_class.__name__} does not say what answers it: Request[ReplyType]")


class RequestDecoder:
    """Decodes the requests that one service accepts."""

    def __init__(self, request_classes: Iterable[type[Any]]) -> None:
        # Always a union: only there the tag is required.
        union: Any = _Nothing
        for each in request_classes:
            union = union | each
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def decode(self, meta: bytes | bytearray | memoryview) -> Any:
        """Raises RemoteProtocolError for an unknown request or a field that is not what it must be."""
        try:
            return self._decoder.decode(meta)
        except DECODE_ERRORS as error:
            raise RemoteProtocolError(f"request refused: {error}") from error


class ReplyDecoders:
    """Decoders of answers by request class, made once each."""

    def __init__(self) -> None:
        self._decoders: dict[type[Any], msgspec.msgpack.Decoder[Any]] = {}

    def decode(self, request_class: type[Any], meta: bytes | bytearray | memoryview) -> Any:
        """Raises RemoteProtocolError for an answer that is not of the request's reply type."""
        decoder = self._decoders.get(request_class)
        if decoder is None:
            decoder = self._decoders[request_class] = msgspec.msgpack.Decoder(reply_type(request_class))
        try:
            return decoder.decode(meta)
        except DECODE_ERRORS as error:
            raise RemoteProtocolError(f"answer to {request_class.__name__} refused: {error}") from error
