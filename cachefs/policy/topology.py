"""How near two processes are, told by labels such as `host=n17 rack=r2 zone=a`, and whom to ask first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cachefs.model import BlockId, ConfigError, ContentKey
from cachefs.policy.placement import draw

LEVELS = ("host", "rack", "zone")
"""The labels that say where something is, the nearest first. Others are allowed, and mean nothing here."""
FARTHEST = len(LEVELS)

_NAME = re.compile(r"[a-z0-9._-]{1,63}")
_MAX_VALUE = 255
_NO_BLOCK = BlockId(ContentKey(bytes(16)), 0)


class Place(NamedTuple):
    """A worker or mount, and where it is."""

    name: str
    labels: Mapping[str, str]


def distance(mine: Mapping[str, str], theirs: Mapping[str, str]) -> int:
    """0 on the same host, 1 in the same rack, 2 in the same zone, else 3.

    A label that one of them lacks matches nothing. Two that differ in a farther level share no nearer one: rack `1` of
    zone `a` is not rack `1` of zone `b`.
    """
    nearest = FARTHEST
    for level in reversed(range(FARTHEST)):
        label = LEVELS[level]
        if label in mine and label in theirs:
            if mine[label] != theirs[label]:
                return nearest
            nearest = level
    return nearest


def nearest(asker: Place, places: Iterable[Place], block: BlockId | None = None) -> list[Place]:
    """The nearest first. Those at the same distance come in an order that differs by asker and block, and is the same
    each time: many askers spread over them, and one asker's blocks do.
    """
    about = block or _NO_BLOCK
    return sorted(
        places,
        key=lambda place: (
            distance(asker.labels, place.labels),
            draw(about, f"{asker.name}\0{place.name}"),
            place.name,
        ),
    )


def equally_near(asker: Place, places: Iterable[Place], block: BlockId | None = None) -> list[Place]:
    """Those of `nearest` that no other is nearer than: a large block's pages are spread over these."""
    ordered = nearest(asker, places, block)
    least = distance(asker.labels, ordered[0].labels) if ordered else 0
    return [place for place in ordered if distance(asker.labels, place.labels) == least]


def parse_labels(key: str, texts: Iterable[str]) -> dict[str, str]:
    """The labels that a setting gives as `NAME=VALUE` texts. Raises ConfigError, which names `key`."""
    labels: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(key, text, "NAME=VALUE with a name of 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        if not 1 <= len(value) <= _MAX_VALUE or not value.isprintable():
            raise ConfigError(key, text, f"a value of 1 to {_MAX_VALUE} printable characters")
        if labels.setdefault(name, value) != value:
            raise ConfigError(key, text, f"one value for each name; {name} is {labels[name]!r} already")
    return labels
