"""Makes the Python of `proto/csi.proto` anew: python -m cachefs_csi.generate [DIRECTORY]. Needs grpcio-tools.

What it makes is committed, so that neither a build nor an installation needs a compiler of protocols.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parent
PROTO = PACKAGE.parent / "proto"
MADE = ("csi_pb2.py", "csi_pb2.pyi", "csi_pb2_grpc.py")


def generate(directory: Path) -> None:
    """Write the files `MADE` into it. Raises RuntimeError when the compiler finds a mistake, which it has told."""
    # Here, because only who changes the protocol has it.
    from grpc_tools import protoc

    well_known = files("grpc_tools") / "_proto"
    arguments = [f"-I{PROTO}", f"-I{well_known}", *(f"--{kind}_out={directory}" for kind in ("python", "pyi"))]
    status = protoc.main(["protoc", *arguments, f"--grpc_python_out={directory}", str(PROTO / "csi.proto")])
    if status != 0:
        raise RuntimeError(f"the protocol was not compiled (status {status})")
    calls = directory / "csi_pb2_grpc.py"
    # It would look for its neighbour among the top-level modules.
    calls.write_text(calls.read_text().replace("\nimport csi_pb2 as ", "\nfrom cachefs_csi import csi_pb2 as "))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
