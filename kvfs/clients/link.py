"""A client's connections to the owner of a pool: one that carries the session, others for requests.

Layer: L4.

- A request goes over a connection of its own, taken from a few that are kept; so threads do not
  wait for each other, and each has its own staging memory for what it puts.
- When the owner goes, every request raises UnavailableError; `remote` makes a new link.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from kvfs import _native
from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.errors import FormatVersionError, KvfsError, RefusedError, UnavailableError
from kvfs.units import MIB

STAGING_BYTES: Final = 64 * MIB
TIMEOUT_S: Final = 120.0  # a put may wait for eviction
CONNECT_TIMEOUT_S: Final = 10.0
LINES_MAX: Final = 8
LOOK_S: Final = 0.5  # between looks at what the owner has freed


@dataclass(slots=True, eq=False)
class Line:
    """One connection for requests, and the memory that this connection shares.

    Attributes:
        staging: Where blocks are copied to before they are put; None until the first put.
        region: The staging memory's number at the owner.
        shared: Numbers at the owner of memory the caller has shared, by the caller's number; 0 for
            what it refuses.
        tray: What the owner copies blocks to; None until the first is fetched.
    """

    connection: socket.socket
    staging: _native.Arena | None = None
    region: int = 0
    shared: dict[int, int] = field(default_factory=dict)
    tray: _native.Arena | None = None

    def ask(self, request: msg.Request, fd: int | None = None) -> tuple[Any, list[int]]:
        """Ask, and return the answer with its descriptors, which the caller closes."""
        return ask(self.connection, request, fd)

    def fetch(self, request: msg.Fetch) -> tuple[msg.FetchAnswer, int]:
        """Have parts of blocks copied to the tray; return which were, and where the tray lies."""
        answer, fds = self.ask(request)
        try:
            if fds:
                self.tray = _native.Arena(fds[0], msg.TRAY_BYTES, writable=False)
            if self.tray is None:
                raise UnavailableError("the pool's owner sent no memory to read from")
        except (OSError, ValueError) as error:
            raise UnavailableError(f"answer of the pool's owner: {error}") from error
        finally:
            channel.close_all(fds)
        return answer, self.tray.address

    def stage(self, nbytes: int) -> _native.Arena:
        """Return staging memory of at least so many bytes, shared with the owner."""
        if self.staging is not None and self.staging.nbytes >= nbytes:
            return self.staging
        size = max(STAGING_BYTES, nbytes)
        fd = _native.memfd("kvfs-staging", size)
        try:
            os.fchmod(fd, 0o666)  # an owner of another user may look which pages are there
            arena = _native.Arena(fd, size)
            if self.staging is not None:
                self.staging = None
                self.ask(msg.Unshare(self.region))
            answer, _ = self.ask(msg.Share(size), fd)
        finally:
            os.close(fd)
        self.staging, self.region = arena, answer.region
        return arena

    def close(self) -> None:
        """Close; idempotent."""
        self.connection.close()
        self.staging = self.tray = None


class Link:
    """A session with one owner. Thread-safe.

    Attributes:
        welcome: What the owner said of itself.
        page: What this process holds.
        ring: What it reads.
        is_lost: The owner is gone.
    """

    def __init__(self, path: Path) -> None:
        """Connect and say Hello.

        Raises:
            UnavailableError: Nobody answers there.
            FormatVersionError: The owner speaks another version of the protocol.
            RefusedError: This user may not connect.
        """
        self._path = path
        self._lock = threading.Condition()
        self._idle: list[Line] = []
        self._count = 0
        self.is_lost = False
        self._main = _connect(path)
        try:
            hello = msg.Hello(msg.VERSION_MIN, msg.VERSION, Path(sys.argv[0] or "python").name)
            self.welcome, fds = ask(self._main, hello, timeout_s=CONNECT_TIMEOUT_S)
            try:
                page, notice, ring = fds
                self.page = _native.LeasePage.attach(page, notice)
                self.ring = _native.AccessRing.attach(ring)
                self.page.beat(self.welcome.heartbeat_ms)
            except ValueError as error:
                raise FormatVersionError(f"answer of the pool's owner: {error}") from error
            except OSError as error:
                raise UnavailableError(f"this process has no room to attach: {error}") from error
            finally:
                channel.close_all(fds)
        except BaseException:
            self._main.close()
            raise

    def wait_lost(self, look: Callable[[], None]) -> None:
        """Return when the owner is gone, or the link was closed; now and then call `look`."""
        with contextlib.suppress(OSError):
            self._main.settimeout(LOOK_S)
            is_open = True
            while is_open:
                try:
                    is_open = bool(self._main.recv(4096))
                except TimeoutError:
                    with contextlib.suppress(KvfsError):  # it is asked again
                        look()
        self.is_lost = True

    def ask(self, request: msg.Request) -> Any:
        """Ask what comes without descriptors, and return the answer."""
        with self.line() as line:
            return line.ask(request)[0]

    def ask_fds(self, request: msg.Request) -> tuple[Any, list[int]]:
        """Ask, and return the answer with its descriptors, which the caller closes."""
        with self.line() as line:
            return line.ask(request)

    @contextlib.contextmanager
    def line(self) -> Iterator[Line]:
        """Yield a connection that nobody else uses.

        Raises:
            UnavailableError: The owner is gone.
        """
        line = self._take()
        is_sound = False
        try:
            yield line
            is_sound = True
        except UnavailableError:
            raise  # perhaps half an answer is still to come
        except KvfsError:
            is_sound = True
            raise
        finally:
            with self._lock:
                if is_sound and not self.is_lost:
                    self._idle.append(line)
                else:
                    line.close()
                    self._count -= 1
                self._lock.notify()

    def _take(self) -> Line:
        with self._lock:
            self._lock.wait_for(
                lambda: self.is_lost or self._idle or self._count < LINES_MAX, TIMEOUT_S
            )
            if self.is_lost:
                raise UnavailableError("the pool's owner is gone; try again when there is another")
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            line = Line(_connect(self._path))
            line.ask(msg.Join(self.welcome.token))
        except BaseException as error:
            with self._lock:
                self._count -= 1
            if isinstance(error, RefusedError):  # another owner has taken the old one's place
                raise UnavailableError("the pool has another owner by now; try again") from error
            raise
        return line

    def close(self) -> None:
        """Say goodbye; idempotent. What is held stays mapped, but is held no more."""
        self.is_lost = True
        with contextlib.suppress(OSError):
            self._main.shutdown(socket.SHUT_RDWR)
        with self._lock:
            while self._idle:
                self._idle.pop().close()
            self._lock.notify_all()

    def dispose(self) -> None:
        """Close the descriptors, after `close`."""
        self._main.close()


def _connect(path: Path) -> socket.socket:
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise UnavailableError(f"this process has no descriptor left: {error}") from error
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        with channel.socket_address(path) as address:
            connection.connect(address)
    except PermissionError as error:
        connection.close()
        raise RefusedError(f"this user may not use the pool: {path}: {error}") from error
    except OSError as error:
        connection.close()
        raise UnavailableError(f"the pool has no owner that serves it: {path}: {error}") from error
    return connection


def ask(
    connection: socket.socket, request: msg.Request, fd: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[Any, list[int]]:  # fmt: skip
    """Ask over a connection, and return the answer with its descriptors.

    Raises:
        KvfsError: What the owner raised, as the same class.
        UnavailableError: The owner went away, or gives no answer in time.
    """
    raw = msgspec.msgpack.encode(request)
    try:
        connection.settimeout(timeout_s)
        # An owner that refuses says so and closes at once: its answer may be there already.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.send(connection, raw, msg.REQUEST_BYTES_MAX, () if fd is None else (fd,))
        received = channel.receive(
            connection, msg.REPLY_BYTES_MAX, idle_s=timeout_s, timeout_s=timeout_s
        )
    except TimeoutError as error:
        raise UnavailableError("the pool's owner gives no answer; see its log") from error
    except OSError as error:
        raise UnavailableError(f"connection to the pool's owner broke: {error}") from error
    if received is None:
        raise UnavailableError("the pool's owner closed the connection; try again")
    raw, fds = received
    try:
        reply = _REPLIES.decode(raw)
        if reply.failure is not None:
            raise msg.error_of(reply.failure)
        if reply.fd_count != len(fds):
            raise UnavailableError("descriptors of the pool's owner were lost on the way")
        return msgspec.msgpack.decode(reply.answer, type=msg.ANSWERS[type(request)]), fds
    except msgspec.MsgspecError as error:
        channel.close_all(fds)
        raise UnavailableError(f"answer of the pool's owner not understood: {error}") from error
    except BaseException:
        channel.close_all(fds)
        raise


def u64(values: Any) -> bytes:
    """Return numbers as the bytes of an array."""
    return np.ascontiguousarray(values, np.uint64).tobytes()


_REPLIES: Final = msgspec.msgpack.Decoder(msg.Reply)
