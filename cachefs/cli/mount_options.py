"""The flags that `cachefs mount` and `cachefs up` share: how the file system behaves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import click

from cachefs.cli import params
from cachefs.cli.settings import key_of
from cachefs.client import ClientConfig, Timeouts
from cachefs.fuse import Driver, MountConfig, MountOptions, OpenMode, OperationsConfig, SessionOptions
from cachefs.fusewire import PAGE_SIZE, InitFlag, InitOptions
from cachefs.model import ConfigError, KiB, TiB, div_up, format_duration, write_size
from cachefs.net import Address, TcpAddress

PROFILES: dict[str, dict[str, Any]] = {
    "training": {
        "attr_timeout": 2 * 3600.0,
        "entry_timeout": 2 * 3600.0,
        "negative_timeout": 2 * 3600.0,
        "read_ahead": 8 << 20,
    }
}
"""Other defaults, by the parameters of `mount_options`. What is asked for by name goes before them."""

MAX_PATIENCE_S = 3600.0

_OPTIONS = (
    click.option("--path", default="/", show_default=True, help="Directory of the namespace to mount."),
    click.option(
        "--profile",
        type=click.Choice(list(PROFILES)),
        help="Other defaults. training: names and attributes are believed for 2 hours, and 8M are read ahead.",
    ),
    click.option(
        "--driver",
        type=click.Choice([driver.value for driver in Driver]),
        default=Driver.KERNEL.value,
        show_default=True,
        help="What speaks to the kernel. pyfuse3: libfuse, for comparison; in cached mode only, and slower. It needs "
        "the extra cachefs[pyfuse3].",
    ),
    click.option(
        "--open-mode",
        type=click.Choice([mode.value for mode in OpenMode]),
        default=OpenMode.AUTO.value,
        show_default=True,
        help="How files are opened. auto: by passthrough where it is possible. no-open: without asking this process, "
        "for data that never changes.",
    ),
    click.option(
        "--open-wait",
        type=params.SIZE,
        default="8M",
        show_default=True,
        help="Files up to this size are made local before their open returns; 0 to 1G.",
    ),
    click.option(
        "--max-read",
        type=params.SIZE,
        default="1M",
        show_default=True,
        help="Bytes in one READ of the kernel, in cached mode; from 4K to what the sysctl fs.fuse.max_pages_limit "
        "allows.",
    ),
    click.option(
        "--read-ahead",
        type=params.SIZE,
        default="1M",
        show_default=True,
        help="How far the kernel reads ahead of a sequential reader, in cached mode; 0, or 4K to 1T, in whole pages.",
    ),
    click.option(
        "--max-background",
        type=click.IntRange(1, 65535),
        default=InitOptions.max_background,
        show_default=True,
        help="READs that the kernel sends ahead of readers at once, in cached mode.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        default=MountConfig.threads,
        show_default=True,
        help="Threads for reads of cached files that have to wait for a disk, in cached mode.",
    ),
    click.option(
        "--attr-timeout",
        type=params.DURATION,
        show_default="--sync-interval",
        help="How long sizes and times are believed without asking the master; 0 to 365d.",
    ),
    click.option(
        "--entry-timeout",
        type=params.DURATION,
        show_default="--sync-interval",
        help="The same for what a name points at.",
    ),
    click.option(
        "--negative-timeout",
        type=params.DURATION,
        show_default="--sync-interval",
        help="The same for names that do not exist.",
    ),
    click.option(
        "--metadata-cache-entries",
        type=click.IntRange(min=1000),
        default=ClientConfig.metadata_cache_entries,
        show_default=True,
        help="Names and attributes that the mount remembers, some 300 bytes each.",
    ),
    click.option(
        "--allow-other/--no-allow-other",
        default=None,
        show_default="allowed; for users who are not root, if /etc/fuse.conf has user_allow_other",
        help="Whether others than the user who mounts may use the mount.",
    ),
    click.option("--uid", type=click.IntRange(0, 2**32 - 2), help="Owner of everything, as the mount shows it."),
    click.option("--gid", type=click.IntRange(0, 2**32 - 2), help="Group of everything, as the mount shows it."),
    click.option(
        "--umask", type=params.OCTAL, default="000", show_default=True, help="Permission bits that nobody gets, octal."
    ),
    click.option(
        "--xattr",
        is_flag=True,
        help="Show user.cachefs.key, .cached_bytes, .tier, .workers of files (getfattr -d). `ls -l` takes longer then.",
    ),
    click.option(
        "--hung-after",
        type=params.DURATION,
        default="10s",
        show_default=True,
        help="A server of the mount that gives no sign of life for so long is killed, and another goes on; 2s to 10m.",
    ),
    click.option(
        "--patience",
        type=params.DURATION,
        default="30s",
        show_default=True,
        help="How long what is not remembered or cached waits for a master or worker that is away, before its reader "
        "gets an error (ETIMEDOUT); 0 to 1h.",
    ),
    click.option("--allow-nonempty", is_flag=True, help="Mount over a directory that has entries."),
    click.option(
        "--ignore-kernel-feature",
        type=click.Choice([flag.name.lower().replace("_", "-") for flag in InitFlag if flag.name]),
        multiple=True,
        hidden=True,
        help="Do as if the kernel did not offer it.",
    ),
)


def mount_options(function: params.F) -> params.F:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


OF_A_VOLUME = (
    *("profile", "open_mode", "open_wait", "max_read", "read_ahead", "attr_timeout", "entry_timeout"),
    *("negative_timeout", "metadata_cache_entries", "uid", "gid", "umask", "xattr", "patience"),
)
"""What whoever asks a node's mount service for a mount may choose. The rest is the node's affair."""


def options_named(names: Iterable[str] | None = None) -> list[click.Option]:
    """Those of `mount_options` with these names, or all of them, in their order."""

    def nothing() -> None:
        pass

    found: list[click.Option] = list(reversed(mount_options(nothing).__click_params__))  # type: ignore[attr-defined]
    return [option for option in found if names is None or option.name in names]


def arguments_of(options: Mapping[str, str]) -> list[str]:
    """Options of a volume, by the names of flags without dashes in front, as arguments of `cachefs mount`.

    Raises ConfigError, naming the option, for one that a volume does not have or a value that will not do.
    """
    known = {key_of(option): option for option in options_named(OF_A_VOLUME)}
    arguments = []
    for name, value in options.items():
        option = known.get(name)
        if option is None:
            raise ConfigError(name, value, f"one of {', '.join(known)}")
        if option.is_flag:
            if value not in ("", "true", "false"):
                raise ConfigError(name, value, "true or false")
            arguments += [f"--{name}"] if value != "false" else []
            continue
        argument = f"--{name}={value}"
        try:
            click.Command("volume", params=[option]).make_context("volume", [argument])
        except click.UsageError as error:
            raise ConfigError(name, value, error.format_message()) from error
        arguments.append(argument)
    flags = click.Command("volume", params=[*options_named()]).make_context("volume", list(arguments)).params
    mount_config("/", TcpAddress("127.0.0.1", 0), None, flags, check_machine=False)
    return arguments


def with_profile(ctx: click.Context, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `mount_options` with the defaults of the profile that was asked for."""
    found = dict(flags)
    for name, value in PROFILES.get(flags["profile"] or "", {}).items():
        if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            found[name] = value
    found["profile"] = None
    return found


