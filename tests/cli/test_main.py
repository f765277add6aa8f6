"""How a command starts."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
from cachefs.__main__ import run
sys.argv = ["cachefs", *sys.argv[1:]]
try:
    run()
finally:
    print(gc.isenabled())
"""


def test_garbage_is_collected_again_when_a_command_runs() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "version"], capture_output=True, text=True, check=True)
    version, collects = done.stdout.splitlines()
    assert version.startswith("cachefs ") and collects == "True"
