"""What a service manager is told, and what it hands over: systemd's protocol, in a few lines.

Layer: L5.

- Told over the datagram socket in $NOTIFY_SOCKET; without it nothing happens. A manager that does
  not listen is no reason to fail.
- With $WATCHDOG_USEC a thread says twice per interval that the service is alive, each time after
  it has done what the service gave it to try. What hangs there ends the messages.
- Descriptors come by name: sockets that the manager has opened (socket activation), and what an
  earlier owner has left in its store (`DescriptorStore`).
"""

import contextlib
import errno
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Final

_FIRST_FD: Final = 3
_US_PER_S: Final = 1_000_000
_STORED_S: Final = 10.0
_RETRY_S: Final = 0.01
_ATTEMPTS: Final = 1000
_LATER: Final = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.EAGAIN)
_log = logging.getLogger("kvfs.service")


def tell(*assignments: str) -> bool:
    """Tell the service manager, e.g. `READY=1`; say whether there is one that listens."""
    with contextlib.suppress(OSError):
        return _send(assignments, ())
    return False


def _send(assignments: tuple[str, ...], fds: tuple[int, ...]) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    raw = "\n".join(assignments).encode("utf-8", "backslashreplace")
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as connection:
        connection.connect(address)
        socket.send_fds(connection, [raw], list(fds))
    return True


def tell_ready(status: str) -> None:
    """Say that the service does its work. It may be another process than the one started."""
    tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")


def tell_stopping(status: str) -> None:
    """Say that the service ends; what it still has to write may take a while."""
    tell("STOPPING=1", f"STATUS={status}")


def watchdog_interval_s() -> float:
    """Return how often the service manager wants to hear something; 0 for never."""
    try:
        interval_us = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = int(os.environ.get("WATCHDOG_PID", str(os.getpid())))
    except ValueError:
        return 0.0
    return interval_us / _US_PER_S if interval_us > 0 and pid == os.getpid() else 0.0


class Watchdog:
    """Says that the service is alive for as long as it is. Use as a context manager."""

    def __init__(self, attempt: Callable[[], object]) -> None:
        """Watch a service.

        Args:
            attempt: Returns soon if the service is well; called in a thread of the watchdog's.
        """
        self._attempt = attempt
        self._is_ended = threading.Event()
        self._interval_s = watchdog_interval_s()

    def __enter__(self) -> None:
        if self._interval_s:
            threading.Thread(target=self._run, name="kvfs-watchdog", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._is_ended.set()

    def _run(self) -> None:
        while not self._is_ended.wait(self._interval_s / 2):
            self._attempt()
            tell("WATCHDOG=1")


class DescriptorStore:
    """Descriptors in the service manager's hands, for the next start; see kvfs.devices.keeper.

    A thread tells it, in order, so that whoever keeps something does not wait for the manager. What
    it was not told when the process dies is as if it had never been kept.
    """

    def __init__(self) -> None:
        """Begin to tell the manager; without one nothing happens."""
        self._queue: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if os.environ.get("NOTIFY_SOCKET"):
            self._thread = threading.Thread(target=self._run, name="kvfs-store", daemon=True)
            self._thread.start()

    def tell(self, name: str, fd: int) -> None:
        """Note a descriptor to be stored, or with -1 a name to be removed. Does not wait."""
        if self._thread is not None:
            self._queue.put((name, os.dup(fd) if fd >= 0 else -1))

    def close(self) -> None:
        """Wait until the manager was told everything; what is kept later is not told. Idempotent.

        It keeps what it has: for the next start, if there is one.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_STORED_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            name, fd = item
            try:
                if fd < 0:
                    self._tell("FDSTOREREMOVE=1", f"FDNAME={name}")
                else:
                    self._tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))
            except OSError as error:
                _log.warning("service manager does not store %s: %s", name, error)
            finally:
                if fd >= 0:
                    os.close(fd)

    def _tell(self, *assignments: str, fds: tuple[int, ...] = ()) -> None:
        """Send, again for a while if too much is under way."""
        for is_last in (*[False] * _ATTEMPTS, True):
            try:
                _send(assignments, fds)
            except OSError as error:
                if error.errno not in _LATER or is_last:
                    raise
                threading.Event().wait(_RETRY_S)
            else:
                return


def inherited() -> dict[str, int]:
    """Return the descriptors that the service manager has given this process, by name; once.

    Of several of one name the last counts.
    """
    try:
        is_ours = int(os.environ.pop("LISTEN_PID", "0")) == os.getpid()
        count = int(os.environ.pop("LISTEN_FDS", "0"))
    except ValueError:
        return {}
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for i in range(count if is_ours else 0):
        fd = _FIRST_FD + i
        os.set_inheritable(fd, False)
        name = names[i] if i < len(names) and names[i] else str(fd)
        if name in found:
            os.close(found[name])
        found[name] = fd
    return found
