"""The file that tokens are kept in: TOML, a line for each role, readable by its owner alone."""

from __future__ import annotations

import os
import secrets
import stat
import tomllib
from collections.abc import Iterable, Mapping

from cachefs.model import ConfigError
from cachefs.wire import Role, Tokens

_KEY = "--tokens"
_MAX_FILE_BYTES = 64 * 1024
_RANDOM_BYTES = 32
_HEAD = "# Tokens of cachefs. Whoever can read a line has its role; see docs/operations.md.\n"


def load_tokens(path: str, key: str = _KEY) -> Tokens:
    """Raises ConfigError, which never shows what is in the file: `key` names the setting in it."""
    return Tokens(_read(path, key))


def new_tokens(path: str, roles: Iterable[Role]) -> None:
    """Make a file with random tokens. Raises ConfigError, also when there is something at that path."""
    _write(path, {role: secrets.token_urlsafe(_RANDOM_BYTES) for role in roles}, "FILE")


def copy_tokens(source: str, path: str, roles: Iterable[Role]) -> None:
    """Make a file with the tokens of some roles of another file. Raises ConfigError as the two above."""
    tokens = _read(source, "FILE")
    Tokens(tokens)
    wanted = list(roles)
    for role in wanted:
        if role not in tokens:
            raise ConfigError("--roles", str(role), f"roles that {source} has: {', '.join(sorted(tokens))}")
    _write(path, {role: tokens[role] for role in wanted}, "TO")


def _read(path: str, key: str) -> dict[Role, str]:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            _check_owner(path, key, status)
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(key, path, f"a file with tokens that can be read ({error.strerror})") from error
    try:
        content = tomllib.loads(data.decode()) if len(data) <= _MAX_FILE_BYTES else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # Without its cause, which may quote from the file.
        raise ConfigError(key, path, 'a TOML file with lines such as client = "TOKEN"') from None
    known = {str(role): role for role in Role}
    found: dict[Role, str] = {}
    for name, value in content.items():
        if name not in known:
            shown = name if len(name) <= len("a-short-one") else "a key (not shown)"
            raise ConfigError(f"{key} {path}: key", shown, f"one of {', '.join(known)}")
        if not isinstance(value, str):
            raise ConfigError(f"{key} {path}: {name}", "(not shown)", "a text")
        found[known[name]] = value
    if not found:
        raise ConfigError(key, path, f"a file with the token of at least one of {', '.join(known)}")
    return found


def _check_owner(path: str, key: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(key, path, "a file")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(key, path, f"a file of this user or of root, not of user {status.st_uid}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            key, path, f"a file that its owner alone can read: its mode is {mode:04o}, chmod 600 mends it"
        )


def _write(path: str, tokens: Mapping[Role, str], key: str) -> None:
    text = _HEAD + "".join(f'{role} = "{tokens[role]}"\n' for role in Role if role in tokens)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ConfigError(key, path, "a path where nothing is: no file is written over") from error
    except OSError as error:
        raise ConfigError(key, path, f"a path that can be written ({error.strerror})") from error
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        os.unlink(path)
        raise ConfigError(key, path, f"a path that can be written ({error.strerror})") from error
