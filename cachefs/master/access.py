"""Who may ask the master what. What is not listed is for workers and admins."""

from __future__ import annotations

from cachefs.net import ADMINS, EVERYONE, WORKERS, Allowed
from cachefs.wire import cluster as c
from cachefs.wire import control
from cachefs.wire import messages as m
from cachefs.wire import quotas as q
from cachefs.wire import volumes as v

ACCESS: Allowed = {
    m.Ping: EVERYONE,
    # Reading, and what it brings about.
    m.GetCluster: EVERYONE,
    m.GetAttr: EVERYONE,
    m.ResolvePath: EVERYONE,
    m.Lookup: EVERYONE,
    m.ListDir: EVERYONE,
    m.Watch: EVERYONE,
    m.LoadMetadata: EVERYONE,
    m.GetMasterStatus: EVERYONE,
    m.ListWorkers: EVERYONE,
    m.ListPins: EVERYONE,
    q.ListQuotas: EVERYONE,
    v.GetVolume: EVERYONE,
    v.ListVolumes: EVERYONE,
    c.Locate: EVERYONE,
    control.GetJob: EVERYONE,
    control.ListJobs: EVERYONE,
    # Credentials of under-stores, and what the others believe about who holds what.
    c.RegisterWorker: WORKERS,
    m.GetStores: WORKERS,
    m.WatchStores: WORKERS,
    m.Resolve: WORKERS,
    m.ResolveNext: WORKERS,
    m.ReportChanged: WORKERS,
    c.ReportBlocks: WORKERS,
    c.WatchMembers: WORKERS,
    c.AskBlocks: WORKERS,
    c.AskDrops: WORKERS,
    m.WatchPins: WORKERS,
    m.PinsApplied: WORKERS,
    q.WatchQuotas: WORKERS,
    q.QuotasApplied: WORKERS,
    q.ReportQuotas: WORKERS,
    control.WatchTasks: WORKERS,
    control.TasksDone: WORKERS,
    # Changes for everybody.
    m.Refresh: ADMINS,
    m.AddStore: ADMINS,
    m.RemoveStore: ADMINS,
    m.Pin: ADMINS,
    m.Unpin: ADMINS,
    q.SetQuota: ADMINS,
    q.RemoveQuota: ADMINS,
    v.CreateVolume: ADMINS,
    v.DeleteVolume: ADMINS,
    v.SetVolumeQuota: ADMINS,
    v.RenewVolume: ADMINS,
    control.StartJob: ADMINS,
    control.CancelJob: ADMINS,
    control.UndrainWorker: ADMINS,
    control.ForgetWorker: ADMINS,
}
