"""URLs as they may be shown."""

from __future__ import annotations

import re

_CREDENTIALS = ("key", "pass", "secret", "token", "user")
"""What names of options contain that say who asks an under-store, and not which one it is or how it is asked."""


def is_credential(option: str) -> bool:
    """Whether the value of an option of an under-store may be secret, or goes with one that is."""
    return any(part in option.lower() for part in _CREDENTIALS)


def without_credentials(url: str) -> str:
    """What is before an @ in the place of the host may be secret."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)
