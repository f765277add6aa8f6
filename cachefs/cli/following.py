"""Jobs of the master, as people see them: told as facts, and followed while they run."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click
import msgspec
import trio
from rich.console import Console

from cachefs.cli.connect import run_with_client
from cachefs.cli.loading import EXIT_INTERRUPTED, amount, failures_of
from cachefs.cli.progress import HowFar, shown
from cachefs.client import Client
from cachefs.model import format_duration, format_size
from cachefs.net import Address
from cachefs.store import running_boot_id
from cachefs.wire.control import GetJob, JobInfo, JobSpec

_LOOK_EVERY_S = 0.25
_BEGIN_S = 5.0
"""Whoever interrupts while the master is asked for a job waits so long to be told which one goes on."""

background_option = click.option("--background", is_flag=True, help="Only begin it: `cachefs job show` tells how far.")


def run_job(
    master_address: Address | None, spec: JobSpec, *, dry_run: bool = False, background: bool = False, as_json: bool
) -> None:
    """Begin a job and follow it to its end; exits with status 1 when something failed. Raises as `StartJob`."""
    found: list[JobInfo] = []
    interrupted = False

    async def run(client: Client) -> None:
        nonlocal interrupted
        if dry_run or background:
            found.append(await client.start_job(spec, dry_run=dry_run))
        else:
            interrupted = await _begin_and_follow(client, spec, found)

    run_with_client(master_address, run, admin=True)
    if not found:
        print("interrupted; whether it began, `cachefs job list` tells: the master has not answered", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    info = found[-1]
    if as_json:
        print(json.dumps({**facts_of(info), "dry_run": dry_run}))
    else:
        print_job(info, dry_run=dry_run)
    if interrupted or (background and not as_json):
        print(
            f"job {info.job_id} goes on: `cachefs job show {info.job_id}` tells how far it is,"
            f" `cachefs job cancel {info.job_id}` ends it",
            file=sys.stderr if interrupted else sys.stdout,
        )
    if interrupted:
        sys.exit(EXIT_INTERRUPTED)
    if info.counts.failed or info.state in ("failed", "cancelled"):
        sys.exit(1)


async def _begin_and_follow(client: Client, spec: JobSpec, found: list[JobInfo]) -> bool:
    """Until it has ended, or Ctrl-C: returns whether it was that. The last of `found` is how it stands; none: the
    master did not say that it began.
    """
    interrupted = False
    beginning = trio.CancelScope(shield=True)

    async with trio.open_nursery() as nursery:

        async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            nonlocal interrupted
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    interrupted = True
                    beginning.deadline = trio.current_time() + _BEGIN_S
                    nursery.cancel_scope.cancel()

        await nursery.start(watch)
        with beginning:
            found.append(await client.start_job(spec))
        await trio.lowlevel.checkpoint()  # not further when it was interrupted
        began = trio.current_time()

        def look() -> HowFar:
            info = found[-1]
            rate = info.counts.copied_bytes / max(trio.current_time() - began, 0.001)
            return HowFar(how_far(info, rate), info.counts.done_bytes, info.counts.total_bytes or None)

        async with shown(Console(stderr=True), f"job {found[-1].job_id}", look):
            while not found[-1].ended_ns:
                await trio.sleep(_LOOK_EVERY_S)
                found[:] = [await client.ask(GetJob(found[-1].job_id))]
        nursery.cancel_scope.cancel()
    return interrupted


def how_far(info: JobInfo, rate: float = 0.0) -> str:
    if info.waits_for and not info.ended_ns:
        return f"waits for {info.waits_for}"
    counts = info.counts
    if info.state == "listing":
        return f"listing, {amount(counts.total, counts.total_bytes)} so far"
    things = "blocks" if info.spec.kind == "drain" else "files"
    text = (
        f"{counts.done} of {counts.total} {things},"
        f" {format_size(counts.done_bytes)} of {format_size(counts.total_bytes)}, {counts.failed} failed"
    )
    left_s = (counts.total_bytes - counts.done_bytes) / rate if rate else math.inf
    if 0 < left_s < math.inf and not info.ended_ns:
        text += f", {format_size(rate)}/s, {format_duration(math.ceil(left_s))} left"
    return text


def facts_of(info: JobInfo) -> dict[str, Any]:
    facts = msgspec.to_builtins(info)
    del facts["spec"], facts["counts"]
    return {
        **facts,
        **msgspec.to_builtins(info.spec),
        **msgspec.to_builtins(info.counts),
        "failures": failures_of(info.failures),
    }


def about(spec: JobSpec) -> str:
    """What a job is about, in a line."""
    if spec.kind == "drain":
        return spec.workers[0]
    text = ", ".join(spec.paths[:3]) + (" ..." if len(spec.paths) > 3 else "")
    if spec.replicas > 1:
        text += f", {spec.replicas} copies"
    if spec.workers:
        text += f", on {', '.join(spec.workers)}"
    if spec.limit_bytes_per_s:
        text += f", {format_size(spec.limit_bytes_per_s)}/s"
    return text


def print_job(info: JobInfo, *, dry_run: bool = False) -> None:
    counts, spec = info.counts, info.spec
    what = "dry run" if dry_run else f"job {info.job_id}"
    print(f"{what}: {spec.kind} {about(spec)}: {info.state}, {how_far(info)}")
    would = "would be " if dry_run else ""
    if spec.kind == "free":
        print(f"{counts.drops} blocks, {format_size(counts.dropped_bytes)} {would}freed")
        if counts.in_use:
            print(f"{counts.in_use} are in use and stay")
        if counts.pinned:
            print(f"{counts.pinned} are pinned and stay; see cachefs pin --list")
    else:
        print(f"{counts.copies} blocks, {format_size(counts.copied_bytes)} {would}copied")
        print(f"{counts.present} blocks were there before")
    if spec.kind == "drain" and info.state == "done" and not dry_run:
        if counts.failed:
            print(f"{counts.failed} last copies stay on {spec.workers[0]}, which goes on draining")
        else:
            print(f"{spec.workers[0]} is drained")
    for path, reason in info.failures:
        print(f"{path}: {reason}", file=sys.stderr)
    if counts.failed > len(info.failures):
        print(f"... and {counts.failed - len(info.failures)} more", file=sys.stderr)


def has_worker_here(master_address: Address | None, *, admin: bool = False) -> bool:
    """Whether there is a worker on this node. Raises TransportError."""
    found: Sequence[bool] = []

    async def look(client: Client) -> None:
        nonlocal found
        boot_id = running_boot_id()
        workers = (await client.master_status()).workers
        found = [each.connected and each.host_boot_id == boot_id for each in workers]

    run_with_client(master_address, look, admin=admin)
    return any(found)
