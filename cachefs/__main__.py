"""`python -m cachefs` is `cachefs`."""

from cachefs.cli import main

main(prog_name="cachefs")
