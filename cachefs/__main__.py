"""`python -m cachefs` is `cachefs`."""

from cachefs.cli import main

main()
