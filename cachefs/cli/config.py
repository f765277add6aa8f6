"""`cachefs config show`: what is in effect, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from cachefs.cli import params, settings
from cachefs.cli.instances import state_root
from cachefs.cli.mount_options import PROFILES, check_settings
from cachefs.cli.tables import print_tables, table_of
from cachefs.fuse import probe, user_allow_other
from cachefs.model import DEFAULT_BLOCK_SIZE, DEFAULT_PAGE_SIZE, without_credentials


@dataclass
class Setting:
    option: click.Option
    value: Any
    where: str

    def for_people(self) -> str:
        """As it would be written on the command line; empty if it has no value."""
        return " ".join(map(self._written, self._values()))

    def for_programs(self) -> dict[str, Any]:
        """Numbers as such, sizes in bytes and durations in seconds; the rest as it would be written."""
        values = [each if self._is_plain(each) else self._written(each) for each in self._values()]
        value = values if self.option.multiple else values[0] if values else None
        return {"value": value, "from": self.where, "variable": settings.variable_of(self.option)}

    def _values(self) -> Sequence[Any]:
        if self.value is None:
            return ()
        return self.value if self.option.multiple and not isinstance(self.value, str) else (self.value,)

    def _is_plain(self, value: Any) -> bool:
        return isinstance(value, bool) or (params.is_number(self.option.type) and not isinstance(value, str))

    def _written(self, value: Any) -> str:
        text = value if isinstance(value, str) else params.written(self.option.type, value)
        return without_credentials(text)


def fill_in(command: str, found: dict[str, Setting], worker: click.Command) -> None:
    """What counts where nothing was said and the command finds out by itself, or who decides."""
    decided: dict[str, tuple[Any, str]] = dict.fromkeys(("uid", "gid"), (None, "that of the under-store"))
    decided["allow-other"] = (probe().sys_admin or user_allow_other(), "what this user may have")
    if command in ("up", "master"):
        decided["page-size"] = (DEFAULT_PAGE_SIZE, "for a new namespace")
        decided["block-size"] = (DEFAULT_BLOCK_SIZE, "for a new namespace")
    if command == "up":
        state_dir = os.path.join(state_root(), "NAME-OF-URL")
        decided["state-dir"] = (state_dir, "in this user's cache directory")
        tier = os.path.join(found["state-dir"].value or state_dir, "tier")
        decided["tier"] = (f"ssd:{tier}:SIZE", "SIZE is half of what is free there")
        for option in settings.settings_of(worker):
            if settings.key_of(option) in ("promote", "files-ahead"):
                decided[settings.key_of(option)] = (option.default, "that of cachefs worker")
    if command == "mount":
        decided["promote"] = (None, "that of the worker")
        decided["worker-socket"] = (None, "that of the worker which the master knows on this node")
    for key in ("attr-timeout", "entry-timeout", "negative-timeout"):
        if command == "up":
            interval_s = found["sync-interval"].value
            decided[key] = (interval_s if interval_s >= 0 else "for ever", "that of --sync-interval")
        else:
            decided[key] = (None, "that of the master's --sync-interval")
    for key, (value, why) in decided.items():
        setting = found.get(key)
        if setting is not None and setting.where == "default" and not setting.value and setting.value is not False:
            setting.value, setting.where = value, f"default: {why}"


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
        listed = list(settings.effective(ctx, target))
        if command in ("up", "mount"):
            check_settings(listed)
        found = {settings.key_of(option): Setting(option, value, where) for option, value, where in listed}
        options = params.collect_ufs_options(())
        from_file = file.ufs_options
    _apply_profile(found)
    fill_in(command, found, commands["worker"])
    ufs = {
        name: {
            "value": "***" if settings.is_secret(name) else without_credentials(value),
            "from": f"{file.path}: [ufs.options]" if from_file.get(name) == value else settings.UFS_OPTIONS_VARIABLE,
        }
        for name, value in options.items()
    }
    if as_json:
        shown = {key: setting.for_programs() for key, setting in found.items()}
        print(json.dumps({"command": command, "file": file.path, "settings": shown, "ufs_options": ufs}))
        return
    rows = [(key, setting.for_people(), setting.where) for key, setting in found.items()]
    rows += [(f"ufs-option {name}", each["value"], each["from"]) for name, each in ufs.items()]
    title = f"cachefs {command}, file: {file.path or 'none'}"
    print_tables(table_of(("setting", "value", "from"), rows, title))


def _apply_profile(found: dict[str, Setting]) -> None:
    profile = found["profile"].value if "profile" in found else None
    for name, value in PROFILES.get(profile or "", {}).items():
        setting = found[name.replace("_", "-")]
        if setting.where == "default":
            setting.value, setting.where = value, f"profile {profile}"
