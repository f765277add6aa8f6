"""What a process proves to others over TCP, and demands of them: tokens always, TLS if it is told to."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cachefs.model import ConfigError
from cachefs.wire import Handshake, Role, Tokens

_CERTIFICATE_BEGINS = "-----BEGIN CERTIFICATE-----"
_CERTIFICATE_ENDS = "-----END CERTIFICATE-----"


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. At least one of `ca` and `cert`."""

    cert: str | None = None
    """Of this process, the certificates between it and the authority after it."""
    key: str | None = None
    """None: it is in `cert` too."""
    ca: str | None = None
    """Whoever shows a certificate must have it from one of these. A server with it demands one of everybody."""


@dataclass(frozen=True)
class Security:
    """Of one process; in its configuration None stands for none at all, which is for loopback only.

    Unix sockets are left out: they ask the kernel who is there.
    """

    tokens: Tokens
    presents: Role | None = None
    """As whom it connects to others; None: it does not."""
    server_tls: ssl.SSLContext | None = field(default=None, repr=False)
    client_tls: ssl.SSLContext | None = field(default=None, repr=False)
    certificate_sha256: bytes = field(default=b"", repr=False)
    """Of the certificate that it shows as a server."""

    def presenting(self, role: Role) -> Security:
        return replace(self, presents=role)

    def asking(self) -> Handshake:
        return Handshake(self.tokens, asking=True, presents=self.presents)

    def answering(self) -> Handshake:
        handshake = Handshake(self.tokens, asking=False)
        handshake.binding = self.certificate_sha256
        return handshake


def make_security(tokens: Tokens, presents: Role | None = None, tls: TlsFiles | None = None) -> Security:
    """Raises ConfigError for files that are missing, or are not what they must be."""
    if tls is None or tls == TlsFiles():
        return Security(tokens, presents)
    if tls.key is not None and tls.cert is None:
        raise ConfigError("--tls-cert", "not given", "the certificate that --tls-key belongs to")
    server = client = None
    digest = b""
    if tls.cert is not None:
        server = _context(ssl.PROTOCOL_TLS_SERVER, tls)
        # One connection lasts for days: nobody comes back with a ticket.
        server.num_tickets = 0
        digest = _certificate_sha256(tls.cert)
    if tls.ca is not None:
        client = _context(ssl.PROTOCOL_TLS_CLIENT, tls)
    return Security(tokens, presents, server, client, digest)


def _context(protocol: int, tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if tls.cert is not None:
        cert, key = tls.cert, tls.key
        # Without a password OpenSSL would ask at the terminal.
        _load("--tls-cert", cert, "a PEM file with a certificate", lambda: context.load_cert_chain(cert, key, ""))
    if tls.ca is not None:
        ca = tls.ca
        _load("--tls-ca", ca, "a PEM file with certificates", lambda: context.load_verify_locations(ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(flag: str, path: str, accepted: str, load: Callable[[], None]) -> None:
    """Raises ConfigError."""
    try:
        load()
    except ssl.SSLError as error:
        if flag == "--tls-cert":
            accepted += ", and the key that belongs to it, without a passphrase, there or in --tls-key"
        raise ConfigError(flag, path, f"{accepted} ({error.reason or 'unusable'})") from error
    except OSError as error:
        also = " and --tls-key" if flag == "--tls-cert" else ""
        raise ConfigError(flag + also, path, f"{accepted} that can be read ({error.strerror})") from error


def _certificate_sha256(path: str) -> bytes:
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    begin = text.index(_CERTIFICATE_BEGINS)
    end = text.index(_CERTIFICATE_ENDS, begin) + len(_CERTIFICATE_ENDS)
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text[begin:end])).digest()
