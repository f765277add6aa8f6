"""Makes the Python of `proto/csi.proto` anew: python -m cachefs_csi.generate [DIRECTORY]. Needs grpcio-tools.

What it makes is committed, so that neither a build nor an installation needs a compiler of protocols. The calls need no
code that is made: `calls` reads them in the descriptors.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parent
PROTO = PACKAGE.parent / "proto"


def generate(directory: Path) -> None:
    """Write csi_pb2.py and csi_pb2.pyi into it. Raises RuntimeError for a mistake, which the compiler has told."""
    # Here, because only who changes the protocol has it.
    from grpc_tools import protoc

    well_known = files("grpc_tools") / "_proto"
    made = [f"--{kind}_out={directory}" for kind in ("python", "pyi")]
    status = protoc.main(["protoc", f"-I{PROTO}", f"-I{well_known}", *made, str(PROTO / "csi.proto")])
    if status != 0:
        raise RuntimeError(f"the protocol was not compiled (status {status})")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
