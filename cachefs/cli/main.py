"""The command `cachefs` and its subcommands."""

from __future__ import annotations

import sys

import click

from cachefs import __version__
from cachefs.cli.inspect import ls, report, stat
from cachefs.cli.services import master, mount, worker
from cachefs.cli.umount import umount
from cachefs.cli.up import up
from cachefs.model import CachefsError


class _Group(click.Group):
    """Errors made on purpose are told in one line, without a traceback."""

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


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"cachefs {__version__}")


for command in (up, master, worker, mount, umount, ls, stat, report):
    main.add_command(command)
