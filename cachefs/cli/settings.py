"""Where settings come from: flags, then the environment, then a TOML file, then defaults.

The flags of the commands are the only list of settings there is. `--open-wait` of `cachefs mount` is also the variable
CACHEFS_OPEN_WAIT and the key `open-wait` in the section `[mount]` of the file; `cachefs up` takes its own keys from
`[up]`, and those of the processes it starts from `[mount]`, `[worker]` and `[master]`. The table `[ufs.options]` has
options of the under-store.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from cachefs.model import ConfigError, without_credentials

CONFIG_VARIABLE = "CACHEFS_CONFIG"
UFS_OPTIONS_VARIABLE = "CACHEFS_UFS_OPTIONS"
"""Environment variable with a JSON object of under-store options: unlike arguments, other users cannot see it."""

SECTIONS = {
    "up": ("up", "mount", "worker", "master"),
    "mount": ("mount",),
    "worker": ("worker",),
    "master": ("master",),
    "node-mounts": ("node-mounts", "mount"),
}
"""Command -> the sections of the file it looks into, in this order."""

_PER_CALL = {"config", "help", "json", "supervised", "ignore-kernel-feature", "ufs-option"}
"""Options that are not settings, or are set in ways of their own."""
_KUBERNETES = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_[0-9]+_.*)")
"""What a cluster puts into the environment of a pod for a service whose name begins like ours."""
_SECRET = re.compile("secret|key|token|password|passwd|credential|auth|sas", re.IGNORECASE)
_ORIGIN = "cachefs.cli.origin"


def key_of(option: click.Parameter) -> str:
    """How a setting is called in the file: as its flag, without the dashes."""
    return max(option.opts, key=len).lstrip("-")


def variable_of(option: click.Parameter) -> str:
    return "CACHEFS_" + key_of(option).upper().replace("-", "_")


def settings_of(command: click.Command) -> list[click.Option]:
    return [
        option
        for option in command.params
        if isinstance(option, click.Option) and key_of(option) not in _PER_CALL and not option.hidden
    ]


class SettingsFile:
    """A TOML file with sections of settings, or none."""

    def __init__(self, path: str | None, content: Mapping[str, Any]) -> None:
        self.path = path
        self._content = content

    def find(self, command: str, option: click.Parameter) -> tuple[str, Any] | None:
        """(section, value) of a setting of a command."""
        key = key_of(option)
        for section in SECTIONS[command]:
            values = self._content.get(section, {})
            if key in values:
                return section, values[key]
        return None

    @property
    def ufs_options(self) -> dict[str, str]:
        found: dict[str, str] = self._content.get("ufs", {}).get("options", {})
        return found


def default_path() -> str | None:
    """The user's own file if there is one, or else the machine's."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    for path in (os.path.join(base, "cachefs", "cachefs.toml"), "/etc/cachefs/cachefs.toml"):
        if os.path.exists(path):
            return path
    return None


