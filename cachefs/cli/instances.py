"""What `cachefs up` runs on this machine, so that other commands find it; and where it keeps things."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from cachefs.model import ConfigError


@dataclass(frozen=True)
class Instance:
    pid: int
    url: str
    mountpoint: str
    master: str
    worker_socket: str
    state_dir: str


def state_root() -> str:
    """Where caches are kept for the next time: /var/cache/cachefs for root, else in the user's cache directory."""
    if os.geteuid() == 0:
        return "/var/cache/cachefs"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "cachefs")


def runtime_root() -> str:
    """Where sockets and the records of running instances are: short paths, gone after a reboot, this user's alone.

    Raises ConfigError when it cannot be had.
    """
    if os.geteuid() == 0:
        path = "/run/cachefs"
    elif os.environ.get("XDG_RUNTIME_DIR"):
        path = os.path.join(os.environ["XDG_RUNTIME_DIR"], "cachefs")
    else:
        path = f"/tmp/cachefs-{os.geteuid()}"
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        status = os.stat(path, follow_symlinks=False)
    except OSError as error:
        raise ConfigError("runtime directory", path, f"a directory that can be made ({error.strerror})") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError("runtime directory", path, "a directory that belongs to this user alone")
    if not os.access(path, os.W_OK):
        raise ConfigError("runtime directory", path, "a directory that can be written; its file system is read-only")
    return path


def instance_name(url: str) -> str:
    """A directory name for what belongs to one URL: readable, and never the same for two."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", url).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


@contextmanager
def worker_socket(name: str) -> Iterator[str]:
    """A path for the socket of a worker of this process. What killed processes left behind is removed."""
    directory = runtime_root()
    for path in glob.glob(os.path.join(glob.escape(directory), "*-*.sock")):
        pid = path.rpartition("-")[2].removesuffix(".sock")
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with suppress(FileNotFoundError):
                os.unlink(path)
    path = os.path.join(directory, f"{name[-8:]}-{os.getpid()}.sock")
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


@contextmanager
def recorded(instance: Instance) -> Iterator[None]:
    """The instance can be found for as long as the block lasts."""
    path = os.path.join(_records(), f"{instance.pid}.json")
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(asdict(instance), file)
    os.rename(path + ".new", path)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def running() -> list[Instance]:
    """Those whose process lives; records of killed ones are removed."""
    found = []
    for name in sorted(os.listdir(_records())):
        path = os.path.join(_records(), name)
        if not name.endswith(".json"):
            continue
        try:
            with open(path, encoding="utf-8") as file:
                instance = Instance(**json.load(file))
            os.kill(instance.pid, 0)
        except (ValueError, TypeError, ProcessLookupError, FileNotFoundError):
            with suppress(FileNotFoundError):
                os.unlink(path)
        except PermissionError:
            found.append(instance)
        else:
            found.append(instance)
    return found


def the_running_one() -> Instance:
    """Raises ConfigError unless there is exactly one."""
    instances = running()
    if not instances:
        raise ConfigError("--master", "not given", "HOST:PORT; no `cachefs up` runs on this machine")
    if len(instances) > 1:
        listed = ", ".join(f"{each.master} ({each.url} on {each.mountpoint})" for each in instances)
        raise ConfigError("--master", "not given", f"one of {listed}")
    return instances[0]


def _records() -> str:
    path = os.path.join(runtime_root(), "instances")
    os.makedirs(path, 0o700, exist_ok=True)
    return path
