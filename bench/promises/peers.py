"""Against other file systems of the kind. In memory, all of them: what is dropped then is the page cache of the mounts,
not the caches.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.harness import Up, run_readers
from bench.pagecache import CannotDrop, drop_page_cache
from bench.promises.place import BUCKET, MIB, SMALL_BYTES, WORKLOAD, Place, measure, sh
from bench.results import Gap, Measure
from bench.server import make_bucket, running_server
from bench.systems.base import Missing, Mounted, Source
from bench.systems.registry import SYSTEMS

PREFIX = "data"
RCLONE = "warm 110 KB files, open + read + close / rclone with a full cache"
JUICEFS = "warm 110 KB files, open + read + close / JuiceFS, cached, page cache dropped"


def peers(place: Place) -> Iterator[Measure | Gap]:
    directory = Path(tempfile.mkdtemp(prefix="cachefs-bench-", dir="/dev/shm"))
    try:
        mine = Place(directory, place.amounts)
        with mine.mounted("passthrough") as up, running_server(directory / "s3") as server:
            small = mine.native / "small"
            make_bucket(server.s3, BUCKET)
            objects = ((f"{PREFIX}/small/{each.name}", each.read_bytes()) for each in small.iterdir())
            server.s3.put_objects(BUCKET, objects)
            source = Source(
                endpoint=server.s3.endpoint,
                key=server.s3.key,
                secret=server.s3.secret,
                bucket=BUCKET,
                prefix=PREFIX,
                native=mine.native,
                size_bytes=mine.amounts.small_files * SMALL_BYTES,
                files=mine.amounts.small_files,
                traffic_url=server.traffic_url,
            )
            for name, case, required, ratios in (
                ("rclone", RCLONE, 4.0, warm_ratios),
                ("juicefs", JUICEFS, 2.0, dropped_ratios),
            ):
                where = directory / name
                where.mkdir()
                try:
                    with SYSTEMS[name]().mounted(source, where, 1024 * MIB) as mounted:
                        sh('cat "$1"/small/* > /dev/null', mounted.path)
                        yield measure(case, ratios(mine, up, mounted), required)
                except Missing as error:
                    yield Gap(workload=WORKLOAD, system=name, kind="missing", why=str(error), case=case)
                except CannotDrop as error:
                    yield Gap(workload=WORKLOAD, system=name, kind="skipped", why=str(error), case=case)
                except (RuntimeError, OSError) as error:
                    yield Gap(workload=WORKLOAD, system=name, kind="crashed", why=str(error), case=case)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def warm_ratios(place: Place, up: Up, mounted: Mounted) -> list[float]:
    return list(place.compare("small", {"mount": up.mountpoint, "peer": mounted.path}))


def dropped_ratios(place: Place, up: Up, mounted: Mounted) -> list[float]:
    ratios = []
    for _ in range(place.amounts.rounds):
        speeds = []
        for root in (mounted.path, up.mountpoint):
            drop_page_cache()
            files = [os.path.join(root, "small", f"{number:04}") for number in range(place.amounts.small_files)]
            (result,) = run_readers([{"job": "read_blindly", "files": files}])
            speeds.append(len(files) / result["seconds"])
        ratios.append(speeds[1] / speeds[0])
    return ratios
