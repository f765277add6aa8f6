"""A second S3 server on loopback, moto: it takes keys that SeaweedFS refuses, and checks no signatures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cachefs.model import CachefsError
from cachefs.testing.s3server import S3Server

# It ends when the pipe from us does: with the block, and also when we are killed.
_SCRIPT = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@contextmanager
def running_moto() -> Iterator[S3Server]:
    """Keeps its data in memory. Raises CachefsError when it does not come up."""
    command = [sys.executable, "-W", "ignore", "-c", _SCRIPT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().decode().strip()
            if not port:
                raise CachefsError("no second S3 server: install cachefs[test]")
            yield S3Server(f"http://127.0.0.1:{port}", "cachefs-test", "cachefs-test-secret", process.pid)
        finally:
            process.stdin.close()
            process.kill()
