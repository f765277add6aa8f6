"""The command `cachefs` and its subcommands, each imported when it is used: the libraries of some take a second."""

from __future__ import annotations

import difflib
import gc
import importlib
import sys

import click

from cachefs.model import CachefsError

COMMANDS = {
    "up": "cachefs.cli.up",
    "master": "cachefs.cli.services",
    "worker": "cachefs.cli.services",
    "mount": "cachefs.cli.mount",
    "umount": "cachefs.cli.umount",
    "node-keeper": "cachefs.cli.node",
    "node-mounts": "cachefs.cli.node",
    "ls": "cachefs.cli.inspect",
    "stat": "cachefs.cli.inspect",
    "report": "cachefs.cli.inspect",
    "refresh": "cachefs.cli.metadata",
    "load": "cachefs.cli.load",
    "free": "cachefs.cli.free",
    "replicate": "cachefs.cli.job",
    "job": "cachefs.cli.job",
    "pin": "cachefs.cli.pin",
    "unpin": "cachefs.cli.pin",
    "quota": "cachefs.cli.quota",
    "ufs": "cachefs.cli.ufs",
    "volume": "cachefs.cli.volume",
    "token": "cachefs.cli.token",
    "verify": "cachefs.cli.verify",
    "doctor": "cachefs.cli.doctor",
    "config": "cachefs.cli.config",
    "completion": "cachefs.cli.completion",
    "version": "cachefs.cli.version",
}

HIDDEN = {"mount-server": ("cachefs.cli.mount", "mount_server")}
"""What other commands start, and nobody else: the module and the name in it."""

SUBCOMMANDS = {"worker": ("cachefs.cli.workers", ("list", "drain", "undrain", "forget"))}
"""Of commands that also do something without one: the module with their group, and their names."""


def load_group(name: str) -> click.Group:
    """That of `SUBCOMMANDS`."""
    group: click.Group = getattr(importlib.import_module(SUBCOMMANDS[name][0]), f"{name}s")
    return group


def load_command(name: str) -> click.Command:
    command: click.Command = getattr(importlib.import_module(COMMANDS[name]), name.replace("-", "_"))
    return command


class _Group(click.Group):
    """Errors made on purpose are told in one line, without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in HIDDEN:
            module, name = HIDDEN[cmd_name]
            command: click.Command = getattr(importlib.import_module(module), name)
            return command
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*COMMANDS, *HIDDEN) and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" There are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        if len(args) > 1 and args[0] in SUBCOMMANDS and args[1] in SUBCOMMANDS[args[0]][1]:
            return args[0], load_group(args[0]), args[1:]
        return super().resolve_command(ctx, args)

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
    gc.enable()  # the command is imported by now; see `cachefs.__main__`
