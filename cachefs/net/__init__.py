"""The protocol over real sockets, on trio: services that answer, peers and pools that ask."""

from cachefs.net.addresses import Address, TcpAddress, UnixAddress, parse_address
from cachefs.net.background import open_background
from cachefs.net.channel import Answer, Body, FileSlice
from cachefs.net.flights import Flights
from cachefs.net.http import serving_http
from cachefs.net.peer import Peer, Pool, open_peer, open_pool
from cachefs.net.service import Listener, Service, Session, listening, serve, serve_on
from cachefs.wire import Hello, Limits

__all__ = [
    "Address",
    "Answer",
    "Body",
    "FileSlice",
    "Flights",
    "Hello",
    "Limits",
    "Listener",
    "Peer",
    "Pool",
    "Service",
    "Session",
    "TcpAddress",
    "UnixAddress",
    "listening",
    "open_background",
    "open_peer",
    "open_pool",
    "parse_address",
    "serve",
    "serve_on",
    "serving_http",
]
