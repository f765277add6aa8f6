"""Against other file systems of the kind. In memory, all of them: what is dropped then is the page cache of the mounts,
not the caches.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import msgspec

from bench.children import scratch
from bench.harness import Up, run_readers
from bench.pagecache import CannotDrop, drop_page_cache
from bench.promises.place import BUCKET, MIB, SMALL_BYTES, WORKLOAD, Place, measure, sh
from bench.results import Gap, Measure
from bench.server import make_bucket, running_server
from bench.space import SHARED_MEMORY
from bench.systems.base import Missing, Mounted, Source
from bench.systems.registry import SYSTEMS

Ratios = Callable[[Place, Up, Mounted], list[float]]
PREFIX = "data"
RCLONE = "warm 110 KB files, open + read + close / rclone with a full cache"
JUICEFS = "warm 110 KB files, open + read + close / JuiceFS, cached, page cache dropped"


def peers(place: Place) -> Iterator[Measure | Gap]:
    with scratch(SHARED_MEMORY, "cachefs-bench") as directory:
        # Of the large file nothing is read here.
        mine = Place(directory, msgspec.structs.replace(place.amounts, large_mib=1))
        with mine.mounted("passthrough") as up, running_server(directory / "s3") as s3:
            small = mine.native / "small"
            make_bucket(s3, BUCKET)
            s3.put_objects(BUCKET, ((f"{PREFIX}/small/{each.name}", each.read_bytes()) for each in small.iterdir()))
            source = Source(
                endpoint=s3.endpoint,
                key=s3.key,
                secret=s3.secret,
                bucket=BUCKET,
                prefix=PREFIX,
                native=mine.native,
                size_bytes=mine.amounts.small_files * SMALL_BYTES + MIB,
                files=mine.amounts.small_files + 1,
                traffic_url=s3.metrics_url,
            )
            yield from against(mine, up, source, "rclone", RCLONE, 4.0, warm_ratios)
            yield from against(mine, up, source, "juicefs", JUICEFS, 2.0, dropped_ratios)


def against(
    place: Place, up: Up, source: Source, name: str, case: str, required: float, ratios: Ratios
) -> Iterator[Measure | Gap]:
    where = place.directory / name
    where.mkdir()
    system = SYSTEMS[name]()
    try:
        system.check()
        with system.mounted(source, where, 1024 * MIB) as mounted:
            sh('cat "$1"/small/* > /dev/null', mounted.path)
            system.settle(mounted)
            yield measure(case, ratios(place, up, mounted), required)
    except Missing as error:
        yield Gap(workload=WORKLOAD, system=name, kind="missing", why=str(error), case=case)
    except CannotDrop as error:
        yield Gap(workload=WORKLOAD, system=name, kind="skipped", why=str(error), case=case)
    except (RuntimeError, OSError, SystemExit, subprocess.CalledProcessError) as error:
        yield Gap(workload=WORKLOAD, system=name, kind="failed", why=str(error), case=case)


def warm_ratios(place: Place, up: Up, mounted: Mounted) -> list[float]:
    return list(place.compare("small", {"mount": up.mountpoint, "peer": mounted.path}))


def dropped_ratios(place: Place, up: Up, mounted: Mounted) -> list[float]:
    ratios = []
    roots = [mounted.path, up.mountpoint]
    for _ in range(place.amounts.rounds):
        speeds = {}
        for root in roots:
            drop_page_cache()
            files = [os.path.join(root, "small", f"{number:04}") for number in range(place.amounts.small_files)]
            (result,) = run_readers([{"job": "read_blindly", "files": files}])
            speeds[root] = len(files) / result["seconds"]
        ratios.append(speeds[up.mountpoint] / speeds[mounted.path])
        roots.reverse()
    return ratios
