"""Options of an under-store: texts from the command line, checked against what the store accepts."""

from __future__ import annotations

from collections.abc import Mapping

from cachefs.model import ConfigError

KEY = "--ufs-option"


def check_names(scheme: str, options: Mapping[str, str], accepted: Mapping[str, str]) -> None:
    """Raises ConfigError for an option the store does not know; `accepted` has name -> meaning."""
    for name in options:
        if name not in accepted:
            listed = ", ".join(f"{each} ({meaning})" for each, meaning in accepted.items()) or "no option"
            # The value may be a secret: never shown.
            raise ConfigError(KEY, name, f"one of those of {scheme}://: {listed}")


def number(options: Mapping[str, str], name: str, default: float, lowest: float, highest: float) -> float:
    """Raises ConfigError outside of the range."""
    text = options.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not lowest <= value <= highest:
        raise ConfigError(f"{KEY} {name}", text, f"a number from {lowest:g} to {highest:g}")
    return value


def flag(options: Mapping[str, str], name: str) -> bool:
    """Raises ConfigError for other texts than true and false."""
    text = options.get(name, "false")
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"{KEY} {name}", text, "true or false")
    return text.lower() == "true"
