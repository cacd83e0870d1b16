"""kvfs-core, the native program in front of pyfuse3: found, started, watched, ended.

Layer: L5.

- The core owns /dev/fuse and the mount. FUSE messages that it does not answer itself come over a
  socket of packets, which pyfuse3 takes for /dev/fuse; a second one is for control.
- This side keeps a duplicate of the core's end of the first, so that pyfuse3 never reads an end of
  file there. That the core has ended shows on the control socket, to the thread that watches it.
- A core that answers no ping for 10 s is given up: the kernel's connection is aborted, which fails
  whatever waits for the mount, and the core is killed.
- Inside a process that the core itself started (`Core.inherited`), the sockets come by environment.
- By the door (`door_fd`, see `passing`) another process becomes the owner (`Core.enter`).
"""

import contextlib
import logging
import os
import select
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvfs import _native
from kvfs.clock import Clock
from kvfs.errors import KvfsError, UnavailableError
from kvfs.fuse import mountpoint as mountpoints
from kvfs.fuse.core_client import CoreClient

NAME: Final = "kvfs-core"
ENV_PATH: Final = "KVFS_CORE"
ENV_REQUESTS: Final = "KVFS_CORE_REQUESTS"
ENV_CONTROL: Final = "KVFS_CORE_CONTROL"
ENV_DOOR: Final = "KVFS_CORE_DOOR"
_SOCKET_BYTES: Final = 8 << 20
_PING_S: Final = 1.0
_GIVE_UP_NS: Final = 10_000_000_000
_END_S: Final = 5.0
_PATIENCE_MS: Final = 60_000  # that requests have which come while there is no owner
_DRAIN_LOOKS: Final = 200
_DRAIN_PAUSE_S: Final = 0.01
_SO_SNDBUFFORCE: Final = 32
_CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_log = logging.getLogger("kvfs.fuse")


def find() -> Path:
    """Return where the program is: $KVFS_CORE, or beside the extension module.

    Raises:
        UnavailableError: It is not there, or cannot be run.
    """
    path = Path(os.environ.get(ENV_PATH) or Path(str(_native.__file__)).with_name(NAME))
    if not os.access(path, os.X_OK):
        raise UnavailableError(f"no program {path}; run 'make setup', or install kvfs again")
    return path


