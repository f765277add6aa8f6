"""Flags that several services have, and the question before something is taken away."""

from __future__ import annotations

import sys

import click

from cachefs.model import ConfigError
from cachefs.net import Address, TcpAddress

supervised_option = click.option("--supervised", "supervised_fd", type=int, hidden=True)
json_ready_option = click.option(
    "as_json", "--json", is_flag=True, help="Print the line that says it is ready as JSON. Errors stay text."
)
log_level_option = click.option(
    "--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"]), default="INFO", show_default=True
)


def tcp_address(key: str, address: Address) -> TcpAddress:
    if not isinstance(address, TcpAddress):
        raise ConfigError(key, str(address), "HOST:PORT")
    return address


def confirm(question: str) -> None:
    """Ask whoever sits at the terminal. Raises ConfigError when nobody does, click.Abort for a no."""
    if not sys.stdin.isatty():
        raise ConfigError("--yes", "not given", "--yes, as there is no terminal to ask at")
    click.confirm(question, abort=True, err=True)
