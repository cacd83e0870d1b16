"""Memory that outlives its owner: descriptors by name, in hands that stay.

Layer: L1.

- A memory device gives each of its memfds to a keeper and takes it back when the memory is freed.
  What the keeper holds when the owner ends is what the next owner finds: it goes to another process
  over a socket, or lies with the service manager meanwhile (`tell`).
- Names begin with what they belong to: `kvfs1.` (the version of what lies in the memory), a
  device's uuid, a dot. They hold neither ':' nor spaces, as the service manager wants it.

Concurrency: every method is atomic; `tell` is called under the lock and must not wait.
"""

import os
import threading
from collections.abc import Callable, Mapping
from typing import Final
from uuid import UUID

MEMORY_VERSION: Final = 1
_ROOT: Final = "kvfs"

Tell = Callable[[str, int], None]
"""Told of a name and its descriptor, which it may use until it returns; -1: the name is gone."""


def prefix_of(uuid: UUID, version: int = MEMORY_VERSION) -> str:
    """Return how the names of a device's memory begin."""
    return f"{_ROOT}{version}.{uuid.hex}."


def is_memory(name: str) -> bool:
    """Say whether a name is that of some version's memory."""
    head, _, rest = name.partition(".")
    return head.startswith(_ROOT) and head[len(_ROOT) :].isdigit() and bool(rest)


class Keeper:
    """Duplicates of descriptors, by name."""

    def __init__(self, found: Mapping[str, int] | None = None, tell: Tell | None = None) -> None:
        """Hold what an earlier owner has left.

        Args:
            found: Names and descriptors, which the keeper closes.
            tell: Who else is to hold what is kept from now on.
        """
        self._fds = dict(found or {})
        self._tell = tell
        self._lock = threading.Lock()

    def keep(self, name: str, fd: int) -> None:
        """Hold a duplicate of a descriptor."""
        with self._lock:
            assert name not in self._fds, f"kept twice: {name}"
            self._fds[name] = os.dup(fd)
            if self._tell is not None:
                self._tell(name, fd)

    def drop(self, name: str) -> None:
        """Let a descriptor go; nothing if it is not held."""
        with self._lock:
            fd = self._fds.pop(name, -1)
            if fd >= 0:
                os.close(fd)
                if self._tell is not None:
                    self._tell(name, -1)

    def drop_all(self, prefix: str) -> None:
        """Let go of everything whose name begins so."""
        for name in self.names(prefix):
            self.drop(name)

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin so, in order."""
        with self._lock:
            return sorted(name for name in self._fds if name.startswith(prefix))

    def take(self, name: str) -> int:
        """Return another duplicate, for the caller to close.

        Raises:
            KeyError: There is none of this name.
        """
        with self._lock:
            return os.dup(self._fds[name])

    def close(self) -> None:
        """Close all duplicates, and tell nobody; idempotent."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds = {}
            self._tell = None
