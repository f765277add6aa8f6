"""The server's side of the keeper (see `keeper`): what it hands over, and starting another one when it dies."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import trio

from cachefs.fuse.kept import Kept
from cachefs.fuse.mounting import Mount
from cachefs.fusewire import Negotiated
from cachefs.model import CachefsError, ConfigError, TransportError
from cachefs.wire.messages import ClusterInfo

logger = logging.getLogger(__name__)

KEEPER = str(Path(__file__).with_name("keeper.py"))
VERSION = "1"
_MESSAGE = 1 << 16
_ANSWER_S = 180.0
"""Of a keeper that is asked for an upgrade: its own limits are shorter."""
_WHO_S = 5.0
_PAUSE_S = 1.0
_HOME_S = 30.0
"""How long a server waits for the process that has the keepers of its node, before it starts a keeper itself."""
_ADOPTION_S = 5.0
_LEAVING_S = 15.0
"""The same for a server that is told to end: less than whoever told it waits."""


class MountFacts(msgspec.Struct, frozen=True):
    """What a successor must know beside the open files. Newer versions may add to it."""

    agreed: Negotiated
    mountpoint: str
    source: str
    device: str
    allows_other: bool
    cluster: ClusterInfo
    epoch: int
    root: int | None
    """Inode number of the directory that is mounted, once it is known in this namespace."""
    tiers: tuple[str, ...] = ()
    below: tuple[int, int, int] | None = None
    """Mode, st_dev and st_ino of the directory under the mount, if we changed its mode."""

    @property
    def mounted(self) -> Mount:
        return Mount(self.mountpoint, self.source, self.device, self.allows_other, self.below)

    def save(self) -> bytes:
        return msgspec.json.encode(self)


class KeeperLink:
    """One server's link to its keeper. Made before trio runs; `follow` it, and `close` it."""

    def __init__(self, link: socket.socket, mountpoint: str) -> None:
        """Waits for what the keeper hands over. Raises TransportError when it is gone, KeptError."""
        data, fds, _, _ = socket.recv_fds(link, _MESSAGE, 3)
        if not data.startswith(b"state ") or len(fds) < 2:
            raise TransportError("the keeper of this mount is gone, or waits for another server to come up")
        for fd in fds:
            os.set_inheritable(fd, False)
        self.values, self.command = parse_facts(data.decode().removeprefix("state "))
        if self.connects:
            # A descriptor of the keeper's, which only servers that it started have under this number.
            self.values.pop("hold", None)
        self._mountpoint = mountpoint
        self._memfd, self._listener, *rest = fds
        self.fuse_fd = rest[0] if rest else -1
        """-1: it is not mounted yet."""
        self.kept = Kept(self._memfd)
        self.on_drain: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self.hands_over = False
        """Another server goes on: nothing is unmounted."""
        self.was_told_to_end = False
        self._go = trio.Event()
        self._phase: str | None = None
        self._is_done = False
        self._raw = link
        self._link = _as_trio(link)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._is_mounted = self.fuse_fd >= 0
        self._threads = trio.CapacityLimiter(1)
        """Not those that wait for reads."""
        self._adopting = trio.Lock()
        self._is_alone = False
        """There is no keeper, as far as we have noticed."""

    @property
    def has_server(self) -> bool:
        """Another server answers, and ours is to take over from it."""
        return self.values.get("server", "0") not in ("0", str(os.getpid()))

    @property
    def connects(self) -> bool:
        """Servers come and go by themselves: one that is ended leaves the mount to the next."""
        return self.values.get("mode") == "keep"

    def facts(self) -> MountFacts | None:
        """What an earlier server left. None: there was none that mounted. Raises KeptError."""
        if self.fuse_fd < 0:
            return None
        saved = self.kept.facts
        if saved is None:
            return None
        try:
            return msgspec.json.decode(saved, type=MountFacts)
        except msgspec.MsgspecError as error:
            raise CachefsError(f"the state of this mount was made by another version: {error}") from error

    # ---- what is told ----------------------------------------------------------------------------------------------

    def _send(self, message: str, fds: Sequence[int] = ()) -> None:
        with suppress(OSError):  # it is gone, which `follow` sees
            socket.send_fds(self._raw, [message.encode()], list(fds))

    def mounted(self, fd: int, connection: int, below: tuple[int, int, int] | None) -> None:
        """`below`: see `Mount`."""
        self.fuse_fd = fd
        self._is_mounted = True
        self.values["connection"] = str(connection)
        self.values["below"] = ",".join(map(str, below or ()))
        self._send(f"mounted {connection} {self.values['below']}", [fd])

    def remount(self) -> None:
        """The connection that the keeper holds is given up."""
        self.fuse_fd = -1
        self._is_mounted = False
        self._send("remount")

    async def stand_by(self) -> None:
        """Returns when the earlier server is gone."""
        self._phase = "standby"
        self._send("standby")
        await self._go.wait()

    def ready(self) -> None:
        self._phase = "ready"
        self.values["established"] = "1"
        self._send("ready")

    def ending(self) -> None:
        self._phase = "ending"
        self._send("ending")

    def done(self) -> None:
        self._is_done = True
        self._send("done 0")

    def end_if_left(self) -> None:
        """We were told to end before we served: the keeper takes away what an earlier server mounted."""
        if not (self._is_done or self.hands_over or self.connects):
            self._send("ending")

    # ---- what is heard ---------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Do what the keeper says, and start another when it dies. Runs until cancelled.

        Raises TransportError when it dies while the earlier server still answers. One that drains starts a keeper as
        well: it ends as it was told, and that keeper has another take its place.
        """
        while True:
            try:
                data = await self._link.recv(_MESSAGE)
            except ConnectionResetError:
                continue  # told once, when the keeper had not read all; what it said before comes next
            except OSError:
                data = b""
            match data.decode(errors="replace").split(" ")[0]:
                case "" if self._phase == "ending":
                    return
                case "" if self._phase in (None, "standby") and self._another_answers():
                    # That one starts a keeper, and is to be the only one that does.
                    raise TransportError("the keeper ended during the upgrade; the server that was there goes on")
                case "":
                    await self._start_keeper()
                case "ping":
                    self._send("pong")
                case "go":
                    self.values["server"] = "0"
                    self._go.set()
                case "drain":
                    self.hands_over = True
                    self.on_drain()
                case "end":
                    self.was_told_to_end = True
                    self.on_end()

    def _another_answers(self) -> bool:
        """For all we know: whether a process of another namespace lives, we do not."""
        return self.has_server and (self.connects or os.path.exists(f"/proc/{self.values['server']}"))

    async def _start_keeper(self) -> None:
        self._is_alone = True
        self._link.close()
        if self._keeper is not None:
            # The second one that dies: not in a hurry.
            await trio.sleep(_PAUSE_S)
            self._keeper.poll()
        if not await self._find_home(_HOME_S):
            while True:
                try:
                    self._begin_keeper()
                    break
                except OSError as error:  # this machine has no memory or no processes left, for now; we go on serving
                    logger.error("the keeper is gone, and no other could be started error=%s", error)
                    await trio.sleep(_PAUSE_S)
        if self._phase is not None:
            self._send(self._phase)

    async def leave(self) -> None:
        """Before a server ends that leaves the mount to the next: somebody has to hold it meanwhile. It takes a while
        if the keeper is gone as well.
        """
        if self._phase != "ready" or self._is_done or not (self.connects and self._is_mounted):
            return
        while not self._is_alone:
            try:
                self._is_alone = not self._raw.recv(_MESSAGE)  # what it told us before does not matter any more
            except BlockingIOError:
                return
            except ConnectionResetError:
                pass  # told once
        logger.info("the keeper is gone, and this server is to end: it waits until another one holds the mount")
        if not await self._find_home(_LEAVING_S):
            with suppress(OSError):
                self._begin_keeper()

    def _has_keeper(self, link: socket.socket) -> None:
        self._raw, self._link = link, _as_trio(link)
        self._is_alone = False

    async def _find_home(self, limit_s: float) -> bool:
        """Hand over what we hold to the process that has the keepers of this node, which is to outlive us. It may just
        be started again, or hang.
        """
        if "home" not in self.values:
            return False
        give_up_at = trio.current_time() + limit_s
        async with self._adopting:
            while self._is_alone:
                try:
                    ours, pid = await trio.to_thread.run_sync(self._be_adopted, limiter=self._threads)
                    self._has_keeper(ours)
                    logger.info("the keeper was gone, the node has another one pid=%s", pid)
                except OSError as error:
                    if trio.current_time() > give_up_at:
                        message = "no node-keeper takes the mount over socket=%s error=%s"
                        logger.warning(message, self.values["home"], error)
                        return False
                    await trio.sleep(_PAUSE_S / 4)
        return True

    def _be_adopted(self) -> tuple[socket.socket, str]:
        """Our end of the link to the new keeper, and its process id. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as opened:
            opened.enter_context(theirs)
            on_failure = opened.enter_context(ExitStack())
            on_failure.enter_context(ours)
            home = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            home.settimeout(_ADOPTION_S)
            home.connect(self.values["home"])
            fds = [self._listener, self._memfd, theirs.fileno(), *([self.fuse_fd] if self._is_mounted else [])]
            values = {**self._values_for_keeper(), "pid": os.getpid()}
            words = ["adopt", self._mountpoint, *(f"{key}={value}" for key, value in values.items() if value != "")]
            socket.send_fds(home, ["\0".join(words).encode()], fds)
            answer = home.recv(_MESSAGE).decode(errors="replace")
            if not answer.startswith("ok "):
                raise OSError(answer)
            on_failure.pop_all()
        return ours, answer.removeprefix("ok ")

    def _values_for_keeper(self) -> dict[str, str]:
        return {key: value for key, value in self.values.items() if key not in ("keeper", "server", "state")}

    def _begin_keeper(self) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        values: dict[str, Any] = {
            **self._values_for_keeper(),
            "listen": self._listener,
            "memfd": self._memfd,
            "server": theirs.fileno(),
            "pid": os.getpid(),
        }
        passed = [self._listener, self._memfd, theirs.fileno()]
        if self._is_mounted:
            values["fuse"] = self.fuse_fd
            passed.append(self.fuse_fd)
        passed += [int(each) for each in self.values.get("hold", "").split(",") if each]
        with ExitStack() as opened:
            opened.enter_context(theirs)
            on_failure = opened.enter_context(ExitStack())
            on_failure.enter_context(ours)
            command_fd = command_file(self.command)
            opened.callback(os.close, command_fd)
            self._keeper = subprocess.Popen(
                keeper_command(self._mountpoint, values, command_fd),
                stdin=subprocess.DEVNULL,
                pass_fds=[*passed, command_fd],
                start_new_session=True,
            )
            on_failure.pop_all()
        self._has_keeper(ours)
        logger.info("the keeper was gone, another one is started pid=%d", self._keeper.pid)

    def close(self) -> None:
        """What the keeper holds stays."""
        self._raw.close()
        self.kept.close()
        for fd in (self._memfd, self._listener):
            os.close(fd)


