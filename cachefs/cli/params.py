"""Types and options that several commands share."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from cachefs.cli.settings import UFS_OPTIONS_VARIABLE, NotAccepted
from cachefs.model import ConfigError, check_page_size, format_duration, parse_duration, parse_size, write_size
from cachefs.net import Address, parse_address
from cachefs.policy import parse_labels
from cachefs.store import TierConfig, parse_keep_free, parse_tier

F = TypeVar("F", bound=Callable[..., Any])


class _Parsed(click.ParamType[Any]):
    """A type whose parser raises ConfigError, and whose values can be written so that it reads them again."""

    def __init__(
        self, name: str, parse: Callable[[str, str], object], write: Callable[[Any], str] = str, *, number: bool = False
    ) -> None:
        """`number`: what is parsed is one, for programs that want it."""
        self.name = name
        self.write = write
        self.is_number = number
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        key = param.opts[0] if param is not None else self.name
        try:
            return self._parse(key, value)
        except ConfigError as error:
            raise NotAccepted(error.value, error.accepted, ctx, param) from error


def _address(key: str, text: str) -> Address:
    try:
        return parse_address(text)
    except ConfigError as error:
        raise ConfigError(key, text, error.accepted) from error


def _tier(key: str, text: str) -> TierConfig:
    return parse_tier(text, key)


def _key_value(key: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(key, text, "NAME=VALUE")
    return name, value


def _label(key: str, text: str) -> tuple[str, str]:
    ((name, value),) = parse_labels(key, [text]).items()
    return name, value


def _host_mount(key: str, text: str) -> tuple[str, str]:
    path, separator, mountpoint = text.partition("=")
    if not separator or not path.startswith("/") or not mountpoint.startswith("/"):
        raise ConfigError(key, text, "PATH=MOUNTPOINT, both absolute, such as /imagenet=/mnt/imagenet")
    return path, mountpoint


def _mount(key: str, text: str) -> tuple[str, str]:
    path, equals, url = text.partition("=")
    if not equals or not path.startswith("/") or "://" not in url:
        raise ConfigError(key, text, "PATH=URL, such as /=s3://bucket/prefix or /data=file:///srv/data")
    return path, url


def _sync_interval(key: str, text: str) -> float:
    if text.strip() == "-1":
        return -1.0
    try:
        return parse_duration(key, text)
    except ConfigError as error:
        raise ConfigError(key, text, f"{error.accepted}; 0 for always, or -1 for never") from error


def written_sync_interval(seconds: float) -> str:
    """What SYNC_INTERVAL reads."""
    return "-1" if seconds < 0 else format_duration(seconds)


def _page_size(key: str, text: str) -> int:
    page_size = parse_size(key, text)
    try:
        check_page_size(page_size, key)
    except ConfigError as error:
        raise ConfigError(key, text, error.accepted) from error
    return page_size


def _octal(key: str, text: str) -> int:
    if not re.fullmatch("0?[0-7]{1,3}", text):
        raise ConfigError(key, text, "an octal number from 000 to 777")
    return int(text, 8)


def written(kind: click.ParamType[Any], value: Any) -> str:
    """A value of an option as a person writes it on the command line or in the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return kind.write(value) if isinstance(kind, _Parsed) else str(value)


def is_number(kind: click.ParamType[Any]) -> bool:
    return isinstance(kind, click.types.IntParamType) or (isinstance(kind, _Parsed) and kind.is_number)


def written_tier(tier: TierConfig) -> str:
    return f"{tier.kind}:{tier.path}:{write_size(tier.capacity_bytes)}"


SIZE = _Parsed("SIZE", parse_size, write_size, number=True)
RATE = _Parsed("RATE", lambda key, text: parse_size(key, text.removesuffix("/s")), write_size, number=True)
PAGE_SIZE = _Parsed("SIZE", _page_size, write_size, number=True)
DURATION = _Parsed("DURATION", parse_duration, format_duration, number=True)
SYNC_INTERVAL = _Parsed("DURATION", _sync_interval, written_sync_interval, number=True)
ADDRESS = _Parsed("HOST:PORT", _address)
TIER = _Parsed("KIND:DIR:SIZE", _tier, written_tier)
KEEP_FREE = _Parsed("SIZE|PERCENT", parse_keep_free)
OCTAL = _Parsed("OCTAL", _octal, lambda value: f"{value:03o}")
KEY_VALUE = _Parsed("NAME=VALUE", _key_value, "=".join)
MOUNT = _Parsed("PATH=URL", _mount, "=".join)
HOST_MOUNT = _Parsed("PATH=MOUNTPOINT", _host_mount, "=".join)
LABEL = _Parsed("NAME=VALUE", _label, "=".join)


def ufs_option(function: F) -> F:
    return click.option(
        "ufs_options",
        "--ufs-option",
        type=KEY_VALUE,
        multiple=True,
        help="Option of the under-store, such as endpoint_url=http://host:9000; repeatable. "
        f"Secrets are better kept in the environment: AWS_* as usual, or a JSON object in {UFS_OPTIONS_VARIABLE}.",
    )(function)


def collect_ufs_options(given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """From the file, the environment and the command line, the last of them first. Raises ConfigError."""
    text = os.environ.get(UFS_OPTIONS_VARIABLE, "{}")
    accepted = 'a JSON object of texts, such as {"endpoint_url": "http://host:9000"}'
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(UFS_OPTIONS_VARIABLE, "(not shown)", accepted) from error
    if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
        raise ConfigError(UFS_OPTIONS_VARIABLE, "(not shown)", accepted)
    ctx = click.get_current_context(silent=True)
    from_file = ctx.meta.get(UFS_OPTIONS_VARIABLE, {}) if ctx is not None else {}
    return {**from_file, **options, **dict(given)}


def label_option(function: F) -> F:
    return click.option(
        "labels",
        "--label",
        type=LABEL,
        multiple=True,
        help="Where this is, such as rack=r7 or zone=a; repeatable. What is nearer is read from first: on the same "
        "host, in the same rack, in the same zone. host is the name of the host unless it is given.",
    )(function)


def collect_labels(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """With that of the host. Raises ConfigError for two values of one name."""
    labels = parse_labels("--label", map("=".join, given))
    name = platform.node()
    return {"host": name, **labels} if name else labels


def json_option(function: F) -> F:
    return click.option("as_json", "--json", is_flag=True, help="Print JSON instead of text.")(function)


def absolute(path: str) -> str:
    """A path of the namespace, for every command alike: `big` is `/big`, as there is no directory to be in."""
    return "/" + "/".join(part for part in path.split("/") if part)


def all_absolute(paths: Iterable[str]) -> list[str]:
    return [absolute(path) for path in paths]


def reason_of(path: str, error: Exception) -> str:
    """What went wrong with a path, for a list where the path stands in front of it already."""
    return str(error).removeprefix(f"{path}: ")
