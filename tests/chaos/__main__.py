"""`python -m tests.chaos --minutes N --seed S`: exit status 1 if something was found, 2 if it cannot run here."""

from __future__ import annotations

import argparse
import os
import sys

from cachefs.cli.instances import runtime_root
from cachefs.fuse import probe
from cachefs.model import MiB
from cachefs.testing.own_mounts import leave_the_mounts_of_others
from tests.chaos.plan import KINDS
from tests.chaos.run import Outcome, Stall, as_json, run


def main() -> int:
    kinds = "\n".join(f"  {kind.name:18} {kind.says}" for kind in KINDS)
    parser = argparse.ArgumentParser(
        "python -m tests.chaos",
        description="Do harm to a real cluster while readers verify every byte.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults go on (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="decides what happens when (default 1)")
    parser.add_argument("--pace", type=float, default=1.5, help="seconds from one event to the next, on average")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="repeatable; default: all kinds")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--for-debugging", action="store_true", help="keep logs and tiers if something was found")
    arguments = parser.parse_args()
    unknown = set(arguments.only) - {kind.name for kind in KINDS}
    if unknown:
        parser.error(f"--only: {sorted(unknown)[0]!r} is no kind; expected one of {', '.join(k.name for k in KINDS)}")
    if arguments.minutes <= 0 or arguments.pace <= 0:
        parser.error("--minutes and --pace: expected more than 0")
    if os.geteuid() != 0 or not probe().can_mount:
        print("python -m tests.chaos needs root and /dev/fuse", file=sys.stderr)
        return 2
    leave_the_mounts_of_others(runtime_root(), "/dev/fuse")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    outcome = run(
        arguments.seed,
        arguments.minutes * 60,
        kinds=arguments.only,
        pace_s=arguments.pace,
        keep=arguments.for_debugging,
        say=say,
    )
    print(as_json(outcome) if arguments.json else text(outcome))
    return 0 if outcome.good else 1


def text(outcome: Outcome) -> str:
    """For people."""
    lines = [f"chaos: seed {outcome.seed}, {outcome.seconds:g} s, an event every {outcome.pace_s:g} s", ""]
    lines += _table("survived", outcome.survived) + _table("that is", outcome.details)
    lines += [f"left out: {kind}: {why}" for kind, why in outcome.left_out.items()]
    tries = ", ".join(f"{count} {how}" for how, count in sorted(outcome.tries.items()))
    lines += [f"readers: {tries}; {outcome.calls} calls, {outcome.bytes_verified / MiB:.0f} MiB verified"]
    lines += _table("documented errors", outcome.errors)
    lines += [f"longest stall: {_stall(outcome.longest_stall)}"]
    healed = f"{outcome.healed_s} s" if outcome.healed_s is not None else "never"
    lines += [f"all as in the bucket, after the last fault: {healed}"]
    peaks = ", ".join(f"{name} {count / MiB:.0f}" for name, count in outcome.peak_bytes.items())
    lines += [f"most memory, MiB: {peaks}"]
    found = {kind: outcome.findings.get(kind, 0) for kind in ("wrong bytes", "hang", "error", "stale", "leak")}
    found |= outcome.findings
    lines += ["found: " + ", ".join(f"{count} {kind}" for kind, count in found.items())]
    lines += [f"  {each}" for each in outcome.shown]
    if outcome.directory:
        lines += [f"kept: {outcome.directory}"]
    return "\n".join(lines)


def _table(title: str, counts: dict[str, int]) -> list[str]:
    return [f"{title}:", *(f"  {count:8} {what}" for what, count in sorted(counts.items()))] if counts else []


def _stall(stall: Stall) -> str:
    during = ", ".join(stall.during) or "nothing"
    where = f"{stall.call} of {stall.name} at {stall.mount}"
    return f"{stall.seconds:.2f} s in {where}, from {stall.at_s} s on, during {during}"


if __name__ == "__main__":
    sys.exit(main())
