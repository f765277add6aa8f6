"""What a volume is made of: parameters of a StorageClass, attributes of a static or inline volume, and secrets."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cachefs_csi.codes import CallError, Code, invalid

_KUBERNETES = "csi.storage.k8s.io/"
"""Prefix of what Kubernetes adds by itself."""
_OPTION = "ufs."
_PVC = {"pvc.name": _KUBERNETES + "pvc/name", "pvc.namespace": _KUBERNETES + "pvc/namespace"}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")

# Secrets are often made for programs of AWS.
_SECRET_NAMES = {
    "AWS_ACCESS_KEY_ID": "key",
    "access_key_id": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "secret_access_key": "secret",
    "AWS_SESSION_TOKEN": "token",
    "session_token": "token",
    "AWS_ENDPOINT_URL": "endpoint_url",
}


@dataclass(frozen=True)
class Source:
    """An under-store by its URL, or a directory of the namespace by its path."""

    url: str = ""
    path: str = ""
    options: dict[str, str] = field(default_factory=dict, repr=False)
    """Of the under-store; with what was secret."""
    has_quota: bool = True
    """Whether the size of the volume bounds what its contents take in the caches."""


def source_of(given: Mapping[str, str], secrets: Mapping[str, str], where: str, known: Iterable[str] = ()) -> Source:
    """Of parameters or attributes; `where` they stand, for messages, and `known`: others that are allowed there.

    Raises CallError (INVALID_ARGUMENT) naming what is wrong.
    """
    accepted = ("url", "path", "subPath", "quota", *known)
    ours = {key: value for key, value in given.items() if not key.startswith(_KUBERNETES) and "/" not in key}
    options = {key.removeprefix(_OPTION): value for key, value in ours.items() if key.startswith(_OPTION)}
    unknown = sorted(key for key in ours if not key.startswith(_OPTION) and key not in accepted)
    if unknown:
        raise invalid(f"{where}.{unknown[0]}", ours[unknown[0]], f"one of {', '.join(accepted)}, {_OPTION}NAME")
    url, path = ours.get("url", ""), ours.get("path", "")
    if bool(url) == bool(path):
        what = "both url and path" if url else "neither url nor path"
        raise CallError(Code.INVALID_ARGUMENT, f"{where}: {what} given; expected one of them")
    if path and not path.startswith("/"):
        raise invalid(f"{where}.path", path, "a directory of the namespace, such as /imagenet")
    if path and (options or secrets):
        raise CallError(Code.INVALID_ARGUMENT, f"{where}: {_OPTION}NAME and secrets are for a url; a path has its own")
    quota = ours.get("quota", "size")
    if quota not in ("size", "none"):
        raise invalid(f"{where}.quota", quota, "size or none")
    below = _sub_path(ours.get("subPath", ""), given, where)
    if below:
        url, path = (f"{url.rstrip('/')}/{below}" if url else ""), (posixpath.join(path, below) if path else "")
    return Source(url, path, {**options, **options_of_secrets(secrets)}, quota == "size")


def options_of_secrets(secrets: Mapping[str, str]) -> dict[str, str]:
    """The options of an under-store that a Secret holds: by their own names, or as programs of AWS call them."""
    return {_SECRET_NAMES.get(key, key): value for key, value in secrets.items()}


def _sub_path(template: str, given: Mapping[str, str], where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        key = _PVC.get(match[1])
        if key is None:
            raise invalid(f"{where}.subPath", template, "no other variables than ${pvc.name} and ${pvc.namespace}")
        if key not in given:
            message = f"{where}.subPath: ${{{match[1]}}} is not known; the provisioner needs --extra-create-metadata"
            raise CallError(Code.INVALID_ARGUMENT, message)
        return given[key]

    path = _VARIABLE.sub(value_of, template).strip("/")
    if path and any(each in ("", ".", "..") for each in path.split("/")):
        raise invalid(f"{where}.subPath", template, "names divided by /, none of them empty, . or ..")
    return path
