"""The portable driver, and the oracle: the same `Operations`, asked by libfuse through pyfuse3, in the same trio loop.

The mount itself is ours (see `mounting`): libfuse is given the device, mounted already, as /dev/fd/N. So unmounting,
notifications (see `notify`) and `max_read` are those of the kernel driver. What libfuse cannot do is left out:
passthrough, no-open mode, cached directories, `NOFLUSH`, interrupts (whoever waits for an answer and is killed is gone
when it comes), and successors.

pyfuse3 keeps its session in globals: one mount at a time in a process. Import this module only when it is wanted: it
needs a package that is an extra, and a library of the system.

Which task runs what:

    main of pyfuse3: its tasks wait for the device in turn, each reads one request and answers it
        a request of which another reader of the device, or the kernel, was faster to dispose is EAGAIN, which pyfuse3
        takes for the end: it cancels its tasks. So requests are shielded from it, and main is started again.
    serve: its own end cancels what is shielded
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from cachefs.fuse.answers import REFUSED_OPEN_FLAGS, ErrorAnswers, check_length
from cachefs.fuse.kernel import SessionOptions
from cachefs.fuse.notify import KnownNames, Notifier
from cachefs.fuse.protocol import DirEntry, EntryReply, Operations
from cachefs.fusewire import BLOCK_SIZE, TYPE_BITS, Opcode
from cachefs.model import Attr, CachefsError, LocalProtocolError, RemoteProtocolError
from cachefs.net import open_background

logger = logging.getLogger(__name__)

INC_EPOCH_KERNEL = (6, 16)
"""The first kernel that can be told to believe no name any more; libfuse does not say which protocol it speaks."""
_DIR_CHUNK = 64
"""Entries asked for at once; libfuse does not say how much room there is. 4 KiB have room for 25."""

P = ParamSpec("P")
T = TypeVar("T")


class Pyfuse3Session:
    """As `KernelSession`, for as far as libfuse goes."""

    def __init__(self, fd: int, operations: Operations, options: SessionOptions | None = None) -> None:
        """`fd`: a non-blocking /dev/fuse file, mounted already; stays the caller's. Of the options, `init` is nothing
        that libfuse could be told.
        """
        self._fd = fd
        self._options = options or SessionOptions()
        self.requests: Counter[int] = Counter()
        """How often each `Opcode` was asked, of those that libfuse passes on."""
        self.known_names: KnownNames = list
        """(parent node, name) of all that the kernel may have been told. For kernels before 6.16, see `notify`."""
        self._notifier: Notifier | None = None
        self._handlers = _Handlers(operations, self._options, self.requests, self._begin)
        self._task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED

    @property
    def observe(self) -> Callable[[int, float], None] | None:
        """As of `KernelSession`."""
        return self._handlers.observe

    @observe.setter
    def observe(self, observe: Callable[[int, float], None] | None) -> None:
        self._handlers.observe = observe

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the mount ends, which is a normal return. Started once the kernel and libfuse have agreed.

        Cancelled: requests in progress are answered with EINTR. Raises LocalProtocolError if a session of this process
        is being served already, or the device is not mounted; RemoteProtocolError if the kernel is not libfuse's.
        """
        self._task_status = task_status
        with _the_only_one():
            # libfuse closes it.
            pyfuse3.init(self._handlers, f"/dev/fd/{os.dup(self._fd)}", set())
            try:
                async with open_background() as nursery:
                    nursery.start_soon(self._handlers.cancel_at_the_end)
                    await self._serve_again_and_again()
            finally:
                pyfuse3.close(unmount=False)
                if self._notifier is not None:
                    self._notifier.close()
        if self._notifier is None:
            raise RemoteProtocolError("the kernel and libfuse do not agree on a protocol, or it was unmounted at once")
        logger.info("session ended requests=%d", self.requests.total())

    async def _serve_again_and_again(self) -> None:
        ended = False
        while not ended:
            try:
                await pyfuse3.main(1, self._options.max_tasks)
                ended = True
            except* OSError as group:
                for error in _leaves(group):
                    assert isinstance(error, OSError)
                    if error.errno == errno.EPERM:
                        raise LocalProtocolError("the device is not mounted") from group
                    if error.errno != errno.EAGAIN:
                        raise

    def _begin(self) -> None:
        """INIT has been answered."""
        kernel = tuple(int(each) for each in os.uname().release.split(".")[:2])
        self._notifier = Notifier(
            self._fd, inc_epoch=kernel >= INC_EPOCH_KERNEL, known_names=lambda: self.known_names()
        )
        logger.info("session started driver=pyfuse3 version=%s", pyfuse3.__version__)
        self._task_status.started()

    # ---- what the kernel believes ----------------------------------------------------------------------------------

    def notify_inval_entry(self, parent: int, name: bytes, *, expire_only: bool) -> None:
        """As of `KernelSession`. pyfuse3's own would not only expire directories, but drop them."""
        if self._notifier is not None:
            self._notifier.entry(parent, name, expire_only=expire_only)

    def notify_everything(self) -> None:
        """The kernel asks again for every name. Soon, and without waiting."""
        if self._notifier is not None:
            self._notifier.everything()


