"""What was given as a secret appears in no log and in no answer, also where an error quotes the value it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from cachefs.model import without_credentials

REDACTED = "***"
_PUBLIC = frozenset({"endpoint_url", "AWS_ENDPOINT_URL", "region", "region_name", "AWS_REGION", "AWS_DEFAULT_REGION"})
"""Stand in Secrets beside what is secret, and are what one wants to read in an error."""
_OPTION = "ufs."
_FEWEST = 4
"""Characters; shorter ones count as words only: "1" would be found in every number."""


def secret_values(secrets: Mapping[str, str], given: Mapping[str, str] | None = None) -> set[str]:
    """Of a Secret, and of the parameters or attributes beside it, where options of an under-store may be secret too."""
    options = {key.removeprefix(_OPTION): value for key, value in (given or {}).items() if key.startswith(_OPTION)}
    found = (value for each in (secrets, options) for key, value in each.items() if key not in _PUBLIC)
    return {value for value in found if value}


def shown_map(given: Mapping[str, str]) -> dict[str, str]:
    """Parameters or attributes as they may be logged."""
    return {
        key: REDACTED
        if key.startswith(_OPTION) and key.removeprefix(_OPTION) not in _PUBLIC
        else without_credentials(value)
        for key, value in sorted(given.items())
    }


def redacted(text: str, secrets: Iterable[str]) -> str:
    """The text without these values, as they are, as Python quotes them, and as URLs do; and without what stands in
    front of the host in a URL.
    """
    forms = {form for each in secrets for form in (each, repr(each)[1:-1], quote(each), quote(each, safe="")) if form}
    for form in sorted(forms, key=len, reverse=True):
        pattern = re.escape(form)
        if len(form) < _FEWEST:
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, REDACTED, text)
    return without_credentials(text)
