"""Where a service listens: host and port, or the path of a unix socket."""

from __future__ import annotations

from typing import NamedTuple

from cachefs.model import ConfigError

_ACCEPTED = "HOST:PORT with a port of 0 to 65535, or unix:/path, or an absolute path"
_MAX_UNIX_PATH = 107
"""sun_path of sockaddr_un holds 108 bytes, one of them NUL."""


class TcpAddress(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class UnixAddress(NamedTuple):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = TcpAddress | UnixAddress


def parse_address(text: str, key: str = "address") -> Address:
    """`host:port`, `[v6]:port`, `unix:/path` or `/path`. `key` names the setting in the error. Raises ConfigError."""
    if text.startswith(("unix:/", "/")):
        path = text.removeprefix("unix:")
        if len(path.encode()) > _MAX_UNIX_PATH:
            raise ConfigError(key, text, f"a socket path of at most {_MAX_UNIX_PATH} bytes")
        return UnixAddress(path)
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(key, text, _ACCEPTED)
    return TcpAddress(host, int(port))
