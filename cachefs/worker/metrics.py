"""What a worker shows to monitoring: the numbers others keep, read when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachefs.metrics import Metric, Monitor, Times, by_label, counter, errors_of, gauge, histogram
from cachefs.store import Store, TierState, TierStatus
from cachefs.worker.counters import Counters
from cachefs.worker.jobs import Filler
from cachefs.worker.master_link import MasterLink
from cachefs.worker.sources import Sources


@dataclass(frozen=True)
class WorkerParts:
    """Where the numbers are."""

    counters: Counters
    store: Store
    filler: Filler
    link: MasterLink
    sources: Sources
    requests: Times[str]
    leases: Callable[[], int] | None = None
    """How many origin leases it holds."""
    peers: Callable[[], int] | None = None
    """How many other workers it knows."""


SOURCES = ("local", "peer", "under_store")
"""Where bytes come from: `Counters` has `local_bytes` and so on, `peer_reads` and so on, `peer_times` and so on."""


def _by_source(unit: str) -> Callable[[WorkerParts], dict[tuple[str, ...], float]]:
    def read(parts: WorkerParts) -> dict[tuple[str, ...], float]:
        found = {source: getattr(parts.counters, f"{source}_{unit}", None) for source in SOURCES}
        return by_label({source: number for source, number in found.items() if number is not None})

    return read


def _count(name: str) -> Callable[[WorkerParts], float | None]:
    """A field of `Counters`."""
    return lambda parts: getattr(parts.counters, name, None)


def _of_tiers(read: Callable[[TierStatus], float]) -> Callable[[WorkerParts], dict[tuple[str, ...], float]]:
    """By number, the fastest first, and kind: its path is nobody's business."""
    return lambda parts: {
        (str(number), tier.config.kind): read(tier.status()) for number, tier in enumerate(parts.store.tiers)
    }


def _states(parts: WorkerParts) -> dict[tuple[str, ...], float]:
    return {
        (str(number), tier.config.kind, state.value): parts.store.state(tier) is state
        for number, tier in enumerate(parts.store.tiers)
        for state in TierState
    }


_TIER = ("tier", "kind")

