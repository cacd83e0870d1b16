"""The capacity of a device, kept as a hard bound.

Layer: L1.

Each thing on the device is counted under its own name, rounded up to 4 KiB, so that giving it back
twice gives it back once.

Concurrency: every method is atomic. Space is taken before anything is made on the medium and given
back when that fails.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

from kvfs.devices.base import Staging
from kvfs.devices.filesystem import File
from kvfs.errors import NoSpaceError
from kvfs.units import PAGE, align_up, format_bytes


class Ledger:
    """Counts the used bytes of a device and refuses to go beyond its capacity."""

    def __init__(self, device_name: str, capacity_bytes: int) -> None:
        self._device_name = device_name
        self._capacity_bytes = capacity_bytes
        self._sizes: dict[str, int] = {}
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes taken and not given back."""
        return self._used_bytes

    def add(self, key: str, nbytes: int) -> None:
        """Reserve space for a new thing.

        Raises:
            FileExistsError: The name is in use.
            NoSpaceError: It would exceed the capacity; nothing was taken.
        """
        with self._lock:
            if key in self._sizes:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), key)
            self._reserve(key, align_up(nbytes, PAGE))

    def take(self, key: str, nbytes: int) -> None:
        """Reserve `nbytes` in all for a thing that was added; never shrinks it.

        Raises:
            NoSpaceError: It would exceed the capacity; nothing was taken.
        """
        with self._lock:
            more = align_up(nbytes, PAGE) - self._sizes[key]
            if more > 0:
                self._reserve(key, more)

    def put(self, key: str, nbytes: int) -> None:
        """Set the size of one thing to what it is, even beyond the capacity."""
        with self._lock:
            self._change(key, align_up(nbytes, PAGE) - self._sizes.get(key, 0))

    def move(self, source: str, target: str) -> None:
        """Rename one thing."""
        with self._lock:
            assert target not in self._sizes
            self._sizes[target] = self._sizes.pop(source)

    def drop(self, key: str) -> None:
        """Give one thing back; nothing if it was given back before."""
        with self._lock:
            self._used_bytes -= self._sizes.pop(key, 0)
            assert self._used_bytes >= 0, "more space given back than taken"

    @contextlib.contextmanager
    def resizing(self, key: str, staging: Staging, file: File, nbytes: int) -> Iterator[None]:
        """Take space for a change of a staging file's size; a failure changes neither.

        But it cuts nothing off while somebody else may write: the bytes could be theirs.
        """
        self.take(key, nbytes)
        try:
            yield
        except BaseException:
            if not staging.reserved_bytes:
                with contextlib.suppress(OSError):
                    file.resize(staging.nbytes)
            self.put(key, max(staging.nbytes, staging.reserved_bytes))
            raise
        staging.nbytes = nbytes
        self.put(key, max(nbytes, staging.reserved_bytes))

    def _reserve(self, key: str, more: int) -> None:
        if self._used_bytes + more > self._capacity_bytes:
            raise NoSpaceError(
                f"device is full: {self._device_name}: {format_bytes(self._used_bytes)} of "
                f"{format_bytes(self._capacity_bytes)} used, {format_bytes(more)} more needed; "
                "evict, or give the device a larger size"
            )
        self._change(key, more)

    def _change(self, key: str, more: int) -> None:
        self._sizes[key] = self._sizes.get(key, 0) + more
        self._used_bytes += more
