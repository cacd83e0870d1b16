"""What passes from one owner of a pool to the next: descriptors, by name.

Layer: L5.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from kvfs.cli import notify
from kvfs.clients import channel
from kvfs.devices.keeper import Keeper, is_memory

if TYPE_CHECKING:
    from kvfs.pool import Pool

LOCK: Final = "lock"
DOOR: Final = "door"  # to kvfs-core, see kvfs.fuse.passing
PARCEL_BYTES_MAX: Final = 1 << 20
_PARCEL_FDS: Final = 60
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
        """Take over descriptors by name; see `of_manager`, and kvfs.cli.takeover.ask."""
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

    def share_lock(self) -> int:
        """Return another descriptor of the pool's lock; -1 if it is to be taken."""
        return os.dup(self._lock_fd) if self._lock_fd >= 0 else -1

    def keep_lock(self, pool: "Pool") -> None:
        """Hold the lock of an open pool, until `close`."""
        if self._lock_fd < 0:
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
                channel.send(connection, msgspec.msgpack.encode(Taken()), PARCEL_BYTES_MAX)
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