class Core:
    """A running kvfs-core.

    Attributes:
        client: Control messages.
        requests_fd: FUSE messages; pyfuse3 closes it.
        door_fd: By which another owner comes in; closed with the rest, if it was not taken.
        counters: What the core counted, as of the last ping.
        mountpoint: Where it mounts.
    """

    def __init__(
        self, requests_fd: int, client: CoreClient, mountpoint: Path, clock: Clock,
        process: "subprocess.Popen[bytes] | None" = None, peer: socket.socket | None = None,
        door_fd: int = -1,
    ) -> None:  # fmt: skip
        """Take over open sockets; see `start`, `inherited` and `enter`."""
        self.client = client
        self.door_fd = door_fd
        self.requests_fd = requests_fd
        self.mountpoint = mountpoint
        self.counters: dict[str, int] = {}
        self._clock = clock
        self._process = process
        self._peer = peer
        self._said: deque[str] = deque(maxlen=20)
        self._has_mounted = False
        self._is_closing = threading.Event()
        self._threads: list[threading.Thread] = []
        if process is not None:
            self._start(self._pass_on_log, "kvfs-core-log")
        try:
            self.hello = client.hello()
        except (KvfsError, OSError) as error:
            self.close()
            reason = self._said[-1] if self._said else str(error)
            raise UnavailableError(f"mount failed: {mountpoint}: {reason}") from error
        self._has_mounted = True

    @classmethod
    def start(
        cls, mountpoint: Path, options: Sequence[str], clock: Clock, *,
        respawn: Sequence[str] = (),
    ) -> "Core":  # fmt: skip
        """Start the program and let it mount.

        Args:
            mountpoint: Prepared.
            options: Of the mount and of the core.
            clock: For deadlines.
            respawn: Command by which the core starts a new owner when this process dies.

        Raises:
            UnavailableError: It did not mount; the message says why.
        """
        program = find()
        requests, requests_peer = _socket_pair()
        control, control_peer = _socket_pair()
        door, door_peer = _socket_pair()
        fds = (requests_peer.fileno(), control_peer.fileno(), door_peer.fileno())
        command = [
            str(program), "--requests", str(fds[0]), "--control", str(fds[1]), "--door",
            str(fds[2]), str(mountpoint), ",".join(options), "--", *respawn,
        ]  # fmt: skip
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, pass_fds=fds, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            for end in (requests, requests_peer, control, control_peer, door, door_peer):
                end.close()
            raise UnavailableError(f"{program} cannot run: {error.strerror}") from error
        control_peer.close()
        door_peer.close()
        client = CoreClient(control, clock)
        return cls(
            requests.detach(), client, mountpoint, clock, process, requests_peer, door.detach()
        )

    @classmethod
    def enter(cls, door_fd: int, clock: Clock, *, respawn: Sequence[str] = ()) -> "Core":
        """Become the owner of a core by its door, which stays the caller's.

        Args:
            door_fd: The door.
            clock: For deadlines.
            respawn: As for `start`, from now on.

        Raises:
            UnavailableError: There is nobody behind the door, or another version.
        """
        requests, requests_peer = _socket_pair()
        control, control_peer = _socket_pair()
        command = b"".join(os.fsencode(word) + b"\0" for word in respawn)
        door = socket.socket(fileno=os.dup(door_fd))
        try:
            # A packet without a byte would look like the end of the connection.
            fds = [requests_peer.fileno(), control_peer.fileno()]
            socket.send_fds(door, [command or b"\0"], fds)
        except OSError as error:
            requests.close()
            control.close()
            requests_peer.close()
            raise UnavailableError(f"no kvfs-core behind the door: {error}") from error
        finally:
            control_peer.close()
            door.close()
        core = cls(
            requests.detach(), CoreClient(control, clock), Path(), clock, None, requests_peer
        )
        core.mountpoint = mountpoints.path_of_device(core.hello.device_minor)
        return core

    @classmethod
    def inherited(cls, clock: Clock) -> "Core":
        """Take over the sockets that the core gave to the owner it started.

        Raises:
            UnavailableError: The environment names none.
        """
        try:
            requests = int(os.environ.pop(ENV_REQUESTS))
            control = socket.socket(fileno=int(os.environ.pop(ENV_CONTROL)))
            door = int(os.environ.pop(ENV_DOOR))
        except (KeyError, ValueError, OSError) as error:
            raise UnavailableError("only kvfs-core starts a new owner of a mount") from error
        for fd in (requests, control.fileno(), door):
            os.set_inheritable(fd, False)
        core = cls(requests, CoreClient(control, clock), Path(), clock, door_fd=door)
        # It must not be looked at: that would be answered by this process.
        core.mountpoint = mountpoints.path_of_device(core.hello.device_minor)
        return core

    @property
    def has_ended(self) -> bool:
        """Whether the program is gone."""
        return self.client.has_ended

    def take_door(self) -> int:
        """Return the door, for the caller to close."""
        fd, self.door_fd = self.door_fd, -1
        return fd

    def hold(self) -> None:
        """Let nothing more come from the kernel; return when what came was taken by pyfuse3."""
        self.client.hold(_PATIENCE_MS)
        poll = select.poll()
        poll.register(self.requests_fd, select.POLLIN)
        for _ in range(_DRAIN_LOOKS):
            if not poll.poll(0):
                return
            self._is_closing.wait(_DRAIN_PAUSE_S)

    def leave(self) -> None:
        """Let go of a core that goes on without this process; the requests' socket stays."""
        self._is_closing.set()
        self.client.note_end()
        self.client.close()
        if self._peer is not None:
            self._peer.close()
        self._close_door()

    def _close_door(self) -> None:
        fd = self.take_door()
        if fd >= 0:
            os.close(fd)

    def watch(self, on_end: Callable[[], None]) -> None:
        """Ping the core from a thread of its own; call `on_end` there when it has ended."""

        def run() -> None:
            self._ping()
            on_end()

        self._start(run, "kvfs-core-watch")

    def stop(self) -> None:
        """Let the core detach and end; end it if it does not."""
        with contextlib.suppress(KvfsError, OSError):
            self.client.stop()
            self._wait_end(_END_S)

    def close(self) -> None:
        """Let go of everything; a core that still runs is killed. The requests' socket stays."""
        self._is_closing.set()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S if self.has_ended else 0.1)
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a thread may be in the kernel
                self._process.wait(_END_S)
        self.client.close()
        self._close_door()
        if self._peer is not None:
            self._peer.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()

    def abort(self) -> None:
        """Fail whatever waits for the mount, and end the core.

        A core that was killed may leave a thread in the kernel, and with it the connection.
        """
        try:
            if not os.path.ismount(_CONNECTIONS):
                mountpoints.mount_fusectl(_CONNECTIONS)
            (_CONNECTIONS / str(self.hello.device_minor) / "abort").write_text("1")
        except FileNotFoundError:
            pass  # it is gone already
        except OSError as error:
            _log.warning("connection could not be aborted: %s", error)
        if self._process is not None:
            self._process.kill()
        self.client.note_end()

    # --- internals

    def _start(self, function: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=function, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _ping(self) -> None:
        """Return when the core has ended, was given up, or this side is closing."""
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLRDHUP)
        answered_ns = self._clock.monotonic_ns()
        while not self._is_closing.is_set():
            if poll.poll(_PING_S * 1000):
                self.client.note_end()
                return
            try:
                self.counters = self.client.status()
                answered_ns = self._clock.monotonic_ns()
            except OSError as error:
                _log.warning("kvfs-core has no status: %s", error)
            except UnavailableError as error:
                if self.client.has_ended:
                    return
                if self._clock.monotonic_ns() - answered_ns >= _GIVE_UP_NS:
                    _log.error("%s; mount is given up: %s", error, self.mountpoint)
                    self.abort()
                    return

    def _wait_end(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self.client.fileno(), select.POLLRDHUP)
        if poll.poll(seconds * 1000):
            self.client.note_end()

    def _pass_on_log(self) -> None:
        """Log what the core says; a pipe, so that it keeps no terminal of ours open."""
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            self._said.append(text)
            if self._has_mounted:
                _log.warning("%s", text)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Make a pair of packet sockets that take the largest messages the system lets us."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):
            try:
                end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
            except PermissionError:
                continue  # without privilege as much as net.core.wmem_max allows
            break
    return pair
