"""URLs as they may be shown."""

from __future__ import annotations

import re


def without_credentials(url: str) -> str:
    """What is before an @ in the place of the host may be secret."""
    return re.sub(r"(?<=://)[^/@]*@", "***@", url)
