"""The command line: parses settings once, wires the objects together, and owns signals, logging and exit codes."""

from cachefs.cli.main import main

__all__ = ["main"]
