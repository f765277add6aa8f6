"""`python -m cachefs` is `cachefs`."""

from __future__ import annotations

import gc


def run() -> None:
    # What is imported is no garbage: looking for some takes an eighth of the time in which a command starts. The group
    # switches it on again.
    gc.disable()
    from cachefs.cli import main

    main(prog_name="cachefs")


if __name__ == "__main__":
    run()
