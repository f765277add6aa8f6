"""FTP by fsspec, without what would lose names: fsspec takes a server's refusal to list for an empty directory."""

from __future__ import annotations

import ftplib
from typing import Any

from fsspec.implementations.ftp import FTPFileSystem

_UNKNOWN_COMMAND = ("500", "502", "504")


class Ftp(FTPFileSystem):  # type: ignore[misc]
    """Raises FileNotFoundError only for what the server says is missing, from the server's answer."""

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        full = self._strip_protocol(path)
        try:
            found = [_entry(f"{full.rstrip('/')}/{name}", facts) for name, facts in self.ftp.mlsd(full)]
        except ftplib.error_perm as error:
            if str(error).startswith(_UNKNOWN_COMMAND):
                # An old server: read what it prints for people, by fsspec's ways.
                found = super().ls(path, True, **kwargs)
            else:
                raise FileNotFoundError(full) from error
        found = [each for each in found if each["type"] not in ("cdir", "pdir")]
        return found if detail else sorted(each["name"] for each in found)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        full = self._strip_protocol(path)
        try:
            answer = self.ftp.sendcmd(f"MLST {full}")
        except ftplib.error_perm as error:
            if str(error).startswith(_UNKNOWN_COMMAND):
                found: dict[str, Any] = super().info(path, **kwargs)
                return found
            raise FileNotFoundError(full) from error
        facts, _, _ = answer.splitlines()[1].strip().partition(" ")
        pairs = (fact.partition("=") for fact in facts.rstrip(";").split(";"))
        return _entry(full, {name.lower(): value for name, _, value in pairs})


def _entry(full: str, facts: dict[str, str]) -> dict[str, Any]:
    kind = {"dir": "directory"}.get(facts["type"].lower(), facts["type"].lower())
    size = int(facts["size"]) if "size" in facts else None
    return {**facts, "name": full, "type": kind, "size": size}
