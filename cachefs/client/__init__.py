"""What any front end uses: a cache of names and attributes, sealed files by descriptor, reads through the worker."""

from cachefs.client.client import Client, open_client
from cachefs.client.config import ClientConfig
from cachefs.client.dirs import DirReader
from cachefs.client.files import ContentReader
from cachefs.client.metadata import Metadata

__all__ = ["Client", "ClientConfig", "ContentReader", "DirReader", "Metadata", "open_client"]
