"""`kvfs.open_pool`: the owner if nobody is, else a client of the owner.

Layer: L4.

- A socket at which nobody listens was left by an owner that died: whoever restarts it, a service
  manager for one, does so in a moment. It is waited for, lest an engine that comes in between
  becomes an owner that serves nobody, and keeps the service from starting.
- A client needs neither the engine nor the devices: it is asked first who serves the pool, and they
  are imported only where nobody does.
"""

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvfs.clients.channel import SOCKET_NAME, socket_address
from kvfs.errors import BusyError, UnavailableError

if TYPE_CHECKING:
    from kvfs.clients.remote import RemotePool
    from kvfs.clock import Clock
    from kvfs.config import PoolOptions
    from kvfs.pool import Pool

RESTART_S: Final = 5.0
_LOOK_S: Final = 0.1


def open_pool(
    path: str | os.PathLike[str],
    *,
    options: "PoolOptions | None" = None,
    clock: "Clock | None" = None,
    allow_moved: bool = False,
    background: bool = True,
    restart_s: float = RESTART_S,
) -> "Pool | RemotePool":
    """Open a pool: as its owner if nobody owns it, else as a client of its owner.

    Args:
        path: The pool's directory.
        options: How this process runs it, as its owner.
        clock: Time; the system's when missing.
        allow_moved: As the owner, accept devices that were copied, moved, or left by another host.
        background: As the owner, start the background thread; without it nothing persists async
            blocks but `flush`.
        restart_s: How long to wait for the next owner, where one that served the pool has died,
            before becoming the owner.

    Raises:
        NotFoundError: There is no pool.
        BusyError: Another process owns it and serves nobody; the message has its pid.
        RefusedError: Another process serves it, but not this user.
        FormatVersionError: Another process serves it, in another version of the protocol.
        DataError: Catalog or superblock damaged, or of another format.
    """
    root = Path(path).absolute()
    client = _attach(root)
    for _ in range(int(restart_s / _LOOK_S)):
        if client is not None or not _is_left(root):
            break
        threading.Event().wait(_LOOK_S)
        client = _attach(root)
    if client is not None:
        return client
    from kvfs import lifecycle

    try:
        pool = lifecycle.open_pool(
            root, options=options, clock=clock, allow_moved=allow_moved, background=background
        )
    except BusyError:
        client = _attach(root)  # its owner may just have started to serve
        if client is None:
            raise
        return client
    if _is_left(root):  # for good, and not to be waited for again
        (root / SOCKET_NAME).unlink(missing_ok=True)
    return pool


def _attach(root: Path) -> "RemotePool | None":
    """Return a client of the pool's owner; None if nobody serves it."""
    if not (root / SOCKET_NAME).exists():
        return None
    from kvfs.clients.remote import RemotePool

    try:
        return RemotePool(root)
    except UnavailableError:
        return None


def _is_left(root: Path) -> bool:
    """Say whether there is a socket at which nobody listens."""
    if not (root / SOCKET_NAME).exists():
        return False
    with socket.socket(socket.AF_UNIX) as connection, socket_address(root) as address:
        connection.setblocking(False)
        try:
            connection.connect(address)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
