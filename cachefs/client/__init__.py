"""What any front end uses: a cache of names and attributes, sealed files by descriptor, reads through the worker."""

from cachefs.client.client import Client, Earlier, open_client
from cachefs.client.config import ClientConfig, Timeouts
from cachefs.client.dirs import DirReader
from cachefs.client.files import ContentReader, read_exactly, read_exactly_nowait
from cachefs.client.metadata import ChangedName, Metadata
from cachefs.client.outlasting import pack_names
from cachefs.client.view import View
from cachefs.client.volumes import Volumes, open_volumes
from cachefs.client.workers import Candidate, Workers, ranked

__all__ = [
    "Candidate",
    "ChangedName",
    "Client",
    "ClientConfig",
    "ContentReader",
    "DirReader",
    "Earlier",
    "Metadata",
    "Timeouts",
    "View",
    "Volumes",
    "Workers",
    "open_client",
    "open_volumes",
    "pack_names",
    "ranked",
    "read_exactly",
    "read_exactly_nowait",
]
