"""The flags for tokens and TLS, the same for every process and every command that speaks to others over TCP."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

import click

from cachefs.cli.params import F
from cachefs.model import ConfigError
from cachefs.net import Address, Role, Security, TcpAddress, TlsFiles, load_tokens, make_security

_META = "cachefs.cli.security"
_FILES = {
    "tokens": "File with tokens, as `cachefs token` makes it.",
    "tls-cert": "PEM file with the certificate of this process: it speaks TLS.",
    "tls-key": "PEM file with the key of --tls-cert, if it is not in there.",
    "tls-ca": "PEM file with authorities: others must show a certificate from one of them.",
}


def security_options(function: F) -> F:
    """Their values are no arguments of the command: `security_of` and `security_to_ask` find them."""
    for name, text in reversed(_FILES.items()):
        variable = "CACHEFS_" + name.upper().replace("-", "_")
        function = click.option(
            f"--{name}",
            metavar="FILE",
            envvar=variable,
            expose_value=False,
            callback=_remember,
            help=f"{text} Also {variable}.",
        )(function)
    return click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Neither prove nor demand anything: for loopback only.",
    )(function)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    ctx.meta.setdefault(_META, {})[param.name] = value
    return value


def security_arguments() -> tuple[str, ...]:
    """The flags as a child process is told them."""
    given = _given()
    files = [(name, given[name.replace("-", "_")]) for name in _FILES]
    told = [each for name, path in files if path is not None for each in (f"--{name}", path)]
    return (*told, *(["--insecure"] if given["insecure"] else []))


def _given() -> Mapping[str, Any]:
    found: Mapping[str, Any] = click.get_current_context().meta[_META]
    return found


def security_of(presents: Role | None, needs: Role, *, serves: bool = True, **addresses: Address) -> Security | None:
    """Of a process; None with --insecure. `needs`: the role it is of no use without; `addresses`, by their flags.

    Raises ConfigError for neither or both of --tokens and --insecure, and for files that will not do.
    """
    given = _given()
    if given["insecure"]:
        for name in _FILES:
            if given[name.replace("-", "_")] is not None:
                raise ConfigError("--insecure", f"given with --{name}", "one of the two")
        for name, address in addresses.items():
            _check_loopback(f"--{name}", address, "as long as --insecure is given")
        return None
    if given["tokens"] is None:
        accepted = "a file with tokens (cachefs token new FILE); or --insecure, which is for loopback only"
        raise ConfigError("--tokens", "not given", accepted)
    security = _made(given, presents)
    if needs not in security.tokens:
        raise ConfigError("--tokens", given["tokens"], f"a file with the token of {needs}")
    _check_tls(given, serves=serves, asks=presents is not None)
    return security


def security_to_ask(address: Address, *, admin: bool) -> Security | None:
    """Of a command that asks the master at an address it was given.

    `admin`: it changes something, and shows that it may. None with --insecure, and without tokens: whoever listens
    there may have none, on loopback only. Raises ConfigError.
    """
    given = _given()
    if given["insecure"]:
        source = click.get_current_context().get_parameter_source("tokens")
        if source is click.core.ParameterSource.COMMANDLINE:
            raise ConfigError("--insecure", "given with --tokens", "one of the two")
        _check_loopback("--master", address, "as long as --insecure is given")
        return None
    if given["tokens"] is None:
        _check_loopback("--master", address, "as long as no file with tokens is given: --tokens, or CACHEFS_TOKENS")
        for name in _FILES:
            if given[name.replace("-", "_")] is not None:
                raise ConfigError("--tokens", "not given", f"a file with tokens, as --{name} is given")
        return None
    security = _made(given, None)
    roles = (Role.ADMIN, Role.CLIENT) if admin else (Role.CLIENT, Role.ADMIN)
    presents = next((role for role in roles if role in security.tokens), None)
    if presents is None:
        raise ConfigError("--tokens", given["tokens"], f"a file with the token of {roles[0]}")
    _check_tls(given, serves=False, asks=True)
    return security.presenting(presents)


def _made(given: Mapping[str, Any], presents: Role | None) -> Security:
    tls = TlsFiles(given["tls_cert"], given["tls_key"], given["tls_ca"])
    return make_security(load_tokens(given["tokens"]), presents, tls)


def _check_tls(given: Mapping[str, Any], *, serves: bool, asks: bool) -> None:
    """Half of TLS would be none in one direction. Raises ConfigError."""
    flags = {"--tls-cert": given["tls_cert"], "--tls-ca": given["tls_ca"]}
    used = next((flag for flag, value in flags.items() if value is not None), None)
    if used is None:
        return
    if serves and given["tls_cert"] is None:
        raise ConfigError("--tls-cert", "not given", f"the certificate to serve TLS with, as {used} is given")
    if asks and given["tls_ca"] is None:
        raise ConfigError("--tls-ca", "not given", f"the authorities to know the master by, as {used} is given")


def _check_loopback(flag: str, address: Address, why: str) -> None:
    if isinstance(address, TcpAddress) and not is_loopback(address.host):
        raise ConfigError(flag, str(address), f"a loopback address, {why}")


def is_loopback(host: str) -> bool:
    """Whether every address a host name stands for is a loopback one; no for one that cannot be resolved."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(text.partition("%")[0]).is_loopback for text in found)
