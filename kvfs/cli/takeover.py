"""How a pool passes from one owner to the next without its memory and mount being lost.

Layer: L5.

    heir                           owner
    TakeOver (control socket)  ->  refused, or:
                               <-  TakeOverAnswer
                                   ends its doors, closes the pool, keeps lock and memory
                               <-  Parcel (names; a descriptor each), ..., one that is the last
    opens the pool, its doors
    Taken                      ->  exits with code 0

- The lock is among the descriptors (`estate.LOCK`): it is never free in between, and nobody else
  owns the pool, who may be waiting for it.
- If the heir goes before it said Taken, the owner opens the pool again, from the memory it still
  has, and goes on. It never does so while the heir may be at work: only once the connection has
  ended. While it cannot, it waits, for a next heir, too (`kvfs.cli.succession`).
- If the owner goes, the heir does, too, or finds a pool whose owner has crashed.
- Over a service manager's store the same descriptors pass without a word (`Estate.of_manager`).
"""

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from kvfs import __version__
from kvfs.admin import messages as msg
from kvfs.cli import notify
from kvfs.cli.estate import PARCEL_BYTES_MAX, Estate, Parcel
from kvfs.clients import channel
from kvfs.clients.peer import peer_of
from kvfs.clock import Clock, SystemClock
from kvfs.control_client import ControlClient
from kvfs.devices.keeper import MEMORY_VERSION, is_memory
from kvfs.errors import (
    BusyError,
    FormatVersionError,
    KvfsError,
    RefusedError,
    UnavailableError,
    UsageError,
)

TIMEOUT_S: Final = 60.0
_GONE_S: Final = 10.0
_LEAST_S: Final = 0.01
_NS_PER_S: Final = 1_000_000_000
_log = logging.getLogger("kvfs.service")


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
                connection, PARCEL_BYTES_MAX, idle_s=left_s, timeout_s=left_s
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
        is_activated: Clients come in by a socket of the service manager's: heirs are refused.
    """

    def __init__(self, *, mount: str = "") -> None:
        """Accept none yet; see `open`.

        Args:
            mount: Where the pool is mounted, empty if it is not.
        """
        self._wake: Callable[[], None] | None = None
        self._mount = mount
        self.core_version = 0
        self.is_activated = False
        self._lock = threading.Lock()
        self._is_accepted = False
        self._connection: socket.socket | None = None

    @property
    def has_one(self) -> bool:
        """Whether the pool is to be given away."""
        return self._connection is not None

    @property
    def is_open(self) -> bool:
        """Whether heirs are accepted, which they are from `open` to `close` or `give`."""
        return self._wake is not None

    def open(self, wake: Callable[[], None]) -> None:
        """Accept heirs. `wake` is called, from another thread: close the pool, then `give`."""
        self._wake = wake

    def close(self) -> None:
        """Accept none for now. One that was accepted before is to be given the pool."""
        self._wake = None

    def check(self, question: msg.TakeOver) -> msg.TakeOverAnswer:
        """Accept an heir, or raise.

        Raises:
            FormatVersionError: It cannot read the memory, or not talk to kvfs-core.
            RefusedError: It would not serve the mount, or a service manager is to do it.
            BusyError: There is another one.
        """
        if question.memory_version != MEMORY_VERSION:
            raise FormatVersionError(
                f"memory of version {MEMORY_VERSION} cannot be handed to a kvfs that reads version "
                f"{question.memory_version}; stop this owner, then start the other without "
                "--takeover: memory starts empty"
            )
        if self.is_activated:
            raise RefusedError(
                "the service manager listens for this pool's clients, and would start another "
                "owner: restart the service instead ('systemctl restart kvfs-serve@NAME'), which "
                "keeps what is warm as well"
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
        pid = peer_of(connection).pid
        try:
            with connection:
                connection.settimeout(TIMEOUT_S)
                for parcel, fds in estate.parcels():
                    raw = msgspec.msgpack.encode(parcel)
                    channel.send(connection, raw, PARCEL_BYTES_MAX, fds)
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
        received = channel.receive(connection, PARCEL_BYTES_MAX, idle_s=1.0, timeout_s=1.0)
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
