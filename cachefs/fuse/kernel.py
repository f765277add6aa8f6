"""The kernel driver: one session on /dev/fuse, serving an `Operations`.

One task reads the device. After each readable event it drains the device, and answers inline whatever the operations
know from memory; only what has to wait gets a task (see `waiting`). Measured against a thread with blocking reads:
docs/decisions.md.

Errors end requests, never the session: those of the model and OSErrors reach the caller as errno; anything else is a
bug, logged with its traceback, and EIO (see `answers`). The session ends when the kernel says ENODEV (unmounted or
aborted).

What the kernel has been told before can be taken back by `notify_inval_entry` and `notify_everything` (see `notify`).

An answer that the kernel no longer wants (ENOENT) is undone: the handle it would have opened is released, the node it
would have referred to forgotten.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import trio

from cachefs.fuse.answers import REFUSED_OPEN_FLAGS, ErrorAnswers, check_length
from cachefs.fuse.connections import MountError
from cachefs.fuse.kept import Kept
from cachefs.fuse.notify import KnownNames, Notifier
from cachefs.fuse.protocol import AttrReply, DirEntry, EntryReply, OpenDirReply, OpenReply, Operations
from cachefs.fuse.waiting import WaitingRequests
from cachefs.fusewire import (
    INC_EPOCH_MINOR,
    KERNEL_MAJOR,
    NO_REPLY,
    UNIQUE_RESEND,
    WRITES,
    GetxattrRequest,
    InitOptions,
    Negotiated,
    Opcode,
    OpenFlag,
    ReadRequest,
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
    parse_getxattr,
    parse_header,
    parse_init,
    parse_interrupt,
    parse_name,
    parse_open,
    parse_read,
    parse_release,
    parse_start,
    resend_notification,
    statfs_reply,
    xattr_size_reply,
)
from cachefs.model import ConfigError, LocalProtocolError, LogLimiter, RemoteProtocolError
from cachefs.net import open_background

logger = logging.getLogger(__name__)

_DRAIN_LIMIT = 64
"""Requests answered in a row before other tasks get a turn: some 2 ms."""
_LINGER_MS = 1
_DRAIN_LIMIT_S, _DRAIN_POLL_S = 2.0, 0.01
_OPCODE, _NODE = slice(4, 8), slice(16, 24)
_OPEN, _RELEASE = (opcode.to_bytes(4, sys.byteorder) for opcode in (Opcode.OPEN, Opcode.RELEASE))
"""What is looked at before a request is parsed."""
_IS_GONE = (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED)
"""The connection is over."""
_INIT_BUFFER = 1 << 17
"""For read(2) before INIT has settled the size of requests."""

# As plain numbers: operators of enum flags take a microsecond each, which an open has not got to spare.
_OPEN_PASSTHROUGH = int(OpenFlag.NOFLUSH | OpenFlag.PASSTHROUGH)
"""Without KEEP_CACHE: with it, the kernel refuses the answer."""
_OPEN_CACHED = int(OpenFlag.NOFLUSH)
_OPEN_CACHED_KEEP = int(OpenFlag.NOFLUSH | OpenFlag.KEEP_CACHE)
_OPENDIR = int(OpenFlag.CACHE_DIR)
_OPENDIR_KEEP = int(OpenFlag.CACHE_DIR | OpenFlag.KEEP_CACHE)

_Handler = Callable[[int, int, bytes], None]
_Data = bytes | bytearray | memoryview


@dataclass(frozen=True)
class SessionOptions:
    init: InitOptions = field(default_factory=InitOptions)
    xattr: bool = False
    """Ask the operations for extended attributes. Off, the kernel asks once; on, `ls -l` asks twice for each file."""
    max_tasks: int = 256
    """Requests waiting for the cluster at once; more are queued. Bounds memory: a READ is up to 1 MiB."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_tasks <= 1 << 16:
            raise ConfigError("max_tasks", self.max_tasks, "1 to 65536")


