"""Who is at the other end of a UNIX socket, what a namespace lets him do, who answers him.

Layer: L5.

- A namespace is a directory of the mount, and its mode says who may do what: reading blocks needs
  r, storing and naming needs w. The superuser may everything.
"""

import array
import errno
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Final

from kvfs.engine.catalog_schema import Node
from kvfs.errors import BusyError, RefusedError

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
_GROUPS_MAX: Final = 65536
READ: Final = 4
WRITE: Final = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """A process, as the kernel saw it when it connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int]

    def may(self, node: Node, bits: int) -> bool:
        """Say whether a directory's mode grants READ, WRITE or both."""
        if self.uid == 0:
            return True
        if self.uid == node.uid:
            granted = node.mode >> 6
        elif self.gid == node.gid or node.gid in self.groups:
            granted = node.mode >> 3
        else:
            granted = node.mode
        return granted & bits == bits

    def require(self, node: Node, bits: int) -> None:
        """Raise RefusedError unless a namespace's root grants this."""
        if not self.may(node, bits):
            what = "written" if bits & WRITE else "read"
            raise RefusedError(
                f"namespace {node.name!r} may not be {what} by user {self.uid}: it has mode "
                f"{node.mode:03o} and belongs to {node.uid}:{node.gid}; 'chmod' it on the mount"
            )


def peer_of(connection: socket.socket) -> Peer:
    """Ask the kernel who has connected."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    groups = array.array("I")
    try:
        groups.frombytes(connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * 4))
    except OSError:
        groups = array.array("I")  # a kernel before 4.13: its own group must do
    return Peer(pid, uid, gid, frozenset(groups))


def pidfd_of(connection: socket.socket) -> int | None:
    """Return a descriptor of the process that connected, readable once it has ended.

    None where the kernel gives none: then its end is that of its connections alone.

    Raises:
        RefusedError: It has ended already.
    """
    gone = RefusedError("the process that connected has ended; connect from one that lives")
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:  # before Linux 6.5
        if error.errno == errno.ESRCH:
            raise gone from error
    try:
        return os.pidfd_open(peer_of(connection).pid)
    except ProcessLookupError:
        raise gone from None
    except (OSError, ValueError):  # of another container, whose numbers are not ours
        return None


def begin(thread: threading.Thread) -> BusyError | None:
    """Start the thread that answers a connection; return why it cannot be, if so."""
    try:
        thread.start()
    except RuntimeError as error:  # the process may have no more
        return BusyError(f"the pool's owner has no thread left for this: {error}; try again")
    return None