_is_serving = False


@contextmanager
def _the_only_one() -> Iterator[None]:
    global _is_serving
    if _is_serving:
        raise LocalProtocolError("pyfuse3 serves one mount at a time in a process")
    _is_serving = True
    try:
        yield
    finally:
        _is_serving = False


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


def _request(
    opcode: Opcode,
) -> Callable[
    [Callable[Concatenate[_Handlers, P], Awaitable[T]]], Callable[Concatenate[_Handlers, P], Coroutine[Any, Any, T]]
]:
    """Count a request, shield it, and make whatever it raises an errno: anything else would end pyfuse3."""

    def decorate(
        method: Callable[Concatenate[_Handlers, P], Awaitable[T]],
    ) -> Callable[Concatenate[_Handlers, P], Coroutine[Any, Any, T]]:
        async def handle(self: _Handlers, /, *arguments: P.args, **named: P.kwargs) -> T:
            self.requests[opcode] += 1
            began = perf_counter()
            with trio.CancelScope(shield=True) as scope:
                self.scopes.add(scope)
                try:
                    return await method(self, *arguments, **named)
                except pyfuse3.FUSEError:
                    raise
                except Exception as error:
                    raise pyfuse3.FUSEError(self.errors.errno_for(opcode, error)) from error
                finally:
                    self.scopes.discard(scope)
                    if self.observe is not None:
                        self.observe(opcode, perf_counter() - began)
            raise pyfuse3.FUSEError(errno.EINTR)

        return handle

    return decorate


