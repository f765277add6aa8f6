"""`cachefs version`."""

from __future__ import annotations

import platform

import click

from cachefs import __version__
from cachefs.cli import params


@click.command()
@params.json_option
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        click.echo(f'{{"cachefs": "{__version__}", "python": "{platform.python_version()}"}}')
    else:
        click.echo(f"cachefs {__version__}")
