"""The protocol over real sockets, on trio: services that answer, peers and pools that ask."""

from cachefs.net.addresses import Address, TcpAddress, UnixAddress, parse_address
from cachefs.net.background import open_background
from cachefs.net.channel import Answer, Body, FileSlice
from cachefs.net.flights import Flights
from cachefs.net.http import serving_http
from cachefs.net.liveness import answer_ping, is_silent
from cachefs.net.peer import Peer, Pool, open_peer, open_pool
from cachefs.net.security import Security, TlsFiles, make_security
from cachefs.net.service import (
    ADMINS,
    EVERYONE,
    WORKERS,
    Allowed,
    Service,
    Session,
    serve,
    serve_on,
)
from cachefs.net.sockets import Listener, listening, taking_over
from cachefs.net.tokens import copy_tokens, load_tokens, new_tokens
from cachefs.wire import Hello, Limits, Role, Tokens

__all__ = [
    "ADMINS",
    "EVERYONE",
    "WORKERS",
    "Address",
    "Allowed",
    "Answer",
    "Body",
    "FileSlice",
    "Flights",
    "Hello",
    "Limits",
    "Listener",
    "Peer",
    "Pool",
    "Role",
    "Security",
    "Service",
    "Session",
    "TcpAddress",
    "TlsFiles",
    "Tokens",
    "UnixAddress",
    "answer_ping",
    "copy_tokens",
    "is_silent",
    "listening",
    "load_tokens",
    "make_security",
    "new_tokens",
    "open_background",
    "open_peer",
    "open_pool",
    "parse_address",
    "serve",
    "serve_on",
    "serving_http",
    "taking_over",
]
