"""The kernel driver: one session on /dev/fuse, serving an `Operations`.

One task reads the device. After each readable event it drains the device, and answers inline whatever the operations
know from memory; only what has to wait gets a task. Measured against a thread with blocking reads: docs/decisions.md.

Requests that wait, by `unique`:

    read from the device -> x_nowait -> answered
                                |
                                v WouldBlock
                      a free task?  no -> queued (bounded by the kernel: one per waiting caller, plus max_background)
                                |
                                v
                             running x -> answered; by INTERRUPT: cancelled -> EINTR

An answer that the kernel no longer wants (ENOENT: the caller was killed meanwhile) is undone: the handle it would have
opened is released, the node it would have referred to forgotten.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import trio

from cachefs.fuse.errno import EXPECTED, errno_of
from cachefs.fuse.protocol import AttrReply, DirEntry, EntryReply, OpenDirReply, OpenReply, Operations
from cachefs.fusewire import (
    KERNEL_MAJOR,
    NO_REPLY,
    UNIQUE_RESEND,
    WRITES,
    InitOptions,
    Negotiated,
    Opcode,
    OpenFlag,
    attr_reply,
    data_header,
    dirent_limit,
    empty_reply,
    entry_reply,
    error_reply,
    init_reply,
    major_reply,
    negative_entry_reply,
    negotiate,
    open_reply,
    pack_dirents,
    parse_batch_forget,
    parse_forget,
    parse_header,
    parse_init,
    parse_interrupt,
    parse_name,
    parse_open,
    parse_read,
    parse_release,
    statfs_reply,
)
from cachefs.model import ConfigError, LocalProtocolError, RemoteProtocolError

logger = logging.getLogger(__name__)

type_Handler = Callable[[int, int, bytes], None]