def mount_config(
    mountpoint: str,
    master: Address,
    worker_socket: str | None,
    flags: Mapping[str, Any],
    *,
    promote: str | None = None,
    check_machine: bool = True,
) -> MountConfig:
    """Raises ConfigError, with the name of the flag, for what is wrong or (`check_machine`) cannot be had here."""
    read_ahead = flags["read_ahead"]
    if read_ahead > TiB or 0 < read_ahead < PAGE_SIZE:
        accepted = f"0, or {write_size(PAGE_SIZE)} to 1T: the kernel reads ahead in whole pages"
        raise ConfigError("--read-ahead", write_size(read_ahead), accepted)
    if not 2 <= flags["hung_after"] <= 600:
        raise ConfigError("--hung-after", format_duration(flags["hung_after"]), "2s to 10m")
    if not 0 <= flags["patience"] <= MAX_PATIENCE_S:
        raise ConfigError("--patience", format_duration(flags["patience"]), "0 to 1h")
    ignored = 0
    for name in flags["ignore_kernel_feature"]:
        ignored |= InitFlag[name.upper().replace("-", "_")]
    try:
        config = MountConfig(
            mountpoint=os.path.abspath(mountpoint),
            client=ClientConfig(
                master,
                worker_socket,
                metadata_cache_entries=flags["metadata_cache_entries"],
                timeouts=Timeouts(flags["attr_timeout"], flags["entry_timeout"], flags["negative_timeout"]),
                patience_s=flags["patience"],
                promote=promote,  # type: ignore[arg-type]
            ),
            source=f"cachefs:{flags['path']}",
            path=flags["path"],
            options=MountOptions(
                allow_other=flags["allow_other"],
                max_read=flags["max_read"],
                read_ahead_kb=div_up(read_ahead, PAGE_SIZE) * PAGE_SIZE // KiB,
                allow_nonempty=flags["allow_nonempty"],
            ),
            operations=OperationsConfig(
                open_wait_bytes=flags["open_wait"],
                open_mode=OpenMode(flags["open_mode"]),
                uid=flags["uid"],
                gid=flags["gid"],
                umask=flags["umask"],
            ),
            session=SessionOptions(
                InitOptions(max_background=flags["max_background"], ignored=ignored), xattr=flags["xattr"]
            ),
            threads=flags["threads"],
            driver=Driver(flags["driver"]),
        )
        if check_machine:
            config.check_machine()
        return config
    except ConfigError as error:
        raise by_flag(error) from None