def _as_trio(link: socket.socket) -> trio.socket.SocketType:
    link.setblocking(False)
    return trio.socket.from_stdlib_socket(link)


def ask_node_keeper(path: str, words: Sequence[str]) -> str:
    """What the process that has the keepers of a node answers: after "ok ". Raises TransportError, when there is none
    as well.
    """
    answer = ask(path, "\0".join(words), _WHO_S)
    if not answer.startswith("ok"):
        raise TransportError(f"the node-keeper at {path}: {answer.removeprefix('failed ')}")
    return answer.removeprefix("ok").strip()


def keeper_command(mountpoint: str, values: dict[str, Any], command_fd: int) -> list[str]:
    """What starts a keeper. -I and -S: nothing of the environment or of packages is looked at."""
    return [
        *(sys.executable, "-I", "-S", KEEPER, "mount-keeper", mountpoint, f"command={command_fd}"),
        *(f"{key}={value}" for key, value in values.items() if value != ""),
    ]


def command_file(server: Sequence[str]) -> int:
    """A descriptor of a file with what starts a server, for a keeper; inheritable, and the caller's to close."""
    fd = os.memfd_create("cachefs-server", 0)
    os.write(fd, b"".join(os.fsencode(each) + b"\0" for each in server))
    return fd


def parse_facts(text: str) -> tuple[dict[str, str], list[str]]:
    """(values, command of servers) of what a keeper tells. Raises ConfigError for one of another version."""
    head, *command = text.split("\0")
    version, *words = head.split("\n")
    if version != VERSION:
        raise ConfigError("keeper", f"version {version}", f"version {VERSION}")
    return dict(word.split("=", 1) for word in words), command


