"""What a mount shows to monitoring: the numbers others keep, read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cachefs.client import Client
from cachefs.fuse.operations import CacheOperations
from cachefs.fusewire import Opcode
from cachefs.metrics import Metric, Monitor, Times, by_label, counter, gauge, histogram
from cachefs.model import TransportError


class OperationTimes(Times[int]):
    """By opcode, shown by its name."""

    def named(self) -> Times[str]:
        shown: Times[str] = Times()
        for opcode, cell in self.cells.items():
            try:
                into = shown.cells[Opcode(opcode).name.lower()]
            except ValueError:
                into = shown.cells["other"]
            into[:] = map(sum, zip(into, cell, strict=True))
        return shown


@dataclass(frozen=True)
class MountParts:
    """Where the numbers are."""

    operations: CacheOperations
    client: Client
    times: OperationTimes = field(default_factory=OperationTimes)


MOUNT_METRICS: Sequence[Metric[MountParts]] = (
    histogram(
        "cachefs_fuse_operation_seconds",
        "Requests of the kernel, from their coming until they are answered.",
        lambda parts: parts.times.named(),
        "operation",
    ),
    counter(
        "cachefs_opens_total",
        "Files opened: by passthrough, which the kernel reads by itself, or in cached mode, in which READs come to us. "
        "In the mode no-open nobody tells.",
        lambda parts: by_label(
            {
                "passthrough": parts.operations.counts.passthrough_opens,
                "cached": parts.operations.counts.cached_opens,
            }
        ),
        "mode",
    ),
    gauge(
        "cachefs_mount_servers",
        "Servers of this mount until now, this one included: those before it died, hung or were upgraded.",
        lambda parts: parts.operations.servers,
    ),
    gauge("cachefs_open_files", "Handles that are open now.", lambda parts: parts.operations.open_files),
    counter(
        "cachefs_mount_read_bytes_total",
        "Bytes in answers to READs: what the kernel neither read by itself (passthrough) nor had in its page cache.",
        lambda parts: parts.operations.counts.read_bytes,
    ),
    gauge(
        "cachefs_metadata_entries",
        "Files and directories whose attributes are remembered.",
        lambda parts: len(parts.client.metadata),
    ),
    counter(
        "cachefs_metadata_hits_total",
        "Names and attributes answered from memory.",
        lambda parts: parts.client.metadata.hits,
    ),
    counter(
        "cachefs_metadata_misses_total",
        "Names and attributes the master was asked for.",
        lambda parts: parts.client.metadata.misses,
    ),
    counter(
        "cachefs_metadata_served_stale_total",
        "Names, attributes and listings that were answered from memory past their time, as the master was away.",
        lambda parts: parts.client.reach.served_stale,
    ),
    gauge(
        "cachefs_master_away_seconds",
        "For how long the master has not answered; 0: it does.",
        lambda parts: parts.client.reach.away_s,
    ),
    counter(
        "cachefs_master_outages_total",
        "Times that the master was found to be away.",
        lambda parts: parts.client.reach.outages,
    ),
    gauge(
        "cachefs_worker_away_seconds",
        "For how long no worker has answered that could be read through; 0: one does, or was not asked.",
        lambda parts: parts.client.workers.away_s,
    ),
    counter(
        "cachefs_worker_outages_total",
        "Times that the worker in use was found to be away.",
        lambda parts: parts.client.workers.outages,
    ),
    gauge(
        "cachefs_reads_through",
        "1 for where the worker is that is read through, 0 elsewhere: on the own host, on an other one, or none.",
        lambda parts: by_label({each: parts.client.workers.place == each for each in ("own", "other", "none")}),
        "worker",
    ),
    counter(
        "cachefs_kernel_notices_total",
        "What the kernel was told to forget: names that changed, or everything.",
        lambda parts: by_label(
            {
                "name": parts.operations.counts.changed_names,
                "everything": parts.operations.counts.changed_everything,
            }
        ),
        "what",
    ),
)


def watch_mount(monitor: Monitor, parts: MountParts) -> None:
    """Show it from now on, that it is mounted."""

    client = parts.client

    async def why_not_ready() -> str | None:
        if client.reach.is_away:
            return client.reach.why()
        try:
            await client.ask_master()
        except TransportError as error:
            return f"the master does not answer: {error}"
        return None

    def degraded() -> list[str]:
        workers = client.workers
        found = [f"no worker has answered for {workers.away_s:.0f} s"] if workers.away_s else []
        if workers.chosen is not None and workers.place == "other":
            found.append(f"what is read comes over the network: {workers.chosen.candidate}")
        return found

    monitor.watch(MOUNT_METRICS, parts)
    monitor.degraded_by(degraded)
    monitor.ready_if(why_not_ready)
