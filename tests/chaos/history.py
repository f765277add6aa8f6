"""What the bucket had when, what was wrong with the world when, and what a reader may have seen.

Times are of time.monotonic().
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.reader import Try

Excuse = Literal["stale", "supply", "disk", "mount", "etag"]
"""
stale    changes may not be seen: the master or the under-store cannot tell of them
supply   the under-store or a worker could not supply bytes for longer than anybody waits: EIO, ETIMEDOUT
etag     the store says that its objects are others than they are: ESTALE
disk     the disk of a mount's own tier fails: EIO of what the kernel reads there by itself
mount    the server of a mount was killed and nothing keeps it: ENOTCONN
"""


@dataclass
class Version:
    number: int
    size: int
    since: float
    """When it was begun to be written."""
    until: float = math.inf
    """When what came after it was complete."""


@dataclass
class Interval:
    excuse: Excuse
    scope: str
    """A mount, or all."""
    began: float
    ended: float = math.inf


@dataclass
class History:
    stale_s: float
    """For how long a reader may see what was replaced, if all works."""
    grace_s: float
    """For how long a disturbance is felt after its end."""
    versions: dict[str, list[Version]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    changes: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(dict))
    """Name -> when something else than before was begun to be put there -> when it was there."""
    intervals: list[Interval] = field(default_factory=list)

    # ---- what is done to the bucket --------------------------------------------------------------------------------

    def next_version(self, name: str) -> int:
        return len(self.versions[name]) + 1

    def put(self, name: str, size: int, began: float, ended: float) -> None:
        """A version was written; told as soon as it is begun (with an end of infinity), and again when it is there."""
        seen = self.versions[name]
        if not seen or seen[-1].since != began:
            seen.append(Version(len(seen) + 1, size, began))
        self.changes[name][began] = ended
        if math.isfinite(ended):
            if len(seen) > 1:
                seen[-2].until = min(seen[-2].until, ended)
            if self.missing[name] and self.missing[name][-1][1] == math.inf:
                self.missing[name][-1] = (self.missing[name][-1][0], ended)

    def delete(self, name: str, began: float, ended: float) -> None:
        """As with `put`."""
        gone = self.missing[name]
        if not gone or gone[-1][0] != began:
            gone.append((began, math.inf))
        self.changes[name][began] = ended
        if math.isfinite(ended):
            self.versions[name][-1].until = ended

    def exists(self, name: str) -> bool:
        return bool(self.versions[name]) and self.versions[name][-1].until == math.inf

    def existing(self) -> list[str]:
        return sorted(name for name in list(self.versions) if self.exists(name))

    # ---- what is done to the processes -----------------------------------------------------------------------------

    def begin(self, excuse: Excuse, at: float, scope: str = "") -> Interval:
        interval = Interval(excuse, scope, at)
        self.intervals.append(interval)
        return interval

    def excused(self, excuse: Excuse, began: float, ended: float, scope: str = "", least_s: float = 0.0) -> bool:
        """Whether there was one of at least that length between two moments, or ended shortly before."""
        return any(
            each.excuse == excuse
            and each.scope in ("", scope)
            and each.began <= ended
            and each.ended + self.grace_s >= began
            and min(each.ended, ended) - each.began >= least_s
            for each in self.intervals
        )

    def calm_s(self, began: float, ended: float) -> float:
        """For how long, between two moments, changes could be heard of."""
        total, at = 0.0, began
        disturbed = sorted((x.began, x.ended + self.grace_s) for x in self.intervals if x.excuse == "stale")
        for start, end in disturbed:
            if start >= ended:
                break
            total += max(0.0, start - at)
            at = max(at, end)
        return total + max(0.0, ended - at)

    # ---- what readers may see --------------------------------------------------------------------------------------

    def may_see(self, version: Version, began: float, ended: float) -> bool:
        return version.since <= ended and (version.until >= began or self.calm_s(version.until, began) <= self.stale_s)

    def may_miss(self, name: str, began: float, ended: float) -> bool:
        """Whether a name may be told to be missing."""
        first = self.versions[name][0].since if self.versions[name] else math.inf
        gone = [(-math.inf, first), *self.missing[name]]
        return any(start <= ended and (end >= began or self.calm_s(end, began) <= self.stale_s) for start, end in gone)

    def changed(self, name: str, began: float, ended: float) -> bool:
        """Whether the content of a name changed between two moments, or so shortly before that it may not be known."""
        return any(
            start <= ended and (end >= began or self.calm_s(end, began) <= self.stale_s)
            for start, end in self.changes[name].items()
        )

    def names_allowed(self, directory: str, names: Iterable[str], began: float, ended: float) -> str | None:
        """What is wrong with a listing."""
        listed = set(names)
        for name in list(self.versions):
            above, _, last = name.rpartition("/")
            if above != directory:
                continue
            if last in listed:
                listed.remove(last)
                if not any(self.may_see(each, began, ended) for each in self.versions[name]):
                    return f"{name} is listed, and was not there"
            elif not self.may_miss(name, began, ended):
                return f"{name} is not listed, and was there"
        return f"{directory}/{sorted(listed)[0]} is listed, and never was there" if listed else None


@dataclass
class Judge:
    """Turns what readers tell into counts and findings."""

    history: History
    patience_s: float
    """How long a failing supply must last for an error."""
    tries: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    """Those that are documented, by "call ERROR"."""
    data_bytes: int = 0
    calls: int = 0

    def finding(self, one: Try, mount: str) -> tuple[str, str] | None:
        """(kind, text) if it may not be. Kinds: wrong bytes, stale, error."""
        self.tries[one.how] += 1
        self.data_bytes += one.data_bytes
        self.calls += one.calls
        if one.wrong is not None:
            return "wrong bytes", one.wrong
        if one.error is not None:
            return self._error(one, mount)
        began, ended = one.began, one.ended
        if one.how == "list":
            problem = self.history.names_allowed(one.name, one.names or (), began, ended)
            return ("stale", problem) if problem else None
        versions = self.history.versions[one.name]
        if one.version is None:
            fitting = [each for each in versions if each.size == one.size]
        elif one.version > len(versions):
            return "wrong bytes", f"{one.name}: version {one.version} was never written"
        else:
            fitting = [versions[one.version - 1]]
            if one.size not in (None, fitting[0].size):
                return "wrong bytes", f"{one.name}: {one.size} bytes of version {one.version}, of {fitting[0].size}"
        if not any(self.history.may_see(each, began, ended) for each in fitting):
            return "stale", (
                f"{one.how} of {one.name}: version {one.version}, {one.size} bytes; "
                f"{[(v.number, v.size, round(v.until - began, 1)) for v in versions]} end so long after its begin"
            )
        return None

    def _error(self, one: Try, mount: str) -> tuple[str, str] | None:
        error, history = one.error or "", self.history
        began, ended = one.began, one.ended
        mapped = error == "SIGBUS"
        allowed = False
        if error == "ENOENT":
            allowed = history.may_miss(one.name, began, ended)
        elif error == "ESTALE" or mapped:
            allowed = history.changed(one.name, began, ended) or history.excused("etag", began, ended)
        if error in ("EIO", "ETIMEDOUT") or mapped:
            allowed = allowed or history.excused("supply", began, ended, mount, self.patience_s)
            allowed = allowed or (error != "ETIMEDOUT" and history.excused("disk", began, ended, mount))
        if error in ("ENOTCONN", "ECONNABORTED") or mapped:
            allowed = allowed or history.excused("mount", began, ended, mount)
        if allowed:
            self.errors[f"{one.how} {error}"] += 1
            return None
        took = f"{ended - began:.1f} s after its begin, the longest call {one.longest} {one.longest_s:.1f} s"
        return "error", f"{error} of {one.call} in {one.how} of {one.name} at {mount}, {took}"