def load_settings(path: str | None, commands: Mapping[str, click.Command]) -> SettingsFile:
    """Read and check the whole file, whichever command is run. `commands` has those of `SECTIONS`.

    Raises ConfigError for a file that cannot be read, an unknown section or key.
    """
    if path is None:
        return SettingsFile(None, {})
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError("--config", path, f"a TOML file that can be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("--config", path, f"a TOML file ({error})") from error
    for section, values in content.items():
        known = [*SECTIONS, "ufs"]
        if section not in known or not isinstance(values, dict):
            raise ConfigError(f"{path}: section", f"[{section}]", _one_of(section, known))
        if section == "ufs":
            _check_ufs(path, values)
            continue
        keys = [key_of(option) for option in settings_of(commands[section])]
        for key in values:
            if key not in keys:
                raise ConfigError(f"{path}: key in [{section}]", key, _one_of(key, keys))
    return SettingsFile(path, content)


def _check_ufs(path: str, values: Mapping[str, Any]) -> None:
    for key in values:
        if key != "options":
            raise ConfigError(f"{path}: key in [ufs]", key, "options, a table")
    options = values.get("options", {})
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: options in [ufs]", "(not shown)", "a table of texts")
    for name, value in options.items():
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {name} in [ufs.options]", "(not shown)", "a text")


def _one_of(wrong: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(wrong, known, n=1)
    return f"{nearest[0]}, which is the nearest to it" if nearest else f"one of {', '.join(sorted(known))}"


def check_environment(commands: Mapping[str, click.Command], environment: Mapping[str, str] = os.environ) -> None:
    """A variable that looks like one of ours and is none would be ignored without a word. Raises ConfigError."""
    known = {variable_of(option) for command in commands.values() for option in settings_of(command)}
    known |= {CONFIG_VARIABLE, UFS_OPTIONS_VARIABLE}
    for name in environment:
        if not name.startswith("CACHEFS_") or name in known or _KUBERNETES.fullmatch(name):
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if nearest:
            raise ConfigError("environment variable", name, f"{nearest[0]}, which is the nearest to it")


def is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None


class NotAccepted(click.BadParameter):
    """By one of our own types: with what is."""

    def __init__(
        self, value: object, accepted: str, ctx: click.Context | None = None, param: click.Parameter | None = None
    ) -> None:
        super().__init__(f"{value!r} is not accepted; expected {accepted}", ctx, param)
        self.accepted = accepted


def accepted_by(kind: click.ParamType[Any], error: click.BadParameter) -> str:
    """What would have been right, so that it can follow "expected"."""
    if isinstance(error, NotAccepted):
        return error.accepted
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    if isinstance(kind, click.IntRange):
        return f"{kind.min} to {kind.max}" if kind.max is not None else f"a whole number of at least {kind.min}"
    return f"another value: {error.message.rstrip('.')}"


class Configured(click.Command):
    """A command whose settings can come from the environment and from a file too."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for option in settings_of(self):
            option.envvar = variable_of(option)
        self.params.append(
            click.Option(
                ["--config"],
                metavar="FILE",
                expose_value=False,
                help=f"TOML file with settings; also {CONFIG_VARIABLE}. Default: cachefs/cachefs.toml in the user's "
                "directory for configuration, or else /etc/cachefs/cachefs.toml. `cachefs config show` tells what "
                "comes from where.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Those who are started by `up` are told everything by it.
        is_told = (self.name != "up" and "--supervised" in args) or self.name == "mount-server"
        if not is_told and not ctx.resilient_parsing:
            commands = _configured_commands()
            check_environment(commands)
            file = load_settings(_config_argument(args) or os.environ.get(CONFIG_VARIABLE) or default_path(), commands)
            apply_file(ctx, self, file)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter:
            raise  # It has a message of its own, made when it is shown.
        except click.BadParameter as error:
            where = origin(ctx, error.param) if error.param is not None else None
            if where is not None and where != "flag":
                message = f"{error.message.rstrip('.')} (from {where})"
                raise click.BadParameter(message, ctx, error.param) from error
            raise


def apply_file(ctx: click.Context, command: click.Command, file: SettingsFile) -> None:
    """What the file says becomes the defaults of this call. Raises ConfigError for values of the wrong kind."""
    defaults: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in settings_of(command):
        found = file.find(command.name or "", option)
        if found is None or option.name is None:
            continue
        section, value = found
        where = f"{file.path}: {key_of(option)} in [{section}]"
        defaults[option.name] = _as_flag(where, option, value)
        origins[option.name] = where
    ctx.default_map = defaults
    ctx.meta[_ORIGIN] = origins
    ctx.meta[UFS_OPTIONS_VARIABLE] = file.ufs_options


def _as_flag(where: str, option: click.Option, value: Any) -> Any:
    """As it would be written on the command line."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise ConfigError(where, value, "true or false")
        return value
    if option.multiple:
        values = value if isinstance(value, list) else [value]
        return [_as_text(where, each) for each in values]
    return _as_text(where, value)


def _as_text(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(where, value, "a text or a number")
    return str(value)


def origin(ctx: click.Context, param: click.Parameter) -> str:
    """Where the value of a setting came from."""
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return variable_of(param)
    if source is ParameterSource.DEFAULT_MAP:
        found: str = ctx.meta[_ORIGIN][param.name]
        return found
    return "flag" if source is ParameterSource.COMMANDLINE else "default"


def _config_argument(args: Sequence[str]) -> str | None:
    """Wanted before anything else is parsed."""
    for index, each in enumerate(args):
        if each == "--config" and index + 1 < len(args):
            return args[index + 1]
        if each.startswith("--config="):
            return each.removeprefix("--config=")
    return None


def _configured_commands() -> dict[str, click.Command]:
    from cachefs.cli.main import load_command

    return {name: load_command(name) for name in SECTIONS}


def configured_commands() -> dict[str, click.Command]:
    """Those of `SECTIONS`."""
    return _configured_commands()


def effective(ctx: click.Context, command: click.Command) -> Iterator[tuple[click.Option, Any, str]]:
    """(setting, value as a program sees it, where it came from) of a command that is not run."""
    for option in settings_of(command):
        value, source = option.consume_value(ctx, {})
        ctx.set_parameter_source(option.name or "", source)
        where = origin(ctx, option)
        try:
            converted = option.process_value(ctx, value)
        except click.MissingParameter:
            converted, where = None, "nowhere: it has to be given"
        except click.BadParameter as error:
            shown = without_credentials(value) if isinstance(value, str) else value
            raise ConfigError(where, shown, accepted_by(option.type, error)) from error
        # For what has no value, click has a mark of its own.
        yield option, None if type(converted).__module__.startswith("click.") else converted, where
