"""How a pool passes from one owner to the next without its memory and mount being lost.

Layer: L5.

    heir                           owner
    TakeOver (control socket)  ->  refused, or:
                               <-  TakeOverAnswer
                                   ends its doors, closes the pool, keeps lock and memory
                               <-  Parcel (names; a descriptor each), ..., one that is the last
    opens the pool, its doors
    Taken                      ->  exits with code 0

- The lock is among the descriptors (`LOCK`): it is never free in between, and nobody else owns the
  pool, who may be waiting for it.
- If the heir goes before it said Taken, the owner opens the pool again, from the memory it still
  has, and goes on. It never does so while the heir may be at work: only once the connection has
  ended.
- If the owner goes, the heir does, too, or finds a pool whose owner has crashed.
- Over a service manager's store the same descriptors pass without a word (`Estate.of_manager`).
"""

import contextlib
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from kvfs import __version__
from kvfs.admin import messages as msg
from kvfs.cli import notify
from kvfs.clients import channel
from kvfs.clock import Clock, SystemClock
from kvfs.control_client import ControlClient
from kvfs.devices.keeper import MEMORY_VERSION, Keeper, is_memory
from kvfs.errors import (
    BusyError,
    FormatVersionError,
    KvfsError,
    RefusedError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from kvfs.pool import Pool

LOCK: Final = "lock"
DOOR: Final = "door"  # to kvfs-core, see kvfs.fuse.core
TIMEOUT_S: Final = 60.0
_PARCEL_FDS: Final = 60
_PARCEL_BYTES_MAX: Final = 1 << 20
_GONE_S: Final = 10.0
_LEAST_S: Final = 0.01
_NS_PER_S: Final = 1_000_000_000
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_log = logging.getLogger("kvfs.service")


class Parcel(msgspec.Struct, frozen=True):
    """Names of the descriptors that come with it, in order."""

    names: list[str]
    is_last: bool = False


class Taken(msgspec.Struct, frozen=True, tag=True):
    """The heir owns the pool and is ready."""


class Estate:
    """What passes from owner to owner.

    Attributes:
        keeper: The memory.
        sockets: Sockets that the service manager has opened, by name.
    """

    def __init__(
        self, found: dict[str, int] | None = None, store: notify.DescriptorStore | None = None,
        connection: socket.socket | None = None,
    ) -> None:  # fmt: skip
        """Take over descriptors by name; see `begin`."""
        found = dict(found or {})
        memory = {name: found.pop(name) for name in list(found) if is_memory(name)}
        self.keeper = Keeper(memory, store.tell if store is not None else None)
        self.sockets: dict[str, socket.socket] = {}
        self._store = store
        self._connection = connection
        self._lock_fd = found.pop(LOCK, -1)
        self._door_fd = found.pop(DOOR, -1)
        for name, fd in found.items():
            try:
                self.sockets[name] = socket.socket(fileno=fd)
            except OSError:
                _log.warning("descriptor of the service manager is not used: %s", name)
                os.close(fd)

    @classmethod
    def of_manager(cls) -> "Estate":
        """Return what the service manager has, and have it store what is kept from now on."""
        return cls(notify.inherited(), notify.DescriptorStore())

    def take_lock(self) -> int:
        """Return the pool's lock, once; -1 if it is to be taken."""
        fd, self._lock_fd = self._lock_fd, -1
        return fd

    def keep_lock(self, pool: "Pool") -> None:
        """Hold the lock of a pool that is about to be closed."""
        self._lock_fd = pool.share_lock()

    @property
    def door_fd(self) -> int:
        """The way to a kvfs-core that serves the pool's mount; -1 if there is none."""
        return self._door_fd

    def keep_door(self, fd: int) -> None:
        """Hold the way to kvfs-core, and let the service manager do so; -1: there is none now."""
        if self._door_fd >= 0:
            os.close(self._door_fd)
            if self._store is not None:
                self._store.tell(DOOR, -1)
        self._door_fd = fd
        if fd >= 0 and self._store is not None:
            self._store.tell(DOOR, fd)

    def confirm(self) -> None:
        """Tell the last owner that it may go: the pool is open here; nothing if there is none."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with connection:
            try:
                channel.send(connection, msgspec.msgpack.encode(Taken()), _PARCEL_BYTES_MAX)
            except OSError as error:
                _log.info("last owner has gone: %s", error)

    def parcels(self) -> Iterator[tuple[Parcel, list[int]]]:
        """Yield everything, a part at a time; the descriptors are valid until the next."""
        with contextlib.ExitStack() as opened:
            found = []
            for name in self.keeper.names():
                fd = self.keeper.take(name)
                opened.callback(os.close, fd)
                found.append((name, fd))
            others = ((LOCK, self._lock_fd), (DOOR, self._door_fd))
            found += [(name, fd) for name, fd in others if fd >= 0]
            for start in range(0, len(found), _PARCEL_FDS):
                part = found[start : start + _PARCEL_FDS]
                yield Parcel([name for name, _ in part]), [fd for _, fd in part]
        yield Parcel([], is_last=True), []

    def close(self) -> None:
        """Close everything here; a service manager has what it was told to store. Idempotent."""
        if self._store is not None:
            self._store.close()
        self.keeper.close()
        for fd in (self._lock_fd, self._door_fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._door_fd = -1
        for unused in self.sockets.values():
            unused.close()
        if self._connection is not None:
            self._connection.close()


# --- the heir


def ask(pool_path: Path, question: msg.TakeOver, timeout_s: float) -> Estate:
    """Have the pool's owner close it, and return what it hands over; nothing if nobody owns it.

    Raises:
        RefusedError, FormatVersionError, BusyError: The owner goes on as before.
        UnavailableError: It does not answer, or did not close the pool, in time. What it does is
            not known; the lock says whether it still owns the pool.
    """
    clock = SystemClock()
    end_ns = clock.monotonic_ns() + int(timeout_s * _NS_PER_S)
    client = ControlClient.connect(pool_path, timeout_s)
    if client is None:
        _log.info("nobody owns %s: nothing to take over", pool_path)
        return Estate.of_manager()
    try:
        answer: msg.TakeOverAnswer = client.ask(question)
    except UsageError as error:
        client.close()
        raise FormatVersionError(
            f"the pool's owner is of a release that hands nothing over ({error}); stop it, then "
            "start without --takeover: memory starts empty"
        ) from error
    except UnavailableError as error:
        client.close()
        raise _hung(pool_path, error) from error
    except KvfsError:
        client.close()
        raise
    _log.info("taking over from pid %d, kvfs %s", answer.pid, answer.kvfs_version)
    connection = client.detach()
    try:
        found = _receive_all(connection, clock, end_ns)
    except OSError as error:
        connection.close()
        raise _hung(pool_path, error, answer.pid) from error
    except BaseException:
        connection.close()
        raise
    store = notify.DescriptorStore()
    for name, fd in notify.inherited().items():
        if is_memory(name):
            store.tell(name, -1)  # of somebody else, or older
            os.close(fd)
        else:
            found[name] = fd
    for name, fd in found.items():
        if is_memory(name):
            store.tell(name, fd)
    return Estate(found, store, connection)


def _hung(pool_path: Path, error: Exception, pid: int = 0) -> UnavailableError:
    who = f"pid {pid}" if pid else f"the process that {pool_path}/lock names"
    reason = str(error) or "no answer in time"
    return UnavailableError(
        f"the pool's owner did not hand it over: {reason}; it goes on, or hangs: see its log, try "
        f"again with a longer --takeover-timeout, or end {who} and start without --takeover: "
        "memory starts empty"
    )


def _receive_all(connection: socket.socket, clock: Clock, end_ns: int) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        while True:
            left_s = max(_LEAST_S, (end_ns - clock.monotonic_ns()) / _NS_PER_S)
            received = channel.receive(
                connection, _PARCEL_BYTES_MAX, idle_s=left_s, timeout_s=left_s
            )
            if received is None:
                raise ConnectionError("it ended while it closed the pool")
            raw, fds = received
            try:
                parcel = msgspec.msgpack.decode(raw, type=Parcel)
            except msgspec.MsgspecError as error:
                channel.close_all(fds)
                raise ConnectionError(f"not understood: {error}") from error
            found.update(zip(parcel.names, fds, strict=False))
            if len(parcel.names) != len(fds):
                raise ConnectionError("descriptors are missing")
            if parcel.is_last:
                return found
    except BaseException:
        for fd in found.values():
            os.close(fd)
        raise


# --- the owner


class Heirs:
    """The owner's side: who may take the pool over, and giving it. One heir at a time.

    Attributes:
        core_version: Of the control protocol that the mount's core speaks; 0: there is none.
    """

    def __init__(self, *, mount: str = "") -> None:
        """Accept none yet; see `open`.

        Args:
            mount: Where the pool is mounted, empty if it is not.
        """
        self._wake: Callable[[], None] | None = None
        self._mount = mount
        self.core_version = 0
        self._lock = threading.Lock()
        self._is_accepted = False
        self._connection: socket.socket | None = None

    @property
    def has_one(self) -> bool:
        """Whether the pool is to be given away."""
        return self._connection is not None

    def open(self, wake: Callable[[], None]) -> None:
        """Accept heirs. `wake` is called, from another thread: close the pool, then `give`."""
        self._wake = wake

    def check(self, question: msg.TakeOver) -> msg.TakeOverAnswer:
        """Accept an heir, or raise.

        Raises:
            FormatVersionError: It cannot read the memory, or not talk to kvfs-core.
            RefusedError: It would not serve the mount.
            BusyError: There is another one.
        """
        if question.memory_version != MEMORY_VERSION:
            raise FormatVersionError(
                f"memory of version {MEMORY_VERSION} cannot be handed to a kvfs that reads version "
                f"{question.memory_version}; stop this owner, then start the other without "
                "--takeover: memory starts empty"
            )
        if self._mount:
            self._check_mount(question)
        with self._lock:
            if self._wake is None:
                raise BusyError("the pool's owner is not ready yet; try again")
            if self._is_accepted:
                raise BusyError("another process takes the pool over at this moment")
            self._is_accepted = True
        return msg.TakeOverAnswer(os.getpid(), __version__)

    def _check_mount(self, question: msg.TakeOver) -> None:
        if question.mount != self._mount:
            raise RefusedError(
                f"the pool is mounted on {self._mount}: take it over with "
                f"'kvfs mount --takeover POOL {self._mount}', or unmount it"
            )
        if not self.core_version:
            raise RefusedError(
                f"mounted without kvfs-core, which would keep {self._mount} alive; unmount it and "
                "mount it again"
            )
        if question.core_version != self.core_version:
            raise FormatVersionError(
                f"kvfs-core of the mount speaks version {self.core_version} of the control "
                f"protocol, this kvfs {question.core_version}; unmount {self._mount} and mount it "
                "again"
            )

    def begin(self, connection: socket.socket) -> None:
        """Take the connection to the heir that was accepted, and wake the owner."""
        self._connection = connection
        assert self._wake is not None
        self._wake()

    def decline(self) -> None:
        """Accept another one."""
        self._is_accepted = False

    def give(self, estate: Estate, end_fd: int = -1) -> bool:
        """Hand everything over, and wait until the heir is ready.

        REQUIRES: The pool is closed, its lock held.

        Args:
            estate: What.
            end_fd: Readable when this process is to end whatever becomes of the heir; -1: a signal
                raises.

        Returns:
            True to end; False when the heir is gone and the pool is to be opened again.
        """
        connection, self._connection = self._connection, None
        self._wake = None
        assert connection is not None
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(raw)
        try:
            with connection:
                connection.settimeout(TIMEOUT_S)
                for parcel, fds in estate.parcels():
                    raw = msgspec.msgpack.encode(parcel)
                    channel.send(connection, raw, _PARCEL_BYTES_MAX, fds)
                return self._wait_taken(connection, end_fd)
        except OSError as error:
            _log.warning("the pool was not taken over: %s; this owner goes on", error)
            _wait_gone(pid)
            return False
        finally:
            self._is_accepted = False

    def _wait_taken(self, connection: socket.socket, end_fd: int) -> bool:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        if end_fd >= 0:
            poll.register(end_fd, select.POLLIN)
        if end_fd in dict(poll.poll()):
            return True  # the heir may be at work: this process does not open the pool again
        received = channel.receive(connection, _PARCEL_BYTES_MAX, idle_s=1.0, timeout_s=1.0)
        if received is None:
            raise ConnectionError("the other process ended before it was ready")
        channel.close_all(received[1])
        return True


def _wait_gone(pid: int) -> None:
    """Wait for a process that is dying: its connection may end before its locks do."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(_GONE_S * 1000)
        finally:
            os.close(fd)
