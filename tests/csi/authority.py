"""Certificates and tokens for the processes of a test."""

from __future__ import annotations

import re
from pathlib import Path

import trustme

from cachefs.net import Role, copy_tokens, new_tokens


class Authority:
    """Certificates as the chart has them made, and tokens beside them."""

    def __init__(self, directory: Path, address: str = "127.0.0.1") -> None:
        """`directory`: made for its files. `address`: of master and workers."""
        directory.mkdir()
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = directory / "ca.crt"
        self.authority.cert_pem.write_to_path(str(self.ca))
        # Of workers and mounts no name is ever looked at here: nobody connects to the latter, nor to another worker.
        for name in ("master", "worker", "client"):
            made = self.authority.issue_cert(address if name != "client" else "client")
            made.private_key_pem.write_to_path(str(directory / f"{name}.key"))
            for number, each in enumerate(made.cert_chain_pems):
                each.write_to_path(str(directory / f"{name}.crt"), append=number > 0)

    def make_tokens(self) -> None:
        """As `cachefs token new` and `copy`."""
        whole = str(self.directory / "master.toml")
        new_tokens(whole, list(Role))
        roles = {"worker": [Role.CLIENT, Role.WORKER], "client": [Role.CLIENT], "admin": [Role.CLIENT, Role.ADMIN]}
        for name, its in roles.items():
            copy_tokens(whole, str(self.directory / f"{name}.toml"), its)

    def flags(self, role: str, tls: Authority | None = None) -> list[str]:
        """`tls`: the authority of its certificates, if it is another."""
        place = (tls or self).directory
        certificate = "client" if role == "admin" else role
        return [
            f"--tokens={self.directory / role}.toml",
            f"--tls-cert={place / certificate}.crt",
            f"--tls-key={place / certificate}.key",
            f"--tls-ca={place / 'ca.crt'}",
        ]

    def secrets(self) -> list[str]:
        """The tokens."""
        return re.findall('"(.+)"', (self.directory / "master.toml").read_text())