class KernelSession:
    def __init__(
        self,
        fd: int,
        operations: Operations,
        options: SessionOptions | None = None,
        *,
        agreed: Negotiated | None = None,
        kept: Kept | None = None,
    ) -> None:
        """`fd`: a non-blocking /dev/fuse file, mounted already; stays the caller's.

        `agreed`: what an earlier server of this connection negotiated. The kernel sends no second INIT, so `serve` has
        it send again what that server left unanswered. The earlier server must be gone.

        `kept`: where handles are recorded before the kernel is told of them.
        """
        self._fd = fd
        self._operations = operations
        self._options = options or SessionOptions()
        self.agreed = agreed
        """None until INIT has come."""
        self.requests: Counter[int] = Counter()
        """How often each `Opcode` was asked. Tests look here to see what the kernel no longer asks."""
        self.observe: Callable[[int, float], None] | None = None
        """Called with the opcode of each request that is done with, and the seconds from its coming to its answer."""
        self._goes_on = False
        """The request that is being looked at has to wait."""
        self._buffer_size = agreed.buffer_size if agreed is not None else _INIT_BUFFER
        self._no_open = agreed is not None and agreed.no_open
        self._kept = kept
        self._is_successor = agreed is not None
        self._reading = trio.CancelScope()
        self.known_names: KnownNames = list
        """(parent node, name) of all that the kernel may have been told. For kernels before 6.16, see `notify`."""
        self._notifier: Notifier | None = None
        self._waiting: WaitingRequests | None = None
        self._task_status: trio.TaskStatus[Negotiated] = trio.TASK_STATUS_IGNORED
        self._log = LogLimiter(logger)
        self._errors = ErrorAnswers()
        self._late: deque[bytes] = deque()
        """RELEASEs, carried out after the next request that is none, or when none comes soon."""
        self._handlers = self._table()

    async def serve(self, *, task_status: trio.TaskStatus[Negotiated] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the mount ends, which is a normal return. Started once the kernel and we have agreed.

        Cancelled: requests in progress stay unanswered, for a successor; without one, unmount and close the device.
        Raises LocalProtocolError if the device is not mounted, RemoteProtocolError if the kernel is too old, MountError
        if the mount ends before they have agreed.
        """
        if self._waiting is not None:
            raise LocalProtocolError("a session serves once")
        self._task_status = task_status
        async with open_background() as nursery:
            self._waiting = WaitingRequests(nursery, self._options.max_tasks)
            try:
                if self.agreed is not None and not self._resume(self.agreed):
                    return
                with self._reading:
                    await self._read_device()
                if self._reading.cancelled_caught:
                    await self._answer_rest()
            finally:
                if self._notifier is not None:
                    self._notifier.close()
        logger.info("session ended requests=%d", self.requests.total())
        if self.agreed is None and not self._reading.cancelled_caught:
            raise MountError("the mount was taken away before it was ready", errno.ENODEV)

    def drain(self) -> None:
        """Read no more; `serve` returns when what was read is answered, or after two seconds. What is not answered then
        is for a successor, who must not begin before.
        """
        self._reading.cancel()

    async def _answer_rest(self) -> None:
        assert self._waiting is not None
        with trio.move_on_after(_DRAIN_LIMIT_S):
            while self._waiting:  # noqa: ASYNC110  rare, and over soon
                await trio.sleep(_DRAIN_POLL_S)

    # ---- what the kernel believes ----------------------------------------------------------------------------------

    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool) -> None:
        """The kernel asks again for this name before it believes in it. Soon, and without waiting; for directories
        `expire_only`, so that those who stand in one notice nothing.
        """
        if self._notifier is not None:
            self._notifier.entry(parent, name, expire_only=expire_only)

    def notify_everything(self) -> None:
        """The kernel asks again for every name. Soon, and without waiting."""
        if self._notifier is not None:
            self._notifier.everything()

    def _set_up_notifier(self, agreed: Negotiated) -> None:
        self._notifier = Notifier(
            self._fd, inc_epoch=agreed.kernel_minor >= INC_EPOCH_MINOR, known_names=lambda: self.known_names()
        )

    # ---- the device ------------------------------------------------------------------------------------------------

    async def _read_device(self) -> None:
        """Until the connection is gone."""
        assert self._waiting is not None
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            for _ in range(_DRAIN_LIMIT):
                try:
                    request = os.read(self._fd, self._buffer_size)
                except BlockingIOError:
                    # A busy reader asks again in no time. Waiting for that here spares the way through the scheduler,
                    # which costs as much as the answer; nobody else is kept waiting for long.
                    if not self._waiting and poll.poll(_LINGER_MS):
                        continue
                    break
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    if error.errno == errno.EPERM:
                        raise LocalProtocolError("the device is not mounted") from error
                    if error.errno not in (errno.ENOENT, errno.EINTR):  # ENOENT: the caller went away meanwhile
                        raise
                    continue
                kind = request[_OPCODE]
                if kind == _RELEASE:
                    # Nobody waits for it, but whoever closed a file may be opening the next: that one is answered
                    # first, and this one while it is being read.
                    self._late.append(request)
                    continue
                # How a file is opened depends on whether it is open: what was closed before is.
                if kind == _OPEN and self._late and any(late[_NODE] == request[_NODE] for late in self._late):
                    self._release_late()
                self._dispatch(request)
                self._release_late()
            self._release_late()

    def _release_late(self) -> None:
        while self._late:
            self._dispatch(self._late.popleft())

    def _dispatch(self, request: bytes) -> None:
        try:
            opcode, unique, node = parse_start(request)
        except RemoteProtocolError as error:
            # Nobody to answer to.
            self._log.log(logging.ERROR, "dropped", "request dropped error=%s", error)
            return
        self.requests[opcode] += 1
        self._goes_on = False
        began = perf_counter()
        try:
            if self.agreed is None and opcode != Opcode.INIT:
                raise RemoteProtocolError("request before INIT")
            handler = self._handlers.get(opcode)
            if handler is not None:
                handler(unique, node, request)
            elif opcode not in NO_REPLY:
                # The kernel remembers this answer for most opcodes, and then does without.
                self._reply(error_reply(unique, errno.EROFS if opcode in WRITES else errno.ENOSYS))
        except _InitFailed as error:
            raise error.reason from None
        except Exception as error:
            self._fail(unique, opcode, error)
        if self.observe is not None and not self._goes_on:
            self.observe(opcode, perf_counter() - began)

    def _table(self) -> dict[int, _Handler]:
        return {
            Opcode.INIT: self._init,
            Opcode.DESTROY: self._destroy,
            Opcode.INTERRUPT: self._interrupt,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: partial(self._readdir, Opcode.READDIR),
            Opcode.READDIRPLUS: partial(self._readdir, Opcode.READDIRPLUS),
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: partial(self._getxattr, Opcode.GETXATTR),
            Opcode.LISTXATTR: partial(self._getxattr, Opcode.LISTXATTR),
        }

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _reply(self, answer: bytes, data: _Data | None = None) -> bool:
        """False if the kernel no longer wants it. A write to the device never blocks; 1 MiB is a copy of 0.1 ms."""
        try:
            if data is None:
                os.write(self._fd, answer)
            else:
                os.writev(self._fd, (answer, data))
        except OSError as error:
            if error.errno == errno.EINVAL:
                # The kernel has ended the request with an error of its own.
                start, length = answer[:16].hex(), len(answer)
                self._log.log(
                    logging.ERROR, "refused", "answer refused by the kernel answer=%s bytes=%d", start, length
                )
            elif error.errno not in (errno.ENOENT, *_IS_GONE):
                raise
            return False
        return True

    def _fail(self, unique: int, opcode: int, error: Exception) -> None:
        """Log an error and answer with it. Never raises."""
        code = self._errors.errno_for(opcode, error)
        if opcode in NO_REPLY:
            return
        try:
            self._reply(error_reply(unique, code))
        except OSError as reply_error:
            self._errors.lost(opcode, reply_error)

    def _later(self, unique: int, opcode: int, work: Callable[[], Awaitable[None]]) -> None:
        assert self._waiting is not None
        self._goes_on = True
        if self.observe is not None:
            work = partial(self._observed, opcode, work, perf_counter())
        self._waiting.add(unique, work, partial(self._fail, unique, opcode))

    async def _observed(self, opcode: int, work: Callable[[], Awaitable[None]], began: float) -> None:
        try:
            await work()
        finally:
            if self.observe is not None:
                self.observe(opcode, perf_counter() - began)

    # ---- the connection --------------------------------------------------------------------------------------------

    def _init(self, unique: int, node: int, request: bytes) -> None:
        if self.agreed is not None:
            raise RemoteProtocolError("a second INIT")
        try:
            offer = parse_init(request)
            if offer.major > KERNEL_MAJOR:
                self._reply(major_reply(unique))  # an INIT that we understand follows
                return
            self.agreed = agreed = negotiate(offer, self._options.init)
        except RemoteProtocolError as error:
            self._reply(error_reply(unique, errno.EPROTO))
            raise _InitFailed(error) from error
        self._buffer_size = agreed.buffer_size
        self._no_open = agreed.no_open
        self._reply(init_reply(unique, agreed))
        self._set_up_notifier(agreed)
        logger.info(
            "session started fuse=%d.%d offered=%#x granted=%#x passthrough=%s max_read=%d",
            *(offer.major, offer.minor, offer.flags, agreed.flags, agreed.passthrough, agreed.max_read),
        )
        self._task_status.started(agreed)

    def _resume(self, agreed: Negotiated) -> bool:
        """False if the mount has ended meanwhile."""
        if not agreed.resend:
            raise LocalProtocolError("this kernel cannot send again what an earlier server left unanswered")
        try:
            os.write(self._fd, resend_notification())
        except OSError as error:
            if error.errno not in _IS_GONE:
                raise
            self._task_status.started(agreed)
            return False
        self._set_up_notifier(agreed)
        logger.info("session resumed granted=%#x", agreed.flags)
        self._task_status.started(agreed)
        return True

    def _destroy(self, unique: int, node: int, request: bytes) -> None:
        self._reply(empty_reply(unique))

    def _interrupt(self, unique: int, node: int, request: bytes) -> None:
        assert self._waiting is not None
        self._waiting.interrupt(parse_interrupt(request).unique)

    # ---- names and attributes --------------------------------------------------------------------------------------

    def _lookup(self, unique: int, parent: int, request: bytes) -> None:
        name = parse_name(request)
        try:
            reply = self._operations.lookup_nowait(parent, name)
        except trio.WouldBlock:
            self._later(unique, Opcode.LOOKUP, partial(self._lookup_later, unique, parent, name))
        else:
            self._answer_entry(unique, reply)

    async def _lookup_later(self, unique: int, parent: int, name: bytes) -> None:
        self._answer_entry(unique, await self._operations.lookup(parent, name))

    def _answer_entry(self, unique: int, reply: EntryReply) -> None:
        node, attr, attr_ttl_s, entry_ttl_s = reply
        if node == 0 or attr is None:
            self._reply(negative_entry_reply(unique, entry_ttl_s))
        elif not self._reply(entry_reply(unique, node, attr, attr_ttl_s, entry_ttl_s)):
            self._operations.forget(node, 1)

    def _getattr(self, unique: int, node: int, request: bytes) -> None:
        try:
            reply = self._operations.getattr_nowait(node)
        except trio.WouldBlock:
            self._later(unique, Opcode.GETATTR, partial(self._getattr_later, unique, node))
        else:
            self._answer_attr(unique, reply)

    async def _getattr_later(self, unique: int, node: int) -> None:
        self._answer_attr(unique, await self._operations.getattr(node))

    def _answer_attr(self, unique: int, reply: AttrReply) -> None:
        self._reply(attr_reply(unique, *reply))

    def _statfs(self, unique: int, node: int, request: bytes) -> None:
        self._reply(statfs_reply(unique, *self._operations.statfs()))

    def _getxattr(self, opcode: Opcode, unique: int, node: int, request: bytes) -> None:
        if not self._options.xattr:
            self._reply(error_reply(unique, errno.ENOSYS))  # the kernel does not ask again
            return
        asked = parse_getxattr(request)
        if opcode is Opcode.GETXATTR and not asked.name.startswith(b"user."):
            self._reply(error_reply(unique, errno.EOPNOTSUPP))
            return
        self._later(unique, opcode, partial(self._getxattr_later, unique, node, asked))

    async def _getxattr_later(self, unique: int, node: int, asked: GetxattrRequest) -> None:
        found = await self._operations.xattrs(node)
        data = found.get(asked.name) if asked.name else b"".join(name + b"\0" for name in found)
        if data is None:
            self._reply(error_reply(unique, errno.ENODATA))
        elif asked.size == 0:
            self._reply(xattr_size_reply(unique, len(data)))
        elif asked.size < len(data):
            self._reply(error_reply(unique, errno.ERANGE))
        else:
            self._reply(data_header(unique, len(data)), data)

    def _forget(self, unique: int, node: int, request: bytes) -> None:
        self._operations.forget(*parse_forget(request, node))

    def _batch_forget(self, unique: int, node: int, request: bytes) -> None:
        for forget in parse_batch_forget(request):
            self._operations.forget(*forget)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _open(self, unique: int, node: int, request: bytes) -> None:
        flags = parse_open(request).flags
        if self._kept is not None and unique & UNIQUE_RESEND:
            # An earlier server may have been killed between recording a handle and telling the kernel of it.
            never_given = self._kept.handle_never_given(unique)
            if never_given is not None:
                self._operations.release(node, never_given)
        if flags & REFUSED_OPEN_FLAGS:
            self._reply(error_reply(unique, errno.EROFS))
            return
        if self._no_open:
            self._reply(error_reply(unique, errno.ENOSYS))  # once: the kernel does not ask again
            return
        try:
            reply = self._operations.open_nowait(node, flags)
        except trio.WouldBlock:
            pid = parse_header(request).pid
            self._later(unique, Opcode.OPEN, partial(self._open_later, unique, node, flags, pid))
        else:
            self._answer_open(unique, node, reply)

    async def _open_later(self, unique: int, node: int, flags: int, pid: int) -> None:
        self._answer_open(unique, node, await self._operations.open(node, flags, pid))

    def _answer_open(self, unique: int, node: int, reply: OpenReply) -> None:
        fh, backing_id, keep_cache = reply
        if backing_id is not None:
            answer = open_reply(unique, fh, _OPEN_PASSTHROUGH, backing_id)
        else:
            answer = open_reply(unique, fh, _OPEN_CACHED_KEEP if keep_cache else _OPEN_CACHED)
        try:
            if self._kept is not None:
                self._kept.add_handle(fh, node, unique)
            delivered = self._reply(answer)
        except BaseException:
            self._operations.release(node, fh)
            raise
        if not delivered:
            self._operations.release(node, fh)

    def _read(self, unique: int, node: int, request: bytes) -> None:
        read = parse_read(request)
        if self._no_open:
            read = read._replace(fh=node)
        try:
            data = self._operations.read_nowait(read.fh, read.offset, read.size)
        except trio.WouldBlock:
            self._later(unique, Opcode.READ, partial(self._read_later, unique, node, read))
        else:
            self._answer_read(unique, node, read, data)

    async def _read_later(self, unique: int, node: int, read: ReadRequest) -> None:
        self._answer_read(unique, node, read, await self._operations.read(read.fh, read.offset, read.size))

    def _answer_read(self, unique: int, node: int, read: ReadRequest, data: _Data) -> None:
        length = len(data)
        if length != read.size:
            check_length(self._operations, node, read.offset, read.size, length)
        self._reply(data_header(unique, length), data)

    def _release(self, unique: int, node: int, request: bytes) -> None:
        self._operations.release(node, parse_release(request).fh)
        self._reply(empty_reply(unique))

    # ---- directories -----------------------------------------------------------------------------------------------

    def _opendir(self, unique: int, node: int, request: bytes) -> None:
        try:
            reply = self._operations.opendir_nowait(node)
        except trio.WouldBlock:
            self._later(unique, Opcode.OPENDIR, partial(self._opendir_later, unique, node))
        else:
            self._answer_opendir(unique, reply)

    async def _opendir_later(self, unique: int, node: int) -> None:
        self._answer_opendir(unique, await self._operations.opendir(node))

    def _answer_opendir(self, unique: int, reply: OpenDirReply) -> None:
        if not self._reply(open_reply(unique, reply.fh, _OPENDIR_KEEP if reply.keep_cache else _OPENDIR)):
            self._operations.releasedir(reply.fh)

    def _readdir(self, opcode: Opcode, unique: int, node: int, request: bytes) -> None:
        read = parse_read(request)
        if self._is_successor:
            self._operations.adopt_directory(node, read.fh)
        limit = dirent_limit(read.size, opcode is Opcode.READDIRPLUS)
        try:
            entries = self._operations.readdir_nowait(read.fh, read.offset, limit)
        except trio.WouldBlock:
            self._later(unique, opcode, partial(self._readdir_later, opcode, unique, read, limit))
        else:
            self._answer_readdir(opcode, unique, read, entries)

    async def _readdir_later(self, opcode: Opcode, unique: int, read: ReadRequest, limit: int) -> None:
        entries = await self._operations.readdir(read.fh, read.offset, limit)
        self._answer_readdir(opcode, unique, read, entries)

    def _answer_readdir(self, opcode: Opcode, unique: int, read: ReadRequest, entries: Sequence[DirEntry]) -> None:
        data = pack_dirents(entries, read.size, opcode is Opcode.READDIRPLUS)
        if entries and not data:
            raise LocalProtocolError(f"no entry fits into {read.size} bytes")  # empty would say that the directory ends
        self._reply(data_header(unique, len(data)), data)

    def _releasedir(self, unique: int, node: int, request: bytes) -> None:
        self._operations.releasedir(parse_release(request).fh)
        self._reply(empty_reply(unique))


class _InitFailed(Exception):
    """Nothing can be served: the one error that ends a session."""

    def __init__(self, reason: RemoteProtocolError) -> None:
        super().__init__(str(reason))
        self.reason = reason
