"""What a service manager is told, and what it hands over: systemd's protocol, in a few lines.

Layer: L5.

- Told over the datagram socket in $NOTIFY_SOCKET; without it nothing happens. A manager that does
  not listen is no reason to fail.
- With $WATCHDOG_USEC a thread says twice per interval that the service is alive, each time after
  it has done what the service gave it to try. What hangs there ends the messages.
- Sockets that the manager has opened (socket activation) come by name.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Final

_FIRST_FD: Final = 3
_US_PER_S: Final = 1_000_000


def tell(*assignments: str) -> bool:
    """Tell the service manager, e.g. `READY=1`; say whether there is one that listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as connection:
        connection.connect(address)
        connection.sendall("\n".join(assignments).encode("utf-8", "backslashreplace"))
        return True
    return False


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


def inherited_sockets() -> dict[str, socket.socket]:
    """Return the listening sockets that the service manager has opened, by name; once."""
    try:
        is_ours = int(os.environ.pop("LISTEN_PID", "0")) == os.getpid()
        count = int(os.environ.pop("LISTEN_FDS", "0"))
    except ValueError:
        return {}
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found: dict[str, socket.socket] = {}
    for i in range(count if is_ours else 0):
        fd = _FIRST_FD + i
        os.set_inheritable(fd, False)
        found[names[i] if i < len(names) and names[i] else str(fd)] = socket.socket(fileno=fd)
    return found
