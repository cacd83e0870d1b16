"""Mapped memory and the verbs by which a DAX device touches it.

Layer: L1.

- Every verb fences on the thread that stored: no fence of another thread orders this one's
  stores. So on DAX all that was stored is persistent when the verb returns, but for what the
  kernel or the platform still holds back: `persist`.
- What a failed sync may have dropped, the kernel takes for written; whoever stored it learns
  nothing if another thread's sync failed. So a sync that failed is made good by the next one: all
  pages stored to since the last good one are made dirty again. What `persist` returns for is there.
- A touch of a poisoned or missing page is caught: OSError with EIO, or a status.

Concurrency: callers do not write the same bytes at the same time. `_sync_lock` admits one sync: a
failure is reported to one of those that wait for it.
"""

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np

from kvfs import _native
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.devices.dax_layout import Range
from kvfs.units import MIB, PAGE, align_up

_FAULT: Final = 3  # a status of native batches
_ZEROS: Final = np.zeros(MIB, np.uint8)


class DaxMemory:
    """All of a device, mapped. Offsets and lengths in bytes."""

    def __init__(self, fd: int, nbytes: int, sync: Callable[[int], None] | None) -> None:
        """Map it; the descriptor stays the caller's.

        Args:
            fd: A DAX character device, or a file.
            nbytes: How much of it.
            sync: What persists stored bytes, where the fence does not.
        """
        self._fd = fd
        self._sync = sync
        self._sync_lock = threading.Lock()
        self._unsynced: deque[Range] = deque()
        self._has_failed = False
        self._arena = _native.Arena(fd, nbytes)
        self.address = self._arena.address
        self.nbytes = nbytes

    def store(self, offset: int, data: bytes) -> None:
        """Store a small thing and write its lines back.

        Raises:
            OSError: EIO: a page cannot be touched; what it holds is undefined.
        """
        self._check(offset, len(data))
        if _native.store(self.address + offset, data) != 0:
            raise OSError(errno.EIO, "memory fault", f"offset {offset:#x}")
        self._note_stored(offset, len(data))

    def zero(self, offset: int, nbytes: int) -> None:
        """Fill with zeros past the caches.

        Raises:
            OSError: EIO, as for `store`.
        """
        self._check(offset, nbytes)
        starts = np.arange(0, nbytes, len(_ZEROS), dtype=np.uint64)
        lengths = np.minimum(np.uint64(nbytes) - starts, np.uint64(len(_ZEROS)))
        sources = np.full(len(starts), _ZEROS.ctypes.data, np.uint64)
        digests = np.zeros((len(starts), 16), np.uint8)
        targets = starts + np.uint64(self.address + offset)
        if self.copy_payloads(targets, sources, lengths, digests, np.zeros(len(starts), np.int32)):
            raise OSError(errno.EIO, "memory fault", f"offset {offset:#x}")

    def copy_payloads(
        self, targets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Copy to addresses past the caches and hash in one pass; see `_native.copy_hash`."""
        failed = _native.copy_hash(targets, sources, lengths, digests, statuses, PAGE)
        if self._sync is not None and len(targets):
            start, end = int(targets.min()), int((targets + lengths).max())
            self._note_stored(start - self.address, align_up(end - start, PAGE))
        return failed

    def persist(self) -> None:
        """Make all that was stored survive a power cut.

        Raises:
            OSError: The sync failed; nothing is known of what was stored since the last good one.
        """
        if self._sync is None:
            return
        with self._sync_lock:
            count = len(self._unsynced)
            for i in range(count) if self._has_failed else ():
                self.touch(*self._unsynced[i])
            self._has_failed = True
            self._sync(self._fd)
            self._has_failed = False
            for _ in range(count):
                self._unsynced.popleft()

    def touch(self, offset: int, nbytes: int) -> None:
        """Make pages dirty again that a failed sync left clean; a bad one stays what it is."""
        for page in range(offset // PAGE * PAGE, offset + nbytes, PAGE):
            _native.touch(self.address + page, PAGE)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read.

        Raises:
            OSError: EIO: a page cannot be touched.
        """
        self._check(offset, nbytes)
        copy = np.empty(nbytes, np.uint8)
        if self._copy(copy, offset) != 0:
            raise OSError(errno.EIO, "memory fault", f"offset {offset:#x}")
        return copy.tobytes()

    def faults(self, offset: int, nbytes: int) -> list[Range]:
        """Return the pages of a range that cannot be touched."""
        page = np.empty(PAGE, np.uint8)
        first = offset // PAGE * PAGE
        return [(at, PAGE) for at in range(first, offset + nbytes, PAGE) if self._copy(page, at)]

    def close(self) -> None:
        """Unmap; idempotent."""
        with contextlib.suppress(ValueError):
            self._arena.close()

    def _copy(self, target: "np.ndarray[tuple[int], np.dtype[np.uint8]]", offset: int) -> int:
        one = np.array([target.ctypes.data, self.address + offset, len(target)], np.uint64)
        status = np.zeros(1, np.int32)
        _native.copy_verify(one[:1], one[1:2], one[2:], None, status)
        return int(status[0])

    def _note_stored(self, offset: int, nbytes: int) -> None:
        if self._sync is not None:
            self._unsynced.append((offset, nbytes))  # after the store: no sync may lie in between

    def _check(self, offset: int, nbytes: int) -> None:
        assert 0 <= offset <= offset + nbytes <= self.nbytes, "outside the device"


def fdatasync(fd: int) -> None:
    """Persist a file's pages, those stored to through maps too."""
    os.fdatasync(fd)
