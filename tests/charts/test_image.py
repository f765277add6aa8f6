"""The steps of the Dockerfile, without an engine for containers: what they install runs."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import cachefs

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of all stages, with lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def test_what_the_image_installs_runs(tmp_path: Path) -> None:
    build, final = stages()
    places = {path: tmp_path / path.strip("/") for path in ("/src", "/wheels", "/opt/cachefs")}
    (work,) = [rest for word, rest in build if word == "WORKDIR"]
    places[work].mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # `python` and `pip` of the image are this Python's.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@"\n')
    for each in tools.iterdir():
        each.chmod(0o755)
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = 0
    for word, rest in build:
        if word == "COPY":
            *sources, to = rest.split()
            for source in sources:
                copy(ROOT / source, places[work] / (to if to != "./" else source))
        elif word == "RUN":
            command = rest
            for inside, outside in places.items():
                command = re.sub(rf"(?<![\w.]){inside}\b", str(outside), command)
            subprocess.run(["sh", "-c", command], cwd=places[work], env=environment, check=True, timeout=500)
            ran += 1
    assert ran >= 3
    assert ("COPY", "--from=build /opt/cachefs /opt/cachefs") in final
    installed = places["/opt/cachefs"] / "bin"
    # Nothing of this checkout is in the way of what was installed.
    shutil.rmtree(places[work])

    def output(*command: str) -> str:
        done = subprocess.run(
            [installed / command[0], *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=True,
            timeout=120,
        )
        return done.stdout.decode()

    assert cachefs.__version__ in output("cachefs", "version")
    assert "Commands:" in output("cachefs", "--help")
    assert "The CSI driver" in output("cachefs-csi", "--help")
    # What a role needs that is no library of ours.
    output("python", "-c", "import grpc, google.protobuf, s3fs, obstore, prometheus_client")


def copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copy(source, to)


def test_what_is_copied_is_sent_to_the_engine() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    sent = [line.removeprefix("!") for line in lines if line.startswith("!")]
    copied = [source for word, rest in stages()[0] if word == "COPY" for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / each).exists() for each in copied)
    assert any(
        fnmatch.fnmatch("cachefs/__pycache__", line) for line in lines if not line.startswith("!") and line != "*"
    )


def test_the_image_is_not_root_and_both_stages_are_of_one_base() -> None:
    build, final = stages()
    assert {build[0][1].split()[0], final[0][1].split()[0]} == {"${BASE}"}
    (user,) = [rest for word, rest in final if word == "USER"]
    # The one that pods of the chart are.
    assert user == "65532:65532"
    assert json.loads(dict(final)["ENTRYPOINT"]) == ["cachefs"]


@pytest.mark.parametrize("status", [200, 500])
def test_the_health_check_asks_where_the_process_listens(status: int) -> None:
    (check,) = [rest for word, rest in stages()[1] if word == "HEALTHCHECK"]
    command = json.loads(check[check.index("CMD ") + len("CMD ") :])
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        listens = {"CACHEFS_HTTP": f"0.0.0.0:{server.server_address[1]}", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, *command[1:]], env=listens, capture_output=True, timeout=120)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert (done.returncode == 0) == (status == 200)
    assert asked == ["/healthz"]
    # A role that serves nothing of the kind is as healthy as its process is there.
    assert command[0] == "python"
    assert subprocess.run([sys.executable, *command[1:]], env={}, timeout=120).returncode == 0