WORKER_METRICS: Sequence[Metric[WorkerParts]] = (
    counter(
        "cachefs_read_bytes_total",
        "Bytes by where they came from: under_store and peer fetched them, also ahead of readers; local were here when "
        "a mount asked this worker for them. What mounts open by themselves is seen by nobody.",
        _by_source("bytes"),
        "source",
    ),
    counter("cachefs_reads_total", "Reads that fetched something, by where from.", _by_source("reads"), "source"),
    counter("cachefs_hits_total", "Requests of readers for what was here already.", _count("hits")),
    counter("cachefs_misses_total", "Requests of readers for what was not here, or not all of it.", _count("misses")),
    histogram(
        "cachefs_under_store_read_seconds",
        "One read of the under-store, its retries included, by kind: a range of an object, or a small file as a whole.",
        lambda parts: parts.counters.under_store_times,
        "kind",
    ),
    histogram(
        "cachefs_peer_read_seconds",
        "One read from another worker.",
        lambda parts: getattr(parts.counters, "peer_times", None),
        "kind",
    ),
    histogram(
        "cachefs_request_seconds",
        "Requests of mounts, tools and other workers, until their answer is sent.",
        lambda parts: parts.requests,
        "operation",
    ),
    counter(
        "cachefs_request_errors_total",
        "Of those, the ones answered with an error.",
        lambda parts: errors_of(parts.requests),
        "operation",
    ),
    counter(
        "cachefs_peer_failures_total",
        "Reads from other workers that failed; the bytes came from elsewhere.",
        _count("peer_failures"),
    ),
    counter(
        "cachefs_served_bytes_total",
        "Bytes sent to other workers, and to mounts of other hosts.",
        _count("served_bytes"),
    ),
    counter("cachefs_served_reads_total", "Reads of these that were answered.", _count("served_reads")),
    counter("cachefs_drops_total", "Blocks given up because others hold them too.", _count("drops")),
    counter("cachefs_pages_fetched_total", "Pages written into the cache.", _count("pages_fetched")),
    counter("cachefs_blocks_sealed_total", "Blocks that became complete.", _count("blocks_sealed")),
    counter("cachefs_files_ahead_total", "Small files fetched before anybody asked for them.", _count("files_ahead")),
    counter("cachefs_admissions_refused_total", "Contents that were read without being kept.", _count("not_admitted")),
    counter("cachefs_quota_refused_total", "Of these, for a quota that is used up.", _count("quota_refused")),
    counter(
        "cachefs_corrupt_total", "Blocks or pages that were not what had been written, and dropped.", _count("corrupt")
    ),
    counter("cachefs_changed_total", "Reads that found their object changed or gone.", _count("changed")),
    gauge(
        "cachefs_fetch_slots",
        "Fetches that may run at once, by who waits for them: demand (readers), background (nobody yet), load. Up to "
        "four more run for under-stores of which none does.",
        lambda parts: by_label({name: slots.total for name, slots in parts.filler.slots.items()}),
        "queue",
    ),
    gauge(
        "cachefs_fetches_running",
        "Of those, how many run.",
        lambda parts: by_label({name: slots.taken for name, slots in parts.filler.slots.items()}),
        "queue",
    ),
    gauge(
        "cachefs_fetches_waiting",
        "Fetches that wait for one of them to end.",
        lambda parts: by_label({name: slots.waiting for name, slots in parts.filler.slots.items()}),
        "queue",
    ),
    gauge("cachefs_tier_capacity_bytes", "What a tier may take.", _of_tiers(lambda tier: tier.capacity_bytes), *_TIER),
    gauge(
        "cachefs_tier_used_bytes",
        "What is on it: complete blocks, and parts of blocks that nobody is filling.",
        _of_tiers(lambda tier: tier.used_bytes),
        *_TIER,
    ),
    gauge(
        "cachefs_tier_reserved_bytes",
        "What is promised to blocks that are being filled.",
        _of_tiers(lambda tier: tier.reserved_bytes),
        *_TIER,
    ),
    gauge(
        "cachefs_tier_pinned_bytes",
        "Of what is used: never evicted.",
        _of_tiers(lambda tier: tier.pinned_bytes),
        *_TIER,
    ),
    gauge(
        "cachefs_tier_free_bytes",
        "What it takes before something has to be evicted; less than capacity - used - reserved where others fill the "
        "disk.",
        lambda parts: {
            (str(number), tier.config.kind): max(0, tier.room_bytes()) for number, tier in enumerate(parts.store.tiers)
        },
        *_TIER,
    ),
    gauge(
        "cachefs_tier_state",
        "1 for the state its disk is in, 0 for the others: healthy; limited, nothing new goes there; down or probing, "
        "its blocks count as lost.",
        _states,
        *_TIER,
        "state",
    ),
    gauge("cachefs_tier_blocks", "Complete blocks.", _of_tiers(lambda tier: tier.sealed), *_TIER),
    gauge("cachefs_tier_partials", "Blocks of which a part is there.", _of_tiers(lambda tier: tier.partials), *_TIER),
    gauge(
        "cachefs_tier_suspects",
        "Blocks of before a reboot, not verified yet.",
        _of_tiers(lambda tier: tier.suspect),
        *_TIER,
    ),
    counter("cachefs_evictions_total", "Blocks that made room.", _of_tiers(lambda tier: tier.evictions), *_TIER),
    gauge(
        "cachefs_registered", "1 if it is registered with the master, else 0.", lambda parts: parts.link.is_registered
    ),
    gauge(
        "cachefs_master_away_seconds",
        "For how long it has not been registered with a master; 0: it is.",
        lambda parts: parts.link.away_s,
    ),
    gauge(
        "cachefs_under_stores_open",
        "Under-stores it has open: those that are attached, and those that were removed and are still read from "
        "or being closed.",
        lambda parts: parts.sources.open_stores,
    ),
    gauge(
        "cachefs_under_store_failing_seconds",
        "For how long an under-store has done nothing that it was asked; 0: it answered the last time.",
        lambda parts: by_label({origin: each.failing_s for origin, each in parts.sources.health.items()}),
        "store",
    ),
    counter(
        "cachefs_under_store_failures_total",
        "Reads of an under-store that failed, after their retries.",
        lambda parts: by_label({origin: each.failures for origin, each in parts.sources.health.items()}),
        "store",
    ),
    gauge(
        "cachefs_leases_held",
        "Blocks that only it may fetch from the under-store.",
        lambda parts: parts.leases and parts.leases(),
    ),
    gauge("cachefs_peers_known", "Other workers it knows.", lambda parts: parts.peers and parts.peers()),
)


def watch_worker(monitor: Monitor, parts: WorkerParts) -> None:
    """Show it from now on."""

    async def why_not_ready() -> str | None:
        if not parts.link.is_registered:
            return "it is not registered with the master"
        if not parts.store.is_usable:
            return "no tier can be used, see the log"
        return None

    def degraded() -> list[str]:
        # Without the errors, which name files: `cachefs report` has them.
        stores = [
            f"the under-store {origin} has failed for {each.failing_s:.0f} s"
            for origin, each in parts.sources.health.items()
            if each.is_failing
        ]
        states = [(tier.config.kind, parts.store.state(tier)) for tier in parts.store.tiers]
        return stores + [
            f"the disk of tier {number} ({kind}) is {state.value}"
            for number, (kind, state) in enumerate(states)
            if state is not TierState.HEALTHY
        ]

    monitor.watch(WORKER_METRICS, parts)
    monitor.degraded_by(degraded)
    monitor.ready_if(why_not_ready)
