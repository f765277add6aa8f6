"""The command `cachefs` and its subcommands, each imported when it is used: the libraries of some take a second."""

from __future__ import annotations

import importlib
import sys

import click

from cachefs.model import CachefsError

COMMANDS = {
    "up": "cachefs.cli.up",
    "master": "cachefs.cli.services",
    "worker": "cachefs.cli.services",
    "mount": "cachefs.cli.services",
    "umount": "cachefs.cli.umount",
    "ls": "cachefs.cli.inspect",
    "stat": "cachefs.cli.inspect",
    "report": "cachefs.cli.inspect",
    "refresh": "cachefs.cli.metadata",
    "load": "cachefs.cli.metadata",
    "verify": "cachefs.cli.verify",
    "version": "cachefs.cli.version",
}


class _Group(click.Group):
    """Errors made on purpose are told in one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except CachefsError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            # The reader of our output went away (`cachefs ls | head`): the usual end of a pipe.
            sys.stderr.close()
            sys.exit(141)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """A cache that puts an object store under a training job as if it were a local disk.

    Start with: cachefs up s3://bucket /mnt/data
    """
