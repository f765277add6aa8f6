"""The keepers of a node, in a process of their own that is never upgraded while mounts last. Run as a script by itself:

    python -I -S node_keeper.py node-keeper SOCKET

It starts a keeper (see `keeper`, mode=keep) for each mountpoint that is asked for, and takes over what a server still
holds of a mount whose keeper died. It knows nothing of mounts itself.

Messages, on sockets of whole messages, words of ASCII with `\\0` between them:

    keep MOUNTPOINT [NAME=VALUE]...    a keeper for it, with these limits: ok PATH of its socket, that of the one it has
    adopt MOUNTPOINT [NAME=VALUE]...   a keeper with these descriptors: listen, memfd, server and, if mounted, fuse
    drop MOUNTPOINT                    end the keeper of it, whoever started it: ok
    who                                keeping [MOUNTPOINT PID]...
    answers else                       failed WHY
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import signal
import socket
import stat
import sys
import time

KEEPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "keeper.py")
MESSAGE = 1 << 16
PASSED = ("listen", "memfd", "server", "fuse")
"""In the order in which descriptors come."""


class NodeKeeper:
    def __init__(self, path: str) -> None:
        self.path = path
        listener = listen(path)
        if listener is None:
            raise OSError(errno.EADDRINUSE, "another node-keeper listens there")
        self.listener = listener
        self.keepers: dict[int, str] = {}
        """Mountpoint, by process."""
        self.adopted: dict[int, int] = {}
        """Inode number of the memfd, by process of a keeper that has taken over from another."""
        self.wake, waker = os.pipe()
        for fd in (self.wake, waker):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.clients: dict[int, socket.socket] = {}

    def run(self) -> int:
        """Until SIGTERM. Keepers stay: whoever ends this process may mean only this one."""
        while True:
            poll = select.poll()
            for fd in (self.wake, self.listener.fileno(), *self.clients):
                poll.register(fd, select.POLLIN)
            for fd, _ in poll.poll():
                if fd == self.wake:
                    if set(os.read(self.wake, 64)) & {signal.SIGTERM, signal.SIGINT}:
                        return 0
                    self.reap()
                elif fd == self.listener.fileno():
                    self.accept()
                else:
                    self.hear(self.clients.pop(fd))

    def reap(self) -> None:
        for pid in list(self.keepers):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                self.adopted.pop(pid, None)
                log(f"keeper ended pid={pid} mountpoint={self.keepers.pop(pid)}")

    def accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) not in (0, os.geteuid()) or len(self.clients) > 256:
            client.close()
            return
        client.setblocking(False)
        self.clients[client.fileno()] = client

    def hear(self, client: socket.socket) -> None:
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(client, MESSAGE, len(PASSED))
            answer = self.answer(data.decode(errors="surrogateescape").split("\0"), fds)
            client.send(answer.encode(errors="surrogateescape"))
        except OSError as error:
            log(f"not answered error={error}")
        for fd in fds:
            os.close(fd)
        client.close()

    def answer(self, words: list[str], fds: list[int]) -> str:
        word, *arguments = words
        try:
            if word == "keep" and arguments:
                return self.keep(arguments[0], dict(each.split("=", 1) for each in arguments[1:]))
            if word == "adopt" and len(fds) >= 3 and is_over(fds[PASSED.index("server")]):
                return "failed whoever asked waits no more"  # and may have a keeper by now
            if word == "adopt" and len(arguments) > 1 and len(fds) >= 3:
                values = dict(each.split("=", 1) for each in arguments[1:])
                values.update((name, str(fd)) for name, fd in zip(PASSED, fds, strict=False))
                return f"ok {self.adopt(arguments[0], values, fds)}"
            if word == "drop" and arguments:
                self.drop(arguments[0])
                return "ok"
            if word == "who":
                return "\0".join(["keeping", *(f"{path}\0{pid}" for pid, path in self.keepers.items())])
        except (OSError, ValueError) as error:
            return f"failed {error}"
        return "failed not understood"

    def keep(self, mountpoint: str, values: dict[str, str]) -> str:
        path = self.socket_of(mountpoint)
        listener = listen(path)
        if listener is None:
            return f"ok {path}"
        with listener:
            pinned = {"listen": str(listener.fileno()), "path": path, "mode": "keep", "home": self.path}
            self.start(mountpoint, {**values, **pinned}, [listener.fileno()])
        return f"ok {path}"

    def drop(self, mountpoint: str) -> None:
        """One that an earlier process like this has started, or a server, is told; it is no child of ours, and its
        process id may be one of another namespace.
        """
        ours = [pid for pid, its in self.keepers.items() if its == mountpoint]
        for pid in ours:
            os.kill(pid, signal.SIGTERM)
        if not ours:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
                link.setblocking(False)
                try:
                    link.connect(self.socket_of(mountpoint))
                    link.send(b"end")
                except OSError:
                    pass  # there is none, or it hangs

    def socket_of(self, mountpoint: str) -> str:
        """As `keeping.socket_of`."""
        name = f"mount_{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]}.sock"
        return os.path.join(os.path.dirname(self.path), name)

    def adopt(self, mountpoint: str, values: dict[str, str], fds: list[int]) -> int:
        """A server that asks again, as it heard no answer, knows nothing of the keeper that it was given then."""
        kept = os.fstat(fds[PASSED.index("memfd")]).st_ino
        for pid, ino in self.adopted.items():
            if ino == kept:
                os.kill(pid, signal.SIGKILL)
        pid = self.start(mountpoint, values, fds)
        self.adopted[pid] = kept
        return pid

    def start(self, mountpoint: str, values: dict[str, str], fds: list[int]) -> int:
        nothing = os.memfd_create("cachefs-server", 0)  # servers connect, none is started
        arguments = [f"{name}={value}" for name, value in {**values, "command": str(nothing)}.items()]
        try:
            pid = os.fork()
        except OSError:
            os.close(nothing)
            raise
        if pid == 0:
            try:
                os.setsid()
                for fd in (*fds, nothing):
                    os.set_inheritable(fd, True)
                os.execv(sys.executable, [sys.executable, "-I", "-S", KEEPER, "mount-keeper", mountpoint, *arguments])
            finally:
                os._exit(127)
        os.close(nothing)
        self.keepers[pid] = mountpoint
        log(f"keeper started pid={pid} mountpoint={mountpoint}")
        return pid


def listen(path: str) -> socket.socket | None:
    """None when somebody listens there. What a process that is gone left there is replaced. Raises OSError, also for
    something that is no socket: it stays.
    """
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # of two that begin at once, one is the first
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise OSError(errno.EEXIST, "there is something that is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.setblocking(False)  # whoever holds the listener may be in no hurry to accept
                if probe.connect_ex(path) in (0, errno.EAGAIN):
                    return None
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(path)
            os.chmod(path, 0o600)
            listener.listen(64)
        except OSError:
            listener.close()
            raise
    finally:
        os.close(directory)
    listener.setblocking(False)
    return listener


def is_over(link: int) -> bool:
    """Whether the other end is closed: we were away for long, and a message waited here."""
    poll = select.poll()
    poll.register(link, 0)
    return bool(poll.poll(0))


def log(message: str) -> None:
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    line = f"{stamp},{int(now * 1000) % 1000:03} INFO node-keeper {message}\n"
    try:
        os.write(2, line.encode(errors="surrogateescape"))
    except OSError:
        pass  # nobody reads it any more


def main(arguments: list[str]) -> int:
    try:
        keeper = NodeKeeper(arguments[1])
    except OSError as error:
        accepted = f"a path where a socket can be made ({error.strerror})"
        os.write(2, f"Error: --socket: {arguments[1]!r} is not accepted; expected {accepted}\n".encode())
        return 1
    os.write(1, f"cachefs node-keeper is ready socket={arguments[1]}\n".encode())
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
