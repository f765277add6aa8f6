"""Golden bytes: every message and every frame as it is on the wire today, whole and cut at every byte.

A test that fails here means that processes of two versions would not understand each other: change the version of the
protocol, or add a field with a default instead.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefs.model import Attr, ContentKey, Entry, Geometry, Ino, Kind, LocalProtocolError, RemoteProtocolError
from cachefs.wire import Connection, ErrorMeta, Frame, Hello, RequestDecoder, reply_type
from cachefs.wire import Kind as FrameKind
from cachefs.wire import cluster as c
from cachefs.wire import control as k
from cachefs.wire import messages as m
from cachefs.wire import mounts as n
from cachefs.wire import quotas as q
from cachefs.wire import volumes as v

GEOMETRY = Geometry(1 << 20, 1 << 16)
CLUSTER = m.ClusterInfo("c", "n", GEOMETRY, 60.0)
KEY = ContentKey(b"k" * 16)
ATTR = Attr(Ino(7), Kind.FILE, 1000, 5, 0o644, 0, 0, KEY)
MOUNT = n.MountState(
    *("vol-1", "/mnt/a", "/volumes/vol-1", {"gid": "7"}, "starting", "its server ended", "0:52", 7, "/run/k", 2)
)
VOLUME = v.VolumeInfo("vol-1", "pvc-1", "/volumes/vol-1", "s3://b", 10, 9, {"a": "b"}, 1.5)

MESSAGES: list[tuple[Any, bytes]] = [
    (
        m.Done(),
        b"\x90",
    ),
    (
        m.Ping(),
        b"\x81\xa1q\xa4Ping",
    ),
    (
        m.ClusterInfo("c", "n", GEOMETRY, 60.0),
        b"\x84\xaacluster_id\xa1c\xacnamespace_id\xa1n\xa8geometry\x92\xce\x00\x10\x00\x00\xce\x00\x01"
        b"\x00\x00\xafsync_interval_s\xcb@N\x00\x00\x00\x00\x00\x00",
    ),
    (
        m.GetCluster(),
        b"\x81\xa1q\xaaGetCluster",
    ),
    (
        m.AttrReply(ATTR, False),
        b"\x92\x98\x07\x01\xcd\x03\xe8\x05\xcd\x01\xa4\x00\x00\xc4\x10kkkkkkkkkkkkkkkk\xc2",
    ),
    (
        m.GetAttr(Ino(7)),
        b"\x82\xa1q\xa7GetAttr\xa3ino\x07",
    ),
    (
        m.ResolvePath("/a/b"),
        b"\x82\xa1q\xabResolvePath\xa4path\xa4/a/b",
    ),
    (
        m.LookupReply(ATTR),
        b"\x91\x98\x07\x01\xcd\x03\xe8\x05\xcd\x01\xa4\x00\x00\xc4\x10kkkkkkkkkkkkkkkk",
    ),
    (
        m.LookupReply(None),
        b"\x91\xc0",
    ),
    (
        m.Lookup(Ino(1), "näme"),
        b"\x83\xa1q\xa6Lookup\xa6parent\x01\xa4name\xa5n\xc3\xa4me",
    ),
    (
        m.ListChunk([Entry("a", ATTR)]),
        b"\x91\x91\x92\xa1a\x98\x07\x01\xcd\x03\xe8\x05\xcd\x01\xa4\x00\x00\xc4\x10kkkkkkkkkkkkkkkk",
    ),
    (
        m.ListDir(Ino(1), Ino(6)),
        b"\x83\xa1q\xa7ListDir\xa3ino\x01\xa5after\x06",
    ),
    (
        m.Changes([(Ino(1), ["a", "b"])], True),
        b"\x92\x91\x92\x01\x92\xa1a\xa1b\xc3",
    ),
    (
        m.Watch(),
        b"\x81\xa1q\xa5Watch",
    ),
    (
        m.RefreshReply(1, 2),
        b"\x82\xabdirectories\x01\xa7changed\x02",
    ),
    (
        m.Refresh("/a", True),
        b"\x83\xa1q\xa7Refresh\xa4path\xa2/a\xa9recursive\xc3",
    ),
    (
        m.LoadProgress(1, 2, 3, 4, [("/a", "why")]),
        b"\x85\xb1directories_found\x01\xb0directories_done\x02\xa5files\x03\xa5bytes\x04\xa6failed\x91"
        b"\x92\xa2/a\xa3why",
    ),
    (
        m.VerifyProgress(1, 2, 3, 4, 5, ["a"]),
        b"\x86\xabblocks_done\x01\xacblocks_total\x02\xaabytes_done\x03\xabbytes_total\x04\xa8suspects\x05"
        b"\xa7damaged\x91\xa1a",
    ),
    (
        m.Verify(True),
        b"\x82\xa1q\xa6Verify\xa6repair\xc3",
    ),
    (
        m.LoadMetadata("/a"),
        b"\x82\xa1q\xacLoadMetadata\xa4path\xa2/a",
    ),
    (
        m.MountInfo("/", "s3://b", 1, 2, 3, 4),
        b"\x8a\xa4path\xa1/\xa3url\xa6s3://b\xabdirectories\x01\xa5files\x02\xabhidden_keys\x03\xadserving"
        b"_stale\x04\xa7by_hand\xc2\xa9failing_s\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xa8failures\x00\xaalast_error\xa0",
    ),
    (
        m.AddStore("/a", "s3://b", {"key": "value"}),
        b"\x84\xa1q\xa8AddStore\xa4path\xa2/a\xa3url\xa6s3://b\xa7options\x81\xa3key\xa5value",
    ),
    (
        m.RemoveStore("/a", True),
        b"\x83\xa1q\xabRemoveStore\xa4path\xa2/a\xa7dry_run\xc3",
    ),
    (
        m.Stores([m.StoreInfo(1, "s3://b", {})]),
        b"\x81\xa6stores\x91\x83\xa8store_id\x01\xa3url\xa6s3://b\xa7options\x80",
    ),
    (
        m.GetStores(),
        b"\x81\xa1q\xa9GetStores",
    ),
    (
        m.StoresInUse([1, 3], 4, 2),
        b"\x93\x92\x01\x03\x04\x02",
    ),
    (
        m.WatchStores(),
        b"\x81\xa1q\xabWatchStores",
    ),
    (
        m.WorkerInfo("w", "h:1", "/s", "boot", True, 1, 2),
        b"\x8e\xa4name\xa1w\xa7address\xa3h:1\xa6socket\xa2/s\xachost_boot_id\xa4boot\xa9connected\xc3\xa6"
        b"blocks\x01\xabblock_bytes\x02\xa5state\xa6active\xa6labels\x80\xaecapacity_bytes\x00\xaaro"
        b"om_bytes\x00\xa5epoch\x00\xa7heard_s\xcb\xbf\xf0\x00\x00\x00\x00\x00\x00\xa6silent\xc2",
    ),
    (
        m.MasterStatus(CLUSTER, 1.5, [], []),
        b"\x84\xa7cluster\x84\xaacluster_id\xa1c\xacnamespace_id\xa1n\xa8geometry\x92\xce\x00\x10\x00\x00\xce\x00\x01\x00\x00\xafs"
        b"ync_interval_s\xcb@N\x00\x00\x00\x00\x00\x00\xa8uptime_s\xcb?\xf8\x00\x00\x00\x00\x00\x00\xa6mounts\x90\xa7workers\x90",
    ),
    (
        m.GetMasterStatus(),
        b"\x81\xa1q\xafGetMasterStatus",
    ),
    (
        m.WorkerList([]),
        b"\x81\xa7workers\x90",
    ),
    (
        m.ListWorkers(),
        b"\x81\xa1q\xabListWorkers",
    ),
    (
        m.PinReply(1, 2, 3, 4, 5, ["w"]),
        b"\x86\xa5files\x01\xa5bytes\x02\xacneeded_bytes\x03\xablimit_byte"
        b"s\x04\xaecapacity_bytes\x05\xabunconfirmed\x91\xa1w",
    ),
    (
        m.Pin(["/a"], True),
        b"\x83\xa1q\xa3Pin\xa5paths\x91\xa2/a\xa7dry_run\xc3",
    ),
    (
        m.UnpinReply(["w"]),
        b"\x81\xabunconfirmed\x91\xa1w",
    ),
    (
        m.Unpin(["/a"], True),
        b"\x83\xa1q\xa5Unpin\xa5paths\x91\xa2/a\xa7dry_run\xc3",
    ),
    (
        m.PinInfo("/a", 1, True, 2, 3, 4, 5),
        b"\x87\xa4path\xa2/a\xa9pinned_ns\x01\xa6exists\xc3\xa5files\x02\xa5byte"
        b"s\x03\xaccached_files\x04\xaccached_bytes\x05",
    ),
    (
        m.PinList([m.PinInfo("/a", 1, True, 2, 3, 4, 5)], 6, 7),
        b"\x83\xa4pins\x91\x87\xa4path\xa2/a\xa9pinned_ns\x01\xa6exists\xc3\xa5file"
        b"s\x02\xa5bytes\x03\xaccached_files\x04\xaccached_bytes\x05\xacne"
        b"eded_bytes\x06\xablimit_bytes\x07",
    ),
    (
        m.ListPins(True),
        b"\x82\xa1q\xa8ListPins\xa5sizes\xc3",
    ),
    (
        m.PinnedContents(3, KEY, True),
        b"\x93\x03\xc4\x10kkkkkkkkkkkkkkkk\xc3",
    ),
    (
        m.WatchPins(),
        b"\x81\xa1q\xa9WatchPins",
    ),
    (
        m.PinsApplied(3),
        b"\x82\xa1q\xabPinsApplied\xa6serial\x03",
    ),
    (
        m.StoreInfo(1, "s3://b", {"key": "value"}),
        b"\x83\xa8store_id\x01\xa3url\xa6s3://b\xa7options\x81\xa3key\xa5value",
    ),
    (
        m.ObjectLocation(ATTR, True, 1, "a/b", "tag"),
        b"\x87\xa4attr\x98\x07\x01\xcd\x03\xe8\x05\xcd\x01\xa4\x00\x00\xc4\x10kkkkkkkkkkkkkkkk\xaasup"
        b"erseded\xc3\xa8store_id\x01\xa4path\xa3a/b\xa3tag\xa3tag\xa6pinn"
        b"ed\xc2\xa5quota\x00",
    ),
    (
        m.Resolve(Ino(7)),
        b"\x82\xa1q\xa7Resolve\xa3ino\x07",
    ),
    (
        m.NextLocations([m.ObjectLocation(ATTR, True, 1, "a/b", "tag")], Ino(9)),
        b"\x82\xa5files\x91\x87\xa4attr\x98\x07\x01\xcd\x03\xe8\x05\xcd\x01\xa4\x00\x00\xc4\x10kkkkkkkkkkkk"
        b"kkkk\xaasuperseded\xc3\xa8store_id\x01\xa4path\xa3a/b\xa3tag\xa3"
        b"tag\xa6pinned\xc2\xa5quota\x00\xa5until\t",
    ),
    (
        m.ResolveNext(Ino(7), Ino(8), 64),
        b"\x84\xa1q\xabResolveNext\xa3ino\x07\xa5after\x08\xa5count@",
    ),
    (
        m.ReportChanged(Ino(7)),
        b"\x82\xa1q\xadReportChanged\xa3ino\x07",
    ),
    (
        c.Registered(CLUSTER, [], 7),
        b"\x83\xa7cluster\x84\xaacluster_id\xa1c\xacnamespace_id\xa1n\xa8geometry\x92\xce\x00\x10\x00\x00\xce\x00\x01\x00\x00\xafs"
        b"ync_interval_s\xcb@N\x00\x00\x00\x00\x00\x00\xa6stores\x90\xa5epoch\x07",
    ),
    (
        c.RegisterWorker("w", "h:1", "/s", "boot", 9, "instance", {"rack": "r"}),
        b"\x88\xa1q\xaeRegisterWorker\xa4name\xa1w\xa7address\xa3h:1\xa6socket\xa2/s\xachost_boot_id"
        b"\xa4boot\xaecapacity_bytes\t\xa8instance\xa8instance\xa6labels\x81\xa4rack\xa1r",
    ),
    (
        c.HeldBlock(KEY, 1, 4096),
        b"\x93\xc4\x10kkkkkkkkkkkkkkkk\x01\xcd\x10\x00",
    ),
    (
        c.ReportReply([(KEY, 0)], [], [(KEY, 1)]),
        b"\x93\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x00\x90\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x01",
    ),
    (
        c.Unsettled(2, 70000),
        b"\x92\x02\xce\x00\x01\x11p",
    ),
    (
        c.ReportBlocks(7, [c.HeldBlock(KEY, 0, 9)], [(KEY, 1)], True, True, [(KEY, 2)], [], 5, 6, c.Unsettled(1, 2)),
        b"\x8b\xa1q\xacReportBlocks\xa5epoch\x07\xa5added\x91\x93\xc4\x10kkkkkkkkkkkkkkkk\x00\t\xa7removed\x91"
        b"\x92\xc4\x10kkkkkkkkkkkkkkkk\x01\xa4full\xc3\xa4more\xc3\xa8fetching\x91\x92\xc4\x10kkkkkkkkkkkkkkk"
        b"k\x02\xa8released\x90\xaaroom_bytes\x05\xaecapacity_bytes\x06\xa9unsettled\x92\x01\x02",
    ),
    (
        c.Member("w", "h:1", {"rack": "r"}, 2, 1, "active"),
        b"\x96\xa1w\xa3h:1\x81\xa4rack\xa1r\x02\x01\xa6active",
    ),
    (
        c.Members([]),
        b"\x81\xa7workers\x90",
    ),
    (
        c.WatchMembers(),
        b"\x81\xa1q\xacWatchMembers",
    ),
    (
        c.Holders(["w"]),
        b"\x91\x91\xa1w",
    ),
    (
        c.Locate(KEY, 1),
        b"\x83\xa1q\xa6Locate\xa3key\xc4\x10kkkkkkkkkkkkkkkk\xabblock_index\x01",
    ),
    (
        c.BlockPlace(["w"], "v"),
        b"\x92\x91\xa1w\xa1v",
    ),
    (
        c.BlockPlaces([]),
        b"\x91\x90",
    ),
    (
        c.AskBlocks([(KEY, 1)], True, ["w"]),
        b"\x84\xa1q\xa9AskBlocks\xa6blocks\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x01\xa5lease\xc3\xa7without\x91\xa1w",
    ),
    (
        c.Granted([(KEY, 1)]),
        b"\x91\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x01",
    ),
    (
        c.AskDrops([(KEY, 1)]),
        b"\x82\xa1q\xa8AskDrops\xa6blocks\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x01",
    ),
    (
        c.BlockBytes(2**63, True),
        b"\x92\xcf\x80\x00\x00\x00\x00\x00\x00\x00\xc3",
    ),
    (
        c.ReadBlock(KEY, 1, 2, 3, "held", Ino(7)),
        b"\x87\xa1q\xa9ReadBlock\xa3key\xc4\x10kkkkkkkkkkkkkkkk\xabblock_index\x01\xa6offset\x02\xa6len"
        b"gth\x03\xa6effort\xa4held\xa3ino\x07",
    ),
    (
        c.DoubtBlock(KEY, 1),
        b"\x83\xa1q\xaaDoubtBlock\xa3key\xc4\x10kkkkkkkkkkkkkkkk\xabblock_index\x01",
    ),
    (
        m.TierInfo("ssd", "/t", 1, 2, 3, 4, 5, 6, 0, "down"),
        b"\x8a\xa4kind\xa3ssd\xa4path\xa2/t\xaecapacity_bytes\x01\xaaused_"
        b"bytes\x02\xaereserved_bytes\x03\xa6blocks\x04\xa8partials\x05"
        b"\xa9evictions\x06\xacpinned_bytes\x00\xa5state\xa4down",
    ),
    (
        m.FetchCounters(1, 2, 3, 4, 5, 6, 7, 8),
        b"\x8f\xb1under_store_bytes\x01\xb1under_store_reads\x02\xadpages_fetched\x03\xadblock"
        b"s_sealed\x04\xa7changed\x05\xa7corrupt\x06\xacnot_admitted\x07\xabfiles_ahead\x08\xaapeer_"
        b"bytes\x00\xaapeer_reads\x00\xadpeer_failures\x00\xacserved_bytes\x00\xacserved_reads"
        b"\x00\xa6leases\x00\xa5drops\x00",
    ),
    (
        m.OpenCounts(1, 2),
        b"\x82\xabpassthrough\x01\xa6cached\x02",
    ),
    (
        m.StoreState("s3://b", 0.0, 2, "e"),
        b"\x84\xa6origin\xa6s3://b\xa9failing_s\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xa8failures\x02\xaalast_error\xa1e",
    ),
    (
        m.WorkerStatus("w", "n", 1.5, [], m.FetchCounters(0, 0, 0, 0, 0, 0, 0, 0), m.OpenCounts(0, 0)),
        b"\x89\xa4name\xa1w\xacnamespace_id\xa1n\xa8uptime_s\xcb?\xf8\x00\x00\x00\x00\x00\x00\xa5tiers\x90\xa8counters\x8f\xb1u"
        b"nder_store_bytes\x00\xb1under_store_reads\x00\xadpages_fetched\x00\xadblocks_s"
        b"ealed\x00\xa7changed\x00\xa7corrupt\x00\xacnot_admitted\x00\xabfiles_ahead\x00\xaapeer_byt"
        b"es\x00\xaapeer_reads\x00\xadpeer_failures\x00\xacserved_bytes\x00\xacserved_reads\x00\xa6l"
        b"eases\x00\xa5drops\x00\xa5opens\x82\xabpassthrough\x00\xa6cached\x00\xa6stores\x90\xadmaster_awa"
        b"y_s\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xabopen_stores\x00",
    ),
    (
        m.GetWorkerStatus(),
        b"\x81\xa1q\xafGetWorkerStatus",
    ),
    (
        m.PromoteReply(True),
        b"\x92\xc3\xa0",
    ),
    (
        m.Promote(Ino(7)),
        b"\x85\xa1q\xa7Promote\xa3ino\x07\xa7promote\xc0\xaabackground\xc2\xa6reader\x00",
    ),
    (
        m.FetchReply(-5, [(0, 3)]),
        b"\x93\xfb\x91\x92\x00\x03\xc0",
    ),
    (
        m.FetchReply(0, [], 2**63),
        b"\x93\x00\x90\xcf\x80\x00\x00\x00\x00\x00\x00\x00",
    ),
    (
        m.Fetch(Ino(7), 1, 4096, 65536, -5),
        b"\x88\xa1q\xa5Fetch\xa3ino\x07\xabblock_index\x01\xa6offset\xcd\x10\x00\xa6length"
        b"\xce\x00\x01\x00\x00\xa4held\xfb\xaaunreadable\xc2\xa7promote\xc0",
    ),
    (
        m.OpenedReply(True, ["/t"]),
        b"\x92\xc3\x91\xa2/t",
    ),
    (
        m.Free([(KEY, 3)]),
        b"\x82\xa1q\xa4Free\xa6blocks\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x03",
    ),
    (
        m.FreeReply(2, 4096, 1),
        b"\x94\x02\xcd\x10\x00\x01\x00",
    ),
    (
        m.GetBlockStatus(KEY, 3),
        b"\x83\xa1q\xaeGetBlockStatus\xa3key\xc4\x10kkkkkkkkkkkkkkkk\xabblock_index\x03",
    ),
    (
        m.BlockStatus("ssd:/tier", 4096),
        b"\x92\xa9ssd:/tier\xcd\x10\x00",
    ),
    (
        m.Opened([(KEY, 0)], m.OpenCounts(1, 0)),
        b"\x83\xa1q\xa6Opened\xa6blocks\x91\x92\xc4\x10kkkkkkkkkkkkkkkk\x00\xa6counts\x82\xabpassthrough"
        b"\x01\xa6cached\x00",
    ),
    (
        k.BlockTask(9, "copy", KEY, 3, 4096, Ino(7), "if-space", ["w2"]),
        b"\x98\t\xa4copy\xc4\x10kkkkkkkkkkkkkkkk\x03\xcd\x10\x00\x07\xa8if-space\x91\xa2w2",
    ),
    (
        k.Tasks([k.BlockTask(9, "load", KEY, 3, 4096)]),
        b"\x91\x91\x98\t\xa4load\xc4\x10kkkkkkkkkkkkkkkk\x03\xcd\x10\x00\x00\xa6always\x90",
    ),
    (
        k.WatchTasks(),
        b"\x81\xa1q\xaaWatchTasks",
    ),
    (
        k.TaskOutcome(9, "full", 0, "no room"),
        b"\x94\t\xa4full\x00\xa7no room",
    ),
    (
        k.TasksDone([k.TaskOutcome(9, "done", 4096)]),
        b"\x82\xa1q\xa9TasksDone\xa8outcomes\x91\x94\t\xa4done\xcd\x10\x00\xa0",
    ),
    (
        k.BlockLength(4096),
        b"\x91\xcd\x10\x00",
    ),
    (
        k.MeasureBlock(KEY, 3),
        b"\x83\xa1q\xacMeasureBlock\xa3key\xc4\x10kkkkkkkkkkkkkkkk\xabblock_index\x03",
    ),
    (
        k.JobSpec("load", ["/a"], ["w1"], 2, 1000, "if-space"),
        b"\x86\xa4kind\xa4load\xa5paths\x91\xa2/a\xa7workers\x91\xa2w1\xa8replic"
        b"as\x02\xb1limit_bytes_per_s\xcd\x03\xe8\xa7promote\xa8if-spac"
        b"e",
    ),
    (
        k.JobCounts(9, 8, 7, 6, 5, 4, 3, 2, 1),
        b"\x8c\xa5total\t\xabtotal_bytes\x08\xa4done\x07\xaadone_bytes\x06\xa6"
        b"failed\x05\xa6copies\x04\xaccopied_bytes\x03\xa7present\x02\xa5d"
        b"rops\x01\xaddropped_bytes\x00\xa6in_use\x00\xa6pinned\x00",
    ),
    (
        k.JobInfo(1, k.JobSpec("drain", workers=["w1"]), "running", k.JobCounts(1), [("/a", "gone")], 5, 0, "w1"),
        b"\x88\xa6job_id\x01\xa4spec\x86\xa4kind\xa5drain\xa5paths\x90\xa7worker"
        b"s\x91\xa2w1\xa8replicas\x01\xb1limit_bytes_per_s\x00\xa7promo"
        b"te\xa6always\xa5state\xa7running\xa6counts\x8c\xa5total\x01\xabt"
        b"otal_bytes\x00\xa4done\x00\xaadone_bytes\x00\xa6failed\x00\xa6co"
        b"pies\x00\xaccopied_bytes\x00\xa7present\x00\xa5drops\x00\xaddrop"
        b"ped_bytes\x00\xa6in_use\x00\xa6pinned\x00\xa8failures\x91\x92\xa2/a"
        b"\xa4gone\xaacreated_ns\x05\xa8ended_ns\x00\xa9waits_for\xa2w1",
    ),
    (
        k.StartJob(k.JobSpec("free", ["/a"]), True),
        b"\x83\xa1q\xa8StartJob\xa4spec\x86\xa4kind\xa4free\xa5paths\x91\xa2/a\xa7w"
        b"orkers\x90\xa8replicas\x01\xb1limit_bytes_per_s\x00\xa7pro"
        b"mote\xa6always\xa7dry_run\xc3",
    ),
    (
        k.GetJob(1),
        b"\x82\xa1q\xa6GetJob\xa6job_id\x01",
    ),
    (
        k.JobList([]),
        b"\x81\xa4jobs\x90",
    ),
    (
        k.ListJobs(),
        b"\x81\xa1q\xa8ListJobs",
    ),
    (
        k.CancelJob(1),
        b"\x82\xa1q\xa9CancelJob\xa6job_id\x01",
    ),
    (
        k.UndrainWorker("w1"),
        b"\x82\xa1q\xadUndrainWorker\xa4name\xa2w1",
    ),
    (
        k.ForgetWorker("w1"),
        b"\x82\xa1q\xacForgetWorker\xa4name\xa2w1",
    ),
    (
        q.QuotaInfo("/a", 10, 9, 2, 7, True, ["w1"]),
        b"\x87\xa4path\xa2/a\xablimit_bytes\n\xaaused_by"
        b"tes\t\xa7refused\x02\xa6set_ns\x07\xa6exists\xc3\xab"
        b"unconfirmed\x91\xa2w1",
    ),
    (
        q.SetQuota("/a", 1 << 40),
        b"\x83\xa1q\xa8SetQuota\xa4path\xa2/a\xablimit_bytes\xcf\x00\x00\x01\x00\x00\x00\x00\x00",
    ),
    (
        q.RemoveQuota("/a"),
        b"\x83\xa1q\xabRemoveQuota\xa4path\xa2/a\xa7dry_run\xc2",
    ),
    (
        q.QuotaList([q.QuotaInfo("/a", 10, 9, 2, 7, False)]),
        b"\x81\xa6quotas\x91\x87\xa4path\xa2/a\xablimit_bytes"
        b"\n\xaaused_bytes\t\xa7refused\x02\xa6set_ns\x07"
        b"\xa6exists\xc2\xabunconfirmed\x90",
    ),
    (
        q.ListQuotas(),
        b"\x81\xa1q\xaaListQuotas",
    ),
    (
        q.QuotaRule(3, "/a/b", 10, 2),
        b"\x94\x03\xa4/a/b\n\x02",
    ),
    (
        q.QuotaContents(5, 3, KEY),
        b"\x96\x05\x03\xc4\x10kkkkkkkkkkkkkkkk\xc2\x90\xc2",
    ),
    (
        q.QuotaContents(5, 0, b"", True, [q.QuotaRule(3, "/a/b", 10, 0)], True),
        b"\x96\x05\x00\xc4\x00\xc3\x91\x94\x03\xa4/a/b\n\x00\xc3",
    ),
    (
        q.WatchQuotas(),
        b"\x81\xa1q\xabWatchQuotas",
    ),
    (
        q.QuotasApplied(5),
        b"\x82\xa1q\xadQuotasApplied\xa6serial\x05",
    ),
    (
        q.QuotaUse(3, 100, 120, 7, 50, 30),
        b"\x96\x03dx\x072\x1e",
    ),
    (
        q.QuotaGrant(3, 150, True),
        b"\x93\x03\xcc\x96\xc3",
    ),
    (
        q.QuotaGrants([q.QuotaGrant(3, 150)]),
        b"\x91\x91\x93\x03\xcc\x96\xc2",
    ),
    (
        q.ReportQuotas(5, [q.QuotaUse(3, 100, 120, 7)]),
        b"\x83\xa1q\xacReportQuotas\xa6serial\x05\xa4uses\x91\x96\x03dx\x07\x00\x00",
    ),
    (
        VOLUME,
        b"\x88\xa2id\xa5vol-1\xa4name\xa5pvc-1\xa4path\xae/volumes/vol-1\xa3url\xa6s3://b\xabquota_bytes"
        b"\n\xaaused_bytes\t\xa7context\x81\xa1a\xa1b\xa9created_s\xcb?\xf8\x00\x00\x00\x00\x00\x00",
    ),
    (
        v.CreateVolume("pvc-1", "s3://b", "", {"key": "value"}, 10, {"a": "b"}, True),
        b"\x88\xa1q\xacCreateVolume\xa4name\xa5pvc-1\xa3url\xa6s3://b\xa4path\xa0\xa7options\x81\xa3key"
        b"\xa5value\xabquota_bytes\n\xa7context\x81\xa1a\xa1b\xb0replaces_options\xc3",
    ),
    (
        v.CreateVolume("pvc-2", path="/a"),
        b"\x88\xa1q\xacCreateVolume\xa4name\xa5pvc-2\xa3url\xa0\xa4path\xa2/a\xa7options\x80\xabquota_byt"
        b"es\x00\xa7context\x80\xb0replaces_options\xc2",
    ),
    (
        v.DeleteVolume("vol-1"),
        b"\x82\xa1q\xacDeleteVolume\xa2id\xa5vol-1",
    ),
    (
        v.GetVolume("vol-1"),
        b"\x82\xa1q\xa9GetVolume\xa2id\xa5vol-1",
    ),
    (
        v.VolumeList([VOLUME], "vol-1"),
        b"\x82\xa7volumes\x91\x88\xa2id\xa5vol-1\xa4name\xa5pvc-1\xa4path\xae/volumes/vol-1\xa3url\xa6s3:"
        b"//b\xabquota_bytes\n\xaaused_bytes\t\xa7context\x81\xa1a\xa1b\xa9created_s\xcb?\xf8\x00\x00\x00"
        b"\x00\x00\x00\xa4next\xa5vol-1",
    ),
    (
        v.ListVolumes("vol-1", 5),
        b"\x83\xa1q\xabListVolumes\xa5after\xa5vol-1\xa5limit\x05",
    ),
    (
        v.SetVolumeQuota("vol-1", 1 << 40),
        b"\x83\xa1q\xaeSetVolumeQuota\xa2id\xa5vol-1\xabquota_bytes\xcf\x00\x00\x01\x00\x00\x00\x00\x00",
    ),
    (
        v.RenewVolume("vol-1", {"key": "value"}),
        b"\x83\xa1q\xabRenewVolume\xa2id\xa5vol-1\xa7options\x81\xa3key\xa5value",
    ),
    (
        MOUNT,
        b"\x8a\xa2id\xa5vol-1\xaamountpoint\xa6/mnt/a\xa4path\xae/volumes/vol-1\xa7options\x81\xa3gid\xa17\xa5state"
        b"\xa8starting\xa3why\xb0its server ended\xa6device\xa40:52\xaaserver_pid\x07\xadkeeper_socket\xa6/run/k"
        b"\xa8restarts\x02",
    ),
    (
        n.EnsureMount("vol-1", "/mnt/a", "/volumes/vol-1", {"gid": "7"}),
        b"\x85\xa1q\xabEnsureMount\xa2id\xa5vol-1\xaamountpoint\xa6/mnt/a\xa4path\xae/volumes/vol-1\xa7options\x81\xa3"
        b"gid\xa17",
    ),
    (
        n.RemoveMount("/mnt/a"),
        b"\x82\xa1q\xabRemoveMount\xaamountpoint\xa6/mnt/a",
    ),
    (
        n.ListMounts(),
        b"\x81\xa1q\xaaListMounts",
    ),
    (
        n.MountList([]),
        b"\x81\xa6mounts\x90",
    ),
]

ALL = pytest.mark.parametrize(("message", "golden"), MESSAGES, ids=[type(each).__name__ for each, _ in MESSAGES])
MODULES = (m, c, k, q, v, n)
CLASSES = [
    each
    for module in MODULES
    for _, each in inspect.getmembers(module, inspect.isclass)
    if each.__module__ == module.__name__ and issubclass(each, msgspec.Struct)
]
REQUESTS = [each for each in CLASSES if each.__struct_config__.tag]


def test_every_message_has_its_golden_bytes() -> None:
    missing = {each.__name__ for each in CLASSES} - {type(message).__name__ for message, _ in MESSAGES}
    assert not missing, "add what it is encoded as to MESSAGES"
    for request in REQUESTS:
        answer = reply_type(request)
        assert answer.__module__ not in [module.__name__ for module in MODULES] or answer in CLASSES


@ALL
def test_a_message_is_encoded_as_ever(message: Any, golden: bytes) -> None:
    assert msgspec.msgpack.encode(message) == golden
    assert msgspec.msgpack.decode(golden, type=type(message)) == message


@ALL
def test_a_message_cut_anywhere_is_refused(message: Any, golden: bytes) -> None:
    for length in range(len(golden)):
        with pytest.raises(msgspec.MsgspecError):
            msgspec.msgpack.decode(golden[:length], type=type(message))


@pytest.mark.parametrize(
    "message", [each for each, _ in MESSAGES if type(each) in REQUESTS], ids=lambda each: type(each).__name__
)
def test_a_request_is_found_among_all(message: Any) -> None:
    assert RequestDecoder(REQUESTS).decode(msgspec.msgpack.encode(message)) == message


# ---- frames --------------------------------------------------------------------------------------------------------

HELLO = (
    bytes.fromhex(
        "6346 01 01"  # magic, version, HELLO
        "00000000 0000000000000000"  # no descriptors, no id
        "26000000 00000000"  # 38 bytes of meta, no payload
    )
    + b"\x83\xa4role\xa6client\xa4name\xa1n\xacnamespace_id\xa4abcd"
)
REQUEST = bytes.fromhex("6346 01 02 00000000 0500000000000000 10000000 00000000") + b"\x82\xa1q\xa7GetAttr\xa3ino\x07"
CANCEL = bytes.fromhex("6346 01 06 00000000 0500000000000000 00000000 00000000")
CREDIT = bytes.fromhex("6346 01 07 00000000 0500000000000000 01000000 00000000 03")
REPLY = bytes.fromhex("6346 01 03 00000000 0500000000000000 01000000 05000000 90") + b"bytes"
ITEM = bytes.fromhex("6346 01 04 00000000 0500000000000000 02000000 00000000 9190")
ERROR = bytes.fromhex("6346 01 05 00000000 0500000000000000 13000000 00000000") + b"\x93\xa9not-found\xa6no way\x90"
ASKED = [REQUEST, CREDIT, CANCEL]
ANSWERED = [REPLY, ITEM, ERROR]
NAMES = Hello("client", "n", "abcd")


def test_frames_are_encoded_as_ever() -> None:
    asking, answering = Connection(asking=True), Connection(asking=False)
    assert asking.hello(NAMES) == HELLO
    answering.hello(NAMES)
    assert asking.head(FrameKind.REQUEST, 5, m.GetAttr(Ino(7))) == REQUEST
    assert asking.head(FrameKind.CANCEL, 5) == CANCEL
    assert asking.head(FrameKind.CREDIT, 5, 3) == CREDIT
    assert answering.head(FrameKind.REPLY, 5, m.Done(), 5) + b"bytes" == REPLY
    assert answering.head(FrameKind.ITEM, 5, m.ListChunk([])) == ITEM
    assert answering.head(FrameKind.ERROR, 5, ErrorMeta("not-found", "no way")) == ERROR


def feed(connection: Connection, *parts: bytes) -> list[Frame]:
    """As a socket would: never more than the buffer that is offered."""
    frames = []
    for part in parts:
        while part:
            with connection.get_buffer() as buffer:
                assert len(buffer) > 0
                count = min(len(buffer), len(part))
                buffer[:count] = part[:count]
            part = part[count:]
            frames += connection.buffer_updated(count)
    return frames


@pytest.mark.parametrize("asking", [True, False])
def test_frames_cut_at_every_byte(asking: bool) -> None:
    frames = ANSWERED if asking else ASKED
    stream = b"".join([HELLO, *frames])
    whole = feed(Connection(asking=asking), stream)
    assert [frame.kind for frame in whole] == [1, *(frame[3] for frame in frames)]
    for cut in range(1, len(stream)):
        assert feed(Connection(asking=asking), stream[:cut], stream[cut:]) == whole
    assert feed(Connection(asking=asking), *(stream[at : at + 1] for at in range(len(stream)))) == whole


# ---- damage --------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, frames: list[bytes]) -> bytes:
    """A legal stream with bytes flipped, cut out, put in, or played twice."""
    stream = bytearray(HELLO + b"".join(draw(st.lists(st.sampled_from(frames), max_size=6))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(stream)))
        end = draw(st.integers(at, min(len(stream), at + 40)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if at < len(stream):
                stream[at] ^= draw(st.integers(1, 255))
            case "cut":
                del stream[at:end]
            case "insert":
                stream[at:at] = draw(st.binary(max_size=40))
            case "repeat":
                stream[at:at] = stream[at:end]
    return bytes(stream)


@given(damaged(ASKED) | damaged(ANSWERED), st.booleans(), st.integers(1, 100))
def test_damage_is_a_protocol_error_or_a_legal_frame(stream: bytes, asking: bool, chunk: int) -> None:
    connection = Connection(asking=asking)
    taken = 0
    try:
        for at in range(0, len(stream), chunk):
            for frame in feed(connection, stream[at : at + chunk]):
                taken += 24 + len(frame.meta) + len(frame.payload)
                assert len(frame.meta) <= connection.limits.meta_bytes
                assert frame.kind in ((3, 4, 5) if asking else (2, 6, 7)) or (taken == len(HELLO) and frame.kind == 1)
    except RemoteProtocolError:
        with pytest.raises(LocalProtocolError):
            connection.buffer_updated(0)
    assert taken <= len(stream)


def test_room_is_made_as_a_body_arrives() -> None:
    """A header alone costs whoever answers next to nothing, whatever it announces."""
    connection = Connection(asking=False)
    feed(connection, HELLO)
    length = connection.limits.meta_bytes
    feed(connection, bytes.fromhex("6346 01 02 00000000 0500000000000000") + length.to_bytes(4, "little") + bytes(4))
    arrived = 0
    while arrived < length - 1:
        with connection.get_buffer() as buffer:
            assert len(buffer) <= max(1 << 16, arrived)
            count = min(len(buffer), length - 1 - arrived)
        arrived += count
        assert connection.buffer_updated(count) == []
    connection.get_buffer().release()
    assert len(connection.buffer_updated(1)) == 1
