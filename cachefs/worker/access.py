"""Who may ask a worker what over TCP. What is not listed is for workers and admins."""

from __future__ import annotations

from cachefs.net import EVERYONE, WORKERS, Allowed
from cachefs.wire import cluster as c
from cachefs.wire import control
from cachefs.wire import messages as m

ACCESS: Allowed = {
    m.Ping: EVERYONE,
    m.GetWorkerStatus: EVERYONE,
    # Mounts without a worker of their own.
    m.Fetch: EVERYONE,
    m.Promote: EVERYONE,
    m.Opened: EVERYONE,
    m.GetBlockStatus: EVERYONE,
    # Other workers.
    c.ReadBlock: WORKERS,
    c.DoubtBlock: WORKERS,
    control.MeasureBlock: WORKERS,
}
