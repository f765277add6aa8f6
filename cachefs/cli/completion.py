"""`cachefs completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands and flags, to be evaluated by it.

    For bash: echo 'eval "$(cachefs completion bash)"' >> ~/.bashrc
    """
    found = get_completion_class(shell)
    assert found is not None
    print(found(ctx.find_root().command, {}, "cachefs", "_CACHEFS_COMPLETE").source())