def socket_of(mountpoint: str, directory: str) -> str:
    """The path of the keeper's socket, in a directory for sockets. `mountpoint`: absolute, without symbolic links.

    Without a hyphen: what follows one is the process id of a worker.
    """
    return os.path.join(directory, f"mount_{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]}.sock")


def listen(path: str, *, replaces: bool = False) -> socket.socket | None:
    """None when a keeper listens there already, unless it `replaces` that one. What a killed one left is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if not replaces and probe.connect_ex(path) == 0:
                listener.close()
                return None
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_nowhere() -> socket.socket:
    """For a keeper that nobody can ask for an upgrade, as there is no directory for its socket."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")  # a name that the kernel chooses, in no directory
    listener.listen(8)
    return listener


def has_finished(path: str) -> bool:
    """Whether the keeper that listens there, whose mountpoint has nothing mounted on it, had something mounted there:
    it waits for the last who has a file open, or is about to end.
    """
    try:
        values, _ = parse_facts(ask(path, "who", _WHO_S).removeprefix("keeper "))
    except (TransportError, ConfigError):
        return True  # it ended, or has not answered for so long
    return values.get("established") == "1"


def is_listening(path: str) -> bool:
    """Whether somebody has that socket, also one that does not answer. Never waits."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN)


def ask(path: str, message: str, limit_s: float = _ANSWER_S) -> str:
    """A keeper's answer. Raises TransportError when there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(limit_s)
        try:
            link.connect(path)
            link.send(message.encode())
            answer = link.recv(_MESSAGE).decode(errors="replace")
        except OSError as error:
            raise TransportError(f"no keeper answers at {path}: {error.strerror or error}") from error
    if not answer:
        raise TransportError(f"the keeper at {path} ended before it answered")
    return answer
