"""`cachefs config show`: what is in effect, and why."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cachefs.cli import params, settings
from cachefs.cli.mount_options import PROFILES
from cachefs.model import without_credentials


@click.group()
def config() -> None:
    """Settings, and where they come from."""


@config.command()
@click.argument("command", type=click.Choice(list(settings.SECTIONS)), default="up")
@click.option("--config", "path", metavar="FILE", help="As of the command.")
@params.json_option
def show(command: str, path: str | None, as_json: bool) -> None:
    """Show the settings that COMMAND (default: up) would run with, and where each comes from.

    Secrets are hidden.
    """
    commands = settings.configured_commands()
    settings.check_environment(commands)
    chosen = path or os.environ.get(settings.CONFIG_VARIABLE) or settings.default_path()
    file = settings.load_settings(chosen, commands)
    target = commands[command]
    with click.Context(target, info_name=command) as ctx:
        settings.apply_file(ctx, target, file)
        found = {
            settings.key_of(option): {"value": _shown(value), "from": where, "variable": settings.variable_of(option)}
            for option, value, where in settings.effective(ctx, target)
        }
        options = params.collect_ufs_options(())
        from_file = file.ufs_options
    profile = found.get("profile", {}).get("value")
    for name, value in PROFILES.get(profile or "", {}).items():
        setting = found[name.replace("_", "-")]
        if setting["from"] == "default":
            setting.update({"value": _shown(value), "from": f"profile {profile}"})
    ufs = {
        name: {
            "value": "***" if settings.is_secret(name) else without_credentials(value),
            "from": f"{file.path}: [ufs.options]" if from_file.get(name) == value else settings.UFS_OPTIONS_VARIABLE,
        }
        for name, value in options.items()
    }
    if as_json:
        print(json.dumps({"command": command, "file": file.path, "settings": found, "ufs_options": ufs}))
        return
    table = Table("setting", "value", "from", title=f"cachefs {command}, file: {file.path or 'none'}")
    for key, setting in found.items():
        value = setting["value"]
        table.add_row(key, "" if value is None else str(value), setting["from"])
    for name, setting in ufs.items():
        table.add_row(f"ufs-option {name}", setting["value"], setting["from"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_credentials(str(value))
