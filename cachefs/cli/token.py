"""`cachefs token`: the files that processes prove to each other who they are with."""

from __future__ import annotations

import click

from cachefs.cli.settings import NotAccepted
from cachefs.net import Role, copy_tokens, new_tokens


def _roles(ctx: click.Context, param: click.Parameter, value: str) -> list[Role]:
    names = [name.strip() for name in value.split(",")]
    known = [str(role) for role in Role]
    if any(name not in known for name in names):
        raise NotAccepted(value, f"some of {', '.join(known)}, with commas between them", ctx, param)
    return [Role(name) for name in dict.fromkeys(names)]


@click.group()
def token() -> None:
    """Tokens: what a process has to know to speak as a client, a worker or an admin."""


@token.command()
@click.argument("file")
@click.option("--roles", default=",".join(Role), show_default=True, callback=_roles, help="Whose tokens to make.")
def new(file: str, roles: list[Role]) -> None:
    """Make FILE with new random tokens, readable by its owner alone. Nothing is written over.

    For the master, and to be kept safe; `cachefs token copy` makes the files of others from it.
    """
    new_tokens(file, roles)
    click.echo(f"{file} has tokens of {', '.join(roles)}")


@token.command()
@click.argument("file")
@click.argument("to")
@click.option(
    "--roles", required=True, callback=_roles, metavar="ROLE[,ROLE...]", help="Whose tokens to copy: client and so on."
)
def copy(file: str, to: str, roles: list[Role]) -> None:
    """Make the file TO with some of the tokens in FILE: a node where jobs run needs that of client only, one with a
    worker those of client and worker.
    """
    copy_tokens(file, to, roles)
    click.echo(f"{to} has tokens of {', '.join(roles)}")
