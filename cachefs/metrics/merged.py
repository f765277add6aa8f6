"""Texts of several processes as one, for a process that answers for others: each of theirs keeps apart by labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_SAMPLE = re.compile(rb"([A-Za-z_:][A-Za-z0-9_:]*)(\{)?(.*)", re.DOTALL)
_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labelled = tuple[Mapping[str, str], bytes]
"""(labels of every sample in it, a text as `Exposition` makes it)."""


def merged(own: bytes, others: Iterable[Labelled]) -> bytes:
    """`own` as it is, and the samples of others with their labels. All samples of a metric stand together, below the
    first description of it, as the format demands.
    """
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for labels, text in [({}, own), *others]:
        for name, described, measured in _families(text):
            if name not in heads:
                heads[name], samples[name] = list(described), []
            samples[name] += [_with(labels, line) for line in measured]
    return b"".join(line + b"\n" for name in heads for line in (*heads[name], *samples[name]))


def _families(text: bytes) -> Iterable[tuple[bytes, Sequence[bytes], Sequence[bytes]]]:
    """(name, lines that describe it, samples) of each metric."""
    name, described, measured = b"", list[bytes](), list[bytes]()
    for line in text.split(b"\n"):
        if not line:
            continue
        if not line.startswith(b"#"):
            measured.append(line)
            continue
        words = line.split(b" ", 3)
        if len(words) < 3 or words[1] not in (b"HELP", b"TYPE"):
            continue  # a comment
        if words[2] != name:
            if name:
                yield name, described, measured
            name, described, measured = words[2], [], []
        described.append(line)
    if name:
        yield name, described, measured


def _with(labels: Mapping[str, str], sample: bytes) -> bytes:
    found = _SAMPLE.fullmatch(sample)
    if not labels or found is None:
        return sample
    added = ",".join(f'{name}="{value.translate(_ESCAPED)}"' for name, value in labels.items()).encode()
    if found[2] is None:
        return found[1] + b"{" + added + b"}" + found[3]
    return found[1] + b"{" + added + (b"" if found[3].startswith(b"}") else b",") + found[3]
