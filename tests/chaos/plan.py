"""What goes wrong when: a pure function of seed, length and kinds."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

MOUNTS = ("mount-a", "mount-b")
WORKERS = ("a", "b", "c")
"""The first two have a mount each, the last one only serves the others."""
_BOTH = ("a", "b")


@dataclass(frozen=True)
class Kind:
    name: str
    targets: Sequence[str]
    """One of them is met."""
    least_s: float
    most_s: float
    also: Sequence[str] = ()
    """What must be left alone meanwhile, besides the target."""
    says: str = ""


KINDS = (
    Kind("latency", ["latency"], 2, 6, says="each answer of the store comes 50 to 400 ms later"),
    Kind("server-errors", ["store"], 1, 4, says="every second or third request is answered 500"),
    Kind("slow-down", ["store"], 1, 4, says="every second or third request is answered 503 SlowDown"),
    Kind("resets", ["store"], 1, 4, says="connections are reset in the middle of bodies"),
    Kind("cut-off", ["store"], 1, 4, says="connections are closed in the middle of bodies"),
    Kind("short-bodies", ["store"], 1, 4, says="bodies have half of their bytes, and say so"),
    Kind("wrong-etags", ["store"], 1, 4, says="answers carry another ETag"),
    Kind("wrong-ranges", ["store"], 1, 4, says="answers say that they are another range"),
    Kind("outage", ["store"], 2, 14, says="every request is answered 500"),
    Kind("kill-master", ["master"], 0, 5, says="kill -9, and a start after a while"),
    Kind("stop-master", ["master"], 1, 6, says="SIGSTOP, and SIGCONT after a while"),
    Kind("kill-worker", WORKERS, 0, 5, says="kill -9, and a start after a while"),
    Kind("stop-worker", WORKERS, 1, 6, says="SIGSTOP, and SIGCONT after a while"),
    Kind("lose-worker", _BOTH, 12, 16, ["copies"], "as kill-worker, for so long that its mount turns to another one"),
    Kind("stop-mount", MOUNTS, 0.5, 2, says="SIGSTOP of a mount's server, and SIGCONT after a while"),
    Kind("kill-mount-server", MOUNTS, 0, 0, says="kill -9 of the server below a keeper"),
    Kind("kill-mount-keeper", MOUNTS, 0, 0, says="kill -9 of the keeper"),
    Kind("partition", ["a-c", "b-c", "a-b"], 2, 8, says="two workers do not reach each other"),
    Kind("partition-master", WORKERS, 2, 14, says="a worker does not reach the master"),
    Kind("disk-full", ["disk-a", "disk-b"], 2, 6, says="somebody else fills the disk of a tier"),
    Kind("disk-read-only", _BOTH, 2, 5, ["disk-{}"], "the file system of a tier is remounted read-only"),
    Kind("disk-errors", ["a"], 2, 5, ["disk-a", "copies"], "the disk of a tier gives EIO"),
    Kind("bits-of-sealed", ["c"], 3, 5, ["copies"], "bits flip in complete files and their checksums"),
    Kind(
        "bits-of-partial", WORKERS, 0, 2, says="kill -9, and bits flip in incomplete files before it is started again"
    ),
    Kind("bits-at-boot", ["c"], 0, 2, ["copies"], "the same in complete files, and the machine was booted anew"),
    Kind("replace", ["bucket"], 0, 0, says="objects are written again, with other sizes and the same"),
    Kind("add", ["bucket"], 0, 0, says="objects appear, or appear again"),
    Kind("delete", ["bucket"], 0, 0, says="objects are deleted"),
)
BY_NAME = {kind.name: kind for kind in KINDS}
MOUNT_SERVER_KINDS = {"kill-mount-server": "mount-server", "kill-mount-keeper": "mount-keeper"}
"""Kind -> the argument in the command line of the processes without which there is nothing to kill."""


@dataclass(frozen=True)
class Event:
    at_s: float
    """After the begin."""
    kind: str
    target: str
    lasts_s: float
    seed: int
    """Of what it does in detail."""
    holds: tuple[str, ...] = ()
    """What no other event may touch meanwhile, sorted."""


def plan(seed: int, seconds: float, kinds: Collection[str], pace_s: float) -> list[Event]:
    """By time; one every `pace_s` on average, none begins in the last tenth, and each kind once before any comes again.
    None lasts longer than a twelfth of all.

    What may not coincide, such as two faults of one process, comes one after the other.
    """
    rng = random.Random(f"{seed} {float(seconds)} {sorted(kinds)}")
    end = seconds * 0.9
    busy: dict[str, float] = {}
    events: list[Event] = []
    at = 0.0
    while kinds and at < end:
        order = [kind for kind in KINDS if kind.name in kinds]
        rng.shuffle(order)
        for kind in order:
            at += pace_s * rng.uniform(0.3, 1.7)
            if at >= end:
                break
            lasts_s = min(rng.uniform(kind.least_s, kind.most_s), seconds / 12) if kind.most_s else 0.0
            # The target that is free first.
            target = min(rng.sample(list(kind.targets), len(kind.targets)), key=lambda each: busy.get(each, 0.0))
            ends = target.split("-") if kind.name == "partition" else ()
            needs = {target, *ends, *(each.format(target) for each in kind.also)}
            begin = max(at, *(busy.get(each, 0.0) for each in needs))
            if begin >= end:
                continue
            for each in needs:
                busy[each] = begin + lasts_s + _AFTER_S.get(each, 0.5)
            events.append(Event(begin, kind.name, target, lasts_s, rng.getrandbits(32), tuple(sorted(needs))))
    return sorted(events, key=lambda event: event.at_s)


_AFTER_S = {"bucket": 0.0, "latency": 0.0, "a": 3.0, "b": 3.0, "c": 3.0, "master": 3.0}
"""How long something is left alone: a process takes a second or two to start."""
