"""What a node's mount service was asked for, in files: one for each mount, so that the next service goes on with it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator

import msgspec

from cachefs.model import ConfigError

logger = logging.getLogger(__name__)

VERSION = 1
_SUFFIX = ".json"


class MountRecord(msgspec.Struct, frozen=True):
    """Newer versions may add to it."""

    id: str
    mountpoint: str
    path: str
    options: dict[str, str] = {}
    version: int = VERSION


class MountRecords:
    """A directory of this user's alone. Files are whole or not there, and on the disk when a method returns."""

    def __init__(self, directory: str) -> None:
        """Raises ConfigError."""
        self._directory = directory
        try:
            os.makedirs(directory, 0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError("--state-dir", directory, f"a directory that can be made ({error.strerror})") from error
        if not os.access(directory, os.W_OK):
            raise ConfigError("--state-dir", directory, "a directory that can be written")

    def load(self) -> Iterator[MountRecord]:
        """What cannot be read is set aside, under a name that is not looked at again."""
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            if not name.endswith(_SUFFIX):
                continue
            try:
                with open(path, "rb") as file:
                    record = msgspec.json.decode(file.read(), type=MountRecord)
                if record.version != VERSION or name != self._name(record.mountpoint):
                    raise ValueError(f"it is of version {record.version} for {record.mountpoint}")
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                logger.error("set aside, a mount that cannot be read path=%s error=%s", path, error)
                os.replace(path, f"{path}.unreadable")
                continue
            yield record

    def save(self, record: MountRecord) -> None:
        """Raises OSError."""
        path = os.path.join(self._directory, self._name(record.mountpoint))
        new = f"{path}.{os.getpid()}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        self._sync()

    def remove(self, mountpoint: str) -> None:
        """One that is not there is no error. Raises OSError."""
        try:
            os.unlink(os.path.join(self._directory, self._name(mountpoint)))
        except FileNotFoundError:
            return
        self._sync()

    def _sync(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _name(mountpoint: str) -> str:
        return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32] + _SUFFIX
