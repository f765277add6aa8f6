"""The keeper: it holds a mount while servers come and go. Run as a script by itself, never imported by the server:

    python -I -S keeper.py mount-keeper MOUNTPOINT NAME=VALUE...

It holds /dev/fuse and a memfd with what must outlive a server (see `kept`), and looks into neither. It starts a server
when there is none, or waits for one to connect (`mode=keep`); it has a server that hangs killed; it lets a new one take
over from the old. When the mount cannot be saved it is taken away, so that nobody waits for ever.

It knows nothing that a new version could want to change: this file needs no upgrade while a mount lasts. So it imports
six small modules, none of ours.

Values: `listen`, `memfd`, `fuse`, `server`: descriptors that it is given. `command`: one of a file with what starts a
server, each word ended by a zero byte (in a file, because keepers and servers are told apart by their arguments).
`hold`: one that is passed on to servers unseen. `home`: the socket of the node-keeper that started it, for servers.
`pid` of the server behind `server`. `mode`: spawn or keep. `path` of the listening socket, `file`: its device and inode
number. `connection`: number of the FUSE connection, `below`: what else `mounted` tells.
`established=1`: the mount has answered before. And those of `LIMITS`.

Messages, on sockets of whole messages, words of ASCII with `\\0` before arguments:

    keeper to server    state 1[\\nNAME=VALUE]...[\\0SERVER\\0ARGUMENTS], with memfd, listener, and /dev/fuse if mounted
                        go: the earlier one is gone; drain: answer what was read, and end; end: unmount; ping
    server to keeper    mounted N BELOW (with /dev/fuse; BELOW is for `cachefs umount`); remount: that connection is
                        over; standby; ready; pong; ending: it unmounts; done STATUS: the mount has ended
    others to keeper    hello 1 PID (a server, mode=keep); who; upgrade\\0SERVER\\0ARGUMENTS
    keeper to others    keeper 1[\\nNAME=VALUE]...[\\0SERVER\\0ARGUMENTS]; ok PID; failed WHY
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

VERSION = 1
LIMITS = {"hung": 10.0, "start": 60.0, "absent": 300.0, "end": 30.0, "failures": 10.0, "deaths": 100.0}
"""Seconds: without a sign of life from a server; from its start until it answers; without any server (mode=keep); for
an orderly end. Servers in a row that never came to answer, and that did and died within `SETTLED_S`: with so many the
mount is given up."""
SETTLED_S = 5.0
DRAIN_S = 5.0
KILL_S = 10.0
LONGEST_PAUSE_S = 5.0
TICK_S = 1.0
MESSAGE = 1 << 16


class Server:
    def __init__(self, link: socket.socket, pid: int, is_child: bool, state: str = "starting") -> None:
        link.setblocking(False)
        self.link = link
        self.pid = pid
        self.is_child = is_child
        self.state = state
        """starting, standby, going, serving, draining, killed"""
        self.ticks = 0
        """Since it came into this state, or gave the last sign of life. They stand still when we do."""
        self.pinged = False
        self.ready_at = 0.0
        self.done: int | None = None

    def become(self, state: str) -> None:
        self.state, self.ticks, self.pinged = state, 0, False

    def send(self, message: str, fds: list[int] | None = None) -> None:
        try:
            if fds:
                socket.send_fds(self.link, [message.encode()], fds)
            else:
                self.link.send(message.encode())
        except OSError:
            pass  # it is gone, which is seen soon, or hangs, which is counted


class Keeper:
    def __init__(self, mountpoint: str, values: dict[str, str], command: list[str]) -> None:
        self.mountpoint = mountpoint
        self.values = values
        self.command = command
        self.earlier_command: list[str] | None = None
        """What ran before the upgrade that is under way."""
        self.limits = {name: float(values.get(name, default)) for name, default in LIMITS.items()}
        self.mode = values.get("mode", "spawn")
        self.memfd = int(values["memfd"]) if "memfd" in values else os.memfd_create("cachefs-mount")
        self.fuse = int(values.get("fuse", "-1"))
        self.connection = values.get("connection", "")
        self.below = values.get("below", "")
        self.hold = [int(each) for each in values.get("hold", "").split(",") if each]
        self.listener = socket.socket(fileno=int(values["listen"]))
        self.established = values.get("established") == "1"
        self.server: Server | None = None
        self.next: Server | None = None
        """Prepares to take over from `server`."""
        self.asker: socket.socket | None = None
        """Who waits to hear how the upgrade went."""
        self.clients: dict[int, socket.socket] = {}
        self.failures = 0
        self.deaths = 0
        self.start_at = 0.0
        self.absent_ticks = 0
        self.ending = False
        self.is_told_to_end = False
        """By a signal, and not by what became of the mount."""
        self.end_ticks = 0
        self.status: int | None = None
        """To exit with."""
        self.ticked_at = time.monotonic()
        for fd in (self.memfd, self.fuse, self.listener.fileno(), *self.hold):
            if fd >= 0:
                os.set_inheritable(fd, False)
        self.listener.setblocking(False)
        if "path" in values:
            values.setdefault("file", identity(values["path"]))
        self.wake, waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Of what a script starts in the background SIGINT is ignored as well; who sends it by hand means it.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "server" in values:
            self.server = Server(socket.socket(fileno=int(values["server"])), int(values.get("pid", "0")), False)
            os.set_inheritable(self.server.link.fileno(), False)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        while self.status is None:
            now = time.monotonic()
            if self.server is None and self.mode == "spawn" and not self.ending and now >= self.start_at:
                try:
                    self.server = self.spawn(self.command)
                except OSError as error:  # this machine has no memory or no processes left, for now
                    self.failed(f"no server could be started error={error}")
            self.wait(now)
            if time.monotonic() - self.ticked_at >= TICK_S:
                self.ticked_at = time.monotonic()
                self.tick()
        # Whoever mounts there while our last files are being closed has taken the path over.
        if "path" in self.values and identity(self.values["path"]) == self.values["file"] != "":
            try:
                os.unlink(self.values["path"])
            except OSError:
                pass
        return self.status

    def wait(self, now: float) -> None:
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        poll.register(self.listener, select.POLLIN)
        by_fd = {each.link.fileno(): each for each in (self.server, self.next) if each is not None}
        for fd in (*by_fd, *self.clients):
            poll.register(fd, select.POLLIN)
        if self.fuse >= 0 and self.server is None:
            poll.register(self.fuse, 0)  # an error is told always: the connection is over
        limit_s = self.ticked_at + TICK_S - now
        if self.server is None and self.mode == "spawn" and not self.ending:
            limit_s = min(limit_s, self.start_at - now)
        for fd, _ in poll.poll(max(0.0, limit_s) * 1000):
            if self.status is not None:
                return
            if fd == self.wake:
                self.signalled()
            elif fd == self.listener.fileno():
                self.accept()
            elif fd == self.fuse:
                self.unmounted()
            elif fd in self.clients:
                self.asked(self.clients.pop(fd))
            elif fd in by_fd:
                self.hear(by_fd[fd])

    def signalled(self) -> None:
        numbers = os.read(self.wake, 64)
        if any(number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for number in numbers):
            self.end()

    def end(self) -> None:
        self.is_told_to_end = True
        if self.ending:
            return
        self.ending, self.end_ticks = True, 0
        if self.next is not None:
            self.kill(self.next)
        if self.server is not None:
            self.server.send("end")
        elif self.next is None:
            self.take_away(0)

    def unmounted(self) -> None:
        """The connection is over: whoever serves it knows, and cleans up; if there is nobody, a new one does."""
        os.close(self.fuse)
        self.fuse = -1
        self.ending, self.end_ticks = True, 0
        if self.server is None and self.next is None:
            self.take_away(0)

    # ---- servers ---------------------------------------------------------------------------------------------------

    def spawn(self, command: list[str]) -> Server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                os.setsid()  # a Ctrl-C at the terminal is for us
                for fd in (theirs.fileno(), *self.hold):
                    os.set_inheritable(fd, True)
                os.execv(command[0], [each.replace("{keeper}", str(theirs.fileno())) for each in command])
            except BaseException as error:
                log(f"server not started error={error}")
            finally:
                os._exit(127)
        theirs.close()
        server = Server(ours, pid, True)
        self.introduce(server)
        return server

    def introduce(self, server: Server) -> None:
        fds = [self.memfd, self.listener.fileno(), *([self.fuse] if self.fuse >= 0 else [])]
        server.send("state " + self.facts(), fds)

    def facts(self) -> str:
        shown = {
            **{
                key: value
                for key, value in self.values.items()
                if key in ("mode", "path", "file", "home", "hold", *LIMITS)
            },
            "connection": self.connection,
            "below": self.below,
            "established": "1" if self.established else "0",
            "keeper": str(os.getpid()),
            "server": str(self.server.pid) if self.server is not None else "0",
            "state": self.server.state if self.server is not None else "none",
        }
        lines = [str(VERSION), *(f"{key}={value}" for key, value in shown.items())]
        return "\0".join(["\n".join(lines), *self.command])

    def hear(self, server: Server) -> None:
        while server in (self.server, self.next) and self.status is None:
            try:
                data, fds, _, _ = socket.recv_fds(server.link, MESSAGE, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # told once, when it is gone and had not read all; what it said before comes next
            except OSError:
                data, fds = b"", []
            for fd in fds:
                os.set_inheritable(fd, False)
            if data:
                self.told(server, data, fds)
            else:
                self.gone(server)

    def told(self, server: Server, data: bytes, fds: list[int]) -> None:
        word, _, rest = data.decode(errors="replace").partition(" ")
        server.ticks = 0
        if server is not self.server and word in ("mounted", "remount", "ending", "done"):
            pass  # it is not its mount yet
        elif word == "mounted" and fds:
            self.fuse, (self.connection, _, self.below) = fds.pop(), rest.partition(" ")
        elif word == "remount":
            if self.fuse >= 0:
                os.close(self.fuse)
            self.fuse, self.connection, self.below = -1, "", ""
        elif word == "standby":
            server.become("standby")
            if server is self.server:
                self.go(server)
            elif self.server is not None:
                if self.server.state == "serving":
                    self.server.send("drain")
                    self.server.become("draining")
                else:
                    self.kill(self.server)
        elif word == "ready":
            server.become("serving")
            server.ready_at = time.monotonic()
            self.established = True
            self.failures = 0
            self.earlier_command = None
            self.answer(f"ok {server.pid}")
        elif word == "pong":
            server.pinged = False
        elif word == "ending":
            self.ending, self.end_ticks = True, 0
        elif word == "done":
            server.done = int(rest)
        for fd in fds:
            os.close(fd)

    def go(self, server: Server) -> None:
        server.become("going")
        server.send("go")
        if self.ending:
            server.send("end")

    def kill(self, server: Server) -> None:
        if server.pid > 0:
            try:
                os.kill(server.pid, signal.SIGKILL)
            except OSError:
                pass  # it is gone; or another user's, and given up later
        server.become("killed")

    def gone(self, server: Server) -> None:
        """Its end of the link is closed, which the kernel does after its last thread has ended."""
        server.link.close()
        status = 1
        if server.is_child:
            status = reap(server.pid)
        if server is self.next:
            self.next = None
            self.upgrade_failed(f"the new server ended with status {status} before it was ready")
            return
        self.server = None
        if server.done is not None:
            self.status = server.done
        elif not self.established:
            # What was wrong, it has said.
            self.take_away(status if status > 0 or (self.ending and status == 0) else 1)
            if self.mode == "keep" and not self.is_told_to_end:
                self.status, self.ending, self.connection, self.below = None, False, "", ""
        elif self.next is not None:
            self.server, self.next = self.next, None
            if self.server.state == "standby":
                self.go(self.server)
        elif self.ending:
            self.take_away(0)
        else:
            self.lost(server, status)

    def lost(self, server: Server, status: int) -> None:
        now = time.monotonic()
        self.absent_ticks = 0
        what = f"server gone pid={server.pid} status={status}"
        if server.ready_at == 0.0:
            self.failed(what)
            if self.earlier_command is not None:
                self.upgrade_failed(f"the new server ended with status {status} before it answered")
            return
        self.deaths = self.deaths + 1 if now - server.ready_at < SETTLED_S else 1
        log(f"{what} deaths={self.deaths}")
        if self.deaths >= self.limits["deaths"]:
            self.give_up(f"{self.deaths} servers in a row did not stay")
        self.start_at = now + (1.0 if self.deaths > self.limits["deaths"] / 4 else 0.0)

    def failed(self, what: str) -> None:
        """A server that did not come to answer: the next one is started, more and more slowly."""
        self.failures += 1
        log(f"{what} failures={self.failures}")
        if self.failures >= self.limits["failures"]:
            self.give_up(f"{self.failures} servers in a row did not stay")
        pause_s = min(LONGEST_PAUSE_S, 0.1 * 2**self.failures) if self.failures > 1 else 0.0
        self.start_at = time.monotonic() + pause_s

    # ---- time ------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        if self.fuse >= 0 and is_over(self.fuse):  # not polled while there is a server, whose requests would wake us
            self.unmounted()
        for server in (self.server, self.next):
            if server is not None:
                server.ticks += 1
                self.look_at(server)
        if self.ending:
            self.end_ticks += 1
            if self.end_ticks > self.limits["end"] and self.status is None:
                self.give_up("it did not end")
        if self.mode == "keep" and self.server is None and self.established:
            self.absent_ticks += 1
            if self.absent_ticks > self.limits["absent"]:
                self.give_up(f"no server for {self.absent_ticks} s")

    def look_at(self, server: Server) -> None:
        if server.state == "serving" and not self.ending:
            if server.pinged and server.ticks > self.limits["hung"]:
                log(f"server hangs, killed pid={server.pid} limit={self.limits['hung']:g}s")
                self.kill(server)
            elif not server.pinged:
                server.pinged, server.ticks = True, 0
                server.send("ping")
        elif server.state == "draining":
            if server.ticks > DRAIN_S:
                self.kill(server)  # what it has not answered comes again
        elif server.state == "killed":
            if server.ticks > KILL_S:
                self.give_up(f"server {server.pid} cannot be killed")
        elif server is self.next and server.state == "standby":
            pass  # it waits for the other
        elif self.established and server.ticks > self.limits["start"]:
            log(f"server does not come up, killed pid={server.pid} limit={self.limits['start']:g}s")
            self.kill(server)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def give_up(self, why: str) -> None:
        log(f"mount given up mountpoint={self.mountpoint} reason={why}")
        for server in (self.server, self.next):
            if server is not None:
                self.kill(server)
        self.take_away(1)

    def take_away(self, status: int) -> None:
        """Nobody serves: whoever still waits gets an error."""
        self.status = status
        if not self.connection:
            return
        command = [sys.executable, "-P", "-m", "cachefs", "umount", "--connection", self.connection]
        if self.below:
            command += ["--below", *self.below.split(",")]
        if self.fuse >= 0:
            command += ["--device", str(self.fuse)]  # whether its number is still its own, this tells
        pid = -1
        try:
            pid = os.fork()
        except OSError as error:
            # The connection ends when we do, as we hold it last; "Transport endpoint is not connected" stays.
            log(f"not taken out of the tree mountpoint={self.mountpoint} error={error}")
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                if self.fuse >= 0:
                    os.set_inheritable(self.fuse, True)
                os.execv(command[0], [*command, self.mountpoint])
            finally:
                os._exit(127)
        give_up_at = time.monotonic() + 20.0
        while pid > 0 and os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > give_up_at:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self.fuse >= 0:
            os.close(self.fuse)
            self.fuse = -1

    # ---- who else asks ---------------------------------------------------------------------------------------------

    def accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:
            return
        client.setblocking(False)
        if peer_of(client)[1] not in (0, os.geteuid()) or len(self.clients) > 64:
            client.close()
            return
        self.clients[client.fileno()] = client

    def asked(self, client: socket.socket) -> None:
        try:
            data = client.recv(MESSAGE)
        except OSError:
            data = b""
        word, *arguments = data.decode(errors="replace").split("\0")
        is_free = self.server is None or (self.established and self.next is None)
        if word.startswith("hello ") and self.mode == "keep" and is_free and not self.ending:
            server = Server(client, peer_of(client)[0], False)
            if self.server is None:
                self.server = server
            else:
                self.next = server
            self.introduce(server)
            return
        if word == "upgrade" and arguments:
            self.upgrade(client, arguments)
            return
        answer = f"keeper {self.facts()}" if word == "who" else f"ok {os.getpid()}" if word == "end" else ""
        try:
            client.send((answer or "failed not understood").encode())
        except OSError:
            pass
        client.close()
        if word == "end":
            self.end()

    def upgrade(self, client: socket.socket, command: list[str]) -> None:
        why = ""
        if self.mode != "spawn":
            why = "servers connect to this keeper; start the new one with --keeper-socket"
        elif self.next is not None or self.asker is not None:
            why = "an upgrade is under way"
        elif self.ending or self.server is None or self.server.state != "serving":
            why = "no server answers just now"
        if why:
            try:
                client.send(f"failed {why}".encode())
            except OSError:
                pass
            client.close()
            return
        self.asker = client
        self.earlier_command, self.command = self.command, command
        log(f"upgrade begins command={command[0]}")
        try:
            self.next = self.spawn(command)
        except OSError as error:
            self.upgrade_failed(f"no server could be started: {error.strerror}")

    def upgrade_failed(self, why: str) -> None:
        if self.earlier_command is not None:
            self.command, self.earlier_command = self.earlier_command, None
        log(f"upgrade failed reason={why}")
        self.answer(f"failed {why}")

    def answer(self, message: str) -> None:
        if self.asker is not None:
            try:
                self.asker.send(message.encode())
            except OSError:
                pass
            self.asker.close()
            self.asker = None


def is_over(fuse: int) -> bool:
    """Whether that connection has ended: it was unmounted, or aborted."""
    poll = select.poll()
    poll.register(fuse, 0)
    return bool(poll.poll(0))


def reap(pid: int) -> int:
    """The exit status of a child that has nothing left to do but to end."""
    give_up_at = time.monotonic() + KILL_S
    while True:
        found, wait_status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(wait_status)
        if time.monotonic() > give_up_at:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def identity(path: str) -> str:
    """Empty if there is no such file."""
    try:
        status = os.lstat(path)
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def peer_of(client: socket.socket) -> tuple[int, int]:
    """(process id, or 0 if it is in another pid namespace, user id)"""
    packed = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(packed[:4], sys.byteorder), int.from_bytes(packed[4:8], sys.byteorder)


def log(message: str) -> None:
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    try:
        os.write(2, f"{stamp},{int(now * 1000) % 1000:03} INFO mount-keeper {message}\n".encode())
    except OSError:
        pass  # nobody reads it any more


def main(arguments: list[str]) -> int:
    values = dict(each.split("=", 1) for each in arguments[2:])
    command = os.pread(int(values["command"]), MESSAGE, 0).decode(errors="surrogateescape").split("\0")[:-1]
    os.close(int(values["command"]))
    return Keeper(arguments[1], values, command).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
