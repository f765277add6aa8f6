"""The reference of commands, flags, keys and variables, made from the commands: `python -m cachefs.cli.reference`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from cachefs.cli.main import COMMANDS, SUBCOMMANDS, load_command, load_group
from cachefs.cli.settings import SECTIONS, key_of, settings_of, variable_of

HEAD = """# Reference: commands, flags, keys, variables

Made by `python -m cachefs.cli.reference > docs/reference.md`; a test keeps it in step. What to set when is in
[tuning.md](tuning.md). A flag goes before its variable, that before the key in the TOML file, and that before the
default; `cachefs config show` tells what is in effect. `cachefs up` takes the keys of the processes it starts from
their sections too. Sizes take K, M, G, T (powers of 1024), durations ms, s, m, h, d.
"""


def reference() -> str:
    parts = [HEAD]
    for name in COMMANDS:
        parts.extend(_command(name, load_command(name)))
        if name in SUBCOMMANDS:
            parts.extend(_command(name, load_group(name)))
    return "\n".join(parts)


def _command(name: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from _command(f"{name} {each.name}", each)
        return
    with click.Context(command, info_name=f"cachefs {name}") as ctx:
        usage = " ".join([f"cachefs {name}", *command.collect_usage_pieces(ctx)])
        yield f"## {name}\n\n`{usage}`\n"
        yield (command.help or "").replace("\n\n", "\n\n").strip() + "\n"
        options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
        if not options:
            return
        keys = settings_of(command) if name in SECTIONS else []
        yield "| flag | accepts | default | key, variable | |"
        yield "|---|---|---|---|---|"
        for option in options:
            key = f"`[{name}] {key_of(option)}`, `{variable_of(option)}`" if option in keys else ""
            cells = (_flag(option), _accepts(option, ctx), _default(option), key, option.help or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""


def _flag(option: click.Option) -> str:
    return ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))


def _accepts(option: click.Option, ctx: click.Context) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{each}`" for each in option.type.choices)
    if isinstance(option.type, click.IntRange):
        low, high = option.type.min, option.type.max
        return f"{low} to {high}" if high is not None else f"{low} or more"
    text = option.make_metavar(ctx)
    return f"{text}, repeatable" if option.multiple else text


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return f"that of `{option.show_default}`" if option.show_default.startswith("--") else option.show_default
    default = option.default
    if option.is_flag and option.secondary_opts:
        return f"`{option.opts[0] if default else option.secondary_opts[0]}`"
    if option.is_flag or callable(default) or not isinstance(default, str | int | float):
        return ""
    return f"`{default}`"


if __name__ == "__main__":
    print(reference(), end="")