class _Handlers(pyfuse3.Operations):
    """What pyfuse3 calls. What is not here is ENOSYS, which the kernel remembers."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        operations: Operations,
        options: SessionOptions,
        requests: Counter[int],
        begin: Callable[[], None],
    ) -> None:
        self._operations = operations
        self._xattr = options.xattr
        self.requests = requests
        self._begin = begin
        self.errors = ErrorAnswers()
        self.observe: Callable[[int, float], None] | None = None
        self.scopes: set[trio.CancelScope] = set()
        """Of the requests in progress."""
        self._nodes: dict[int, tuple[int, int]] = {}
        """File handle -> (node, how often it is open): libfuse tells the node with the handle, pyfuse3 does not."""
        self._directories: dict[int, int] = {}

    async def cancel_at_the_end(self) -> None:
        """Runs until cancelled, and has requests in progress end then."""
        try:
            await trio.sleep_forever()
        finally:
            for scope in self.scopes:
                scope.cancel()

    def init(self) -> None:
        self._begin()

    # ---- names and attributes --------------------------------------------------------------------------------------

    @_request(Opcode.LOOKUP)
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return _entry(await _ask(self._operations.lookup_nowait, self._operations.lookup, parent_inode, name))

    @_request(Opcode.GETATTR)
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        reply = await _ask(self._operations.getattr_nowait, self._operations.getattr, inode)
        return _attributes(reply.node, reply.attr, reply.attr_ttl_s, 0.0)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        self.requests[Opcode.FORGET] += 1
        for node, lookups in inode_list:
            self._operations.forget(node, lookups)

    @_request(Opcode.STATFS)
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        reply = self._operations.statfs()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = reply.block_size
        data.f_blocks = reply.blocks
        data.f_bfree = data.f_bavail = reply.blocks_free
        data.f_files = reply.files
        data.f_namemax = reply.name_max
        return data

    @_request(Opcode.GETXATTR)
    async def getxattr(self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext) -> bytes:
        if not self._xattr:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # the kernel does not ask again
        if not name.startswith(b"user."):
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        found = (await self._operations.xattrs(inode)).get(name)
        if found is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return found

    @_request(Opcode.LISTXATTR)
    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[pyfuse3.XAttrNameT]:
        if not self._xattr:
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return [pyfuse3.XAttrNameT(name) for name in await self._operations.xattrs(inode)]

    # ---- files -----------------------------------------------------------------------------------------------------

    @_request(Opcode.OPEN)
    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & REFUSED_OPEN_FLAGS:
            raise pyfuse3.FUSEError(errno.EROFS)
        try:
            reply = self._operations.open_nowait(inode, flags)
        except trio.WouldBlock:
            reply = await self._operations.open(inode, flags, ctx.pid)
        fh, backing_id, keep_cache = reply
        if backing_id is not None:
            self._operations.release(inode, fh)
            raise LocalProtocolError("libfuse cannot take a backing file")
        self._nodes[fh] = inode, self._nodes.get(fh, (0, 0))[1] + 1
        return pyfuse3.FileInfo(pyfuse3.FileHandleT(fh), keep_cache=keep_cache)

    @_request(Opcode.READ)
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        data = await _ask(self._operations.read_nowait, self._operations.read, fh, off, size)
        if len(data) != size:
            check_length(self._operations, self._nodes[fh][0], off, size, len(data))
        # Others may be answered before libfuse has this.
        return bytes(data)

    @_request(Opcode.RELEASE)
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        node, users = self._nodes.pop(fh, (0, 0))
        if users > 1:
            self._nodes[fh] = node, users - 1
        self._operations.release(node, fh)

    # ---- directories -----------------------------------------------------------------------------------------------

    @_request(Opcode.OPENDIR)
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        reply = await _ask(self._operations.opendir_nowait, self._operations.opendir, inode)
        self._directories[reply.fh] = inode
        return pyfuse3.FileHandleT(reply.fh)

    @_request(Opcode.READDIRPLUS)
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """As many entries as there is room for, or as can be had without waiting once there is one."""
        operations = self._operations
        entries = await _ask(operations.readdir_nowait, operations.readdir, fh, start_id, _DIR_CHUNK)
        some = False
        while entries:
            for entry in entries:
                try:
                    shown = await self._shown(self._directories.get(fh, 0), entry)
                except (CachefsError, OSError):
                    if some:
                        return  # told when it is asked for the rest
                    raise
                if shown is None:
                    continue
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(entry.name), shown, entry.next_offset):
                    return
                some = True
            try:
                entries = operations.readdir_nowait(fh, entries[-1].next_offset, _DIR_CHUNK)
            except (trio.WouldBlock, CachefsError, OSError):
                if some:
                    return
                entries = await operations.readdir(fh, entries[-1].next_offset, _DIR_CHUNK)

    async def _shown(self, directory: int, entry: DirEntry) -> pyfuse3.EntryAttributes | None:
        """libfuse cannot tell a name alone. One without attributes is looked up, and left out if it is gone."""
        if entry.attr is not None:
            return _attributes(entry.node, entry.attr, entry.attr_ttl_s, entry.entry_ttl_s)
        found = await _ask(self._operations.lookup_nowait, self._operations.lookup, directory, entry.name)
        return None if found.attr is None else _entry(found)

    @_request(Opcode.RELEASEDIR)
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._directories.pop(fh, None)
        self._operations.releasedir(fh)


async def _ask(nowait: Callable[P, T], wait: Callable[P, Awaitable[T]], *arguments: P.args, **named: P.kwargs) -> T:
    try:
        return nowait(*arguments, **named)
    except trio.WouldBlock:
        return await wait(*arguments, **named)


def _entry(reply: EntryReply) -> pyfuse3.EntryAttributes:
    if reply.attr is None:
        negative = pyfuse3.EntryAttributes()
        negative.st_ino = pyfuse3.InodeT(0)
        negative.entry_timeout = reply.entry_ttl_s
        return negative
    return _attributes(reply.node, reply.attr, reply.attr_ttl_s, reply.entry_ttl_s)


def _attributes(node: int, attr: Attr, attr_ttl_s: float, entry_ttl_s: float) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(node)
    entry.st_mode = pyfuse3.ModeT(TYPE_BITS[attr.kind] | attr.mode)
    entry.st_nlink = 1
    entry.st_uid = attr.uid
    entry.st_gid = attr.gid
    entry.st_size = attr.size_bytes
    entry.st_blocks = (attr.size_bytes + 511) >> 9
    entry.st_blksize = BLOCK_SIZE
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attr.mtime_ns
    entry.attr_timeout = attr_ttl_s
    entry.entry_timeout = entry_ttl_s
    return entry
