"""`cachefs-csi`: the command line of the driver."""

from __future__ import annotations

import click


@click.group()
def main() -> None:
    """The CSI driver of cachefs."""