def check_settings(
    found: Iterable[tuple[click.Option, Any, str]], *, check_machine: bool = False
) -> list[tuple[click.Option, Any, str]]:
    """What `settings.effective` found for `cachefs up` or `mount`, which checks each value by itself only.

    Raises ConfigError, naming where the value came from.
    """
    listed = list(found)
    flags = {option.name or "": value for option, value, _ in listed}
    flags["ignore_kernel_feature"] = ()
    try:
        mount_config("/", TcpAddress("127.0.0.1", 0), None, flags, check_machine=check_machine)
    except ConfigError as error:
        origins = {f"--{key_of(option)}": where for option, _, where in listed if where != "default"}
        raise ConfigError(origins.get(error.key, error.key), error.value, error.accepted) from error
    return listed


def by_flag(error: ConfigError) -> ConfigError:
    """What is wrong with a field of a MountConfig, as something wrong with the flag or argument it came from."""
    key = "MOUNTPOINT" if error.key == "mountpoint" else "--" + error.key.removeprefix("--").replace("_", "-")
    return ConfigError(key, error.value, error.accepted)


def as_arguments(flags: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags as a child process is told them: each one that has a value, so that it decides nothing by itself."""
    arguments: list[str] = []
    for name, value in flags.items():
        option = "--" + name.replace("_", "-")
        if name == "allow_other" and value is not None:
            arguments.append(option if value else "--no-allow-other")
        elif value is True:
            arguments.append(option)
        elif value is None or value is False:
            continue
        elif name == "umask":
            arguments += [option, f"{value:o}"]
        elif name in ("hung_after", "patience", "attr_timeout", "entry_timeout", "negative_timeout"):
            arguments += [option, format_duration(value)]
        elif isinstance(value, tuple):
            for each in value:
                arguments += [option, str(each)]
        else:
            arguments += [option, str(value)]
    return tuple(arguments)
