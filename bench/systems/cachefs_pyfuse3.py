"""cachefs served by libfuse through pyfuse3: what our own session on /dev/fuse is worth."""

from __future__ import annotations

from importlib.metadata import version as version_of

from bench.systems.base import Missing
from bench.systems.cachefs import Cachefs
from cachefs.fuse import why_no_pyfuse3


class CachefsPyfuse3(Cachefs):
    name = "cachefs_pyfuse3"
    title = "cachefs, pyfuse3"
    _flags = ("--driver", "pyfuse3")

    def check(self) -> str:
        version = super().check()
        if (why := why_no_pyfuse3()) is not None:
            raise Missing(f"{why}; pip install 'cachefs[pyfuse3]', which needs a compiler and libfuse3-dev")
        return f"{version}, pyfuse3 {version_of('pyfuse3')}"
