"""How the payloads of a directory device move between files and memory.

Layer: L1.

- `cache="page"`: through the page cache, one call for each step. `"dontcache"`: the same, and the
  page cache keeps nothing. `"direct"`: O_DIRECT, a batch of n blocks as pieces in one queue.
- A queue is a ring of io_uring, or threads where the kernel refuses that (`way`). Each batch has
  one for itself; there are at most QUEUES, made when they are needed.
- Payloads that must come from the medium itself (`uncached`) are read directly in every case.
- With a deadline a batch during which the device does nothing for that long fails with ETIMEDOUT.
  What it left in its queue keeps the memory there; when all queues are full of that, a batch fails
  at once.
- Mapped and buffered readers of a file see what O_DIRECT wrote: the kernel drops the pages that it
  overwrites, and writes dirty ones out before it reads past them (ext4, XFS, btrfs).

Concurrency: `_lock` guards the lists; it is not held during I/O.
"""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.abilities import RWF_DONTCACHE, Abilities
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.errors import UsageError
from kvfs.units import PAGE

QUEUES: Final = 4
Descriptors = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class IOOptions:
    """Options of a directory's URL.

    Attributes:
        cache: "page", "dontcache" or "direct".
        depth: Transfers under way at a time, per batch: of up to 1 MiB, of 4 MiB if read straight.
        io: "io_uring", "threads", or "" for the first of them that works.
        deadline_ms: How long a direct transfer may take no step forward; 0: no deadline.
    """

    cache: str = "page"
    depth: int = 32
    io: str = ""
    deadline_ms: int = 0


class Transfers:
    """Queues of one directory, made as they are needed."""

    def __init__(self, options: IOOptions, abilities: Abilities, root: str) -> None:
        """Find out which way works.

        Raises:
            UsageError: The filesystem or the kernel cannot do what the options ask for.
        """
        able = {"page": True, "dontcache": abilities.dontcache, "direct": abilities.direct}
        if not able[options.cache]:
            usable = " or ".join(f"cache={name}" for name, can in able.items() if can)
            raise UsageError(
                f"cache={options.cache} cannot be used: {root}: {abilities.filesystem} with this "
                f"kernel does not offer it; expected {usable}"
            )
        self.options = options
        self.abilities = abilities
        self.is_direct = options.cache == "direct"
        self._flags = RWF_DONTCACHE if options.cache == "dontcache" else 0
        self._timeout_ms = options.deadline_ms or -1
        self._lock = threading.Lock()
        self._free: list[_native.IOQueue] = []
        self._stalled: list[_native.IOQueue] = []
        self._count = 0
        self._changed = threading.Condition(self._lock)
        self._is_closed = False
        self.way = self._try_queue(root)

    def _try_queue(self, root: str) -> str:
        try:
            queue = _native.IOQueue(1, self.options.io or None)
        except OSError as error:
            raise UsageError(
                f"io={self.options.io} cannot be used: {root}: {error.strerror}; leave the option "
                "out, or see the sysctl kernel.io_uring_disabled"
            ) from error
        try:
            return queue.kind
        finally:
            queue.close()

    def write(
        self, fd: int, offsets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Write and hash n payloads, padded to 4 KiB; `fd` is direct if transfers are."""
        if not self.is_direct:
            return _native.pwrite_hash(
                fd, offsets, sources, lengths, digests, statuses, PAGE, self._flags
            )
        with self._queue() as queue:
            return queue.write_hash(
                fd, offsets, sources, lengths, digests, statuses, PAGE,
                timeout_ms=self._timeout_ms,
            )  # fmt: skip

    def read(
        self, fds: Descriptors, offsets: AddressArray, lengths: AddressArray,
        targets: AddressArray, digests: DigestArray | None, statuses: StatusArray,
        *, is_direct: bool,
    ) -> int:  # fmt: skip
        """Read and verify n ranges; `is_direct`: the descriptors are."""
        if not is_direct:
            return _native.pread_verify(
                fds, offsets, lengths, targets, digests, statuses, self._flags
            )
        with self._queue() as queue:
            return queue.read_verify(
                fds, offsets, lengths, targets, digests, statuses,
                self.abilities.offset_align, self.abilities.address_align,
                timeout_ms=self._timeout_ms,
            )  # fmt: skip

    def close(self) -> None:
        """Close the queues; idempotent. One that a batch still has goes when that ends."""
        with self._lock:
            self._is_closed = True
            for queue in (*self._free, *self._stalled):
                queue.close()
            self._free.clear()
            self._stalled.clear()

    @contextmanager
    def _queue(self) -> Iterator[_native.IOQueue]:
        queue = self._take()
        try:
            yield queue
        finally:
            self._give(queue)

    def _take(self) -> _native.IOQueue:
        """Take a queue that is idle; wait for one, but not for those that are stalled.

        Raises:
            OSError: ETIMEDOUT: all are full of what the device has not done by its deadline.
        """
        with self._changed:
            while True:
                self._revive()
                if self._free:
                    return self._free.pop()
                if self._count < QUEUES:
                    queue = _native.IOQueue(self.options.depth, self.way)
                    self._count += 1
                    return queue
                if len(self._stalled) == QUEUES:
                    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                self._changed.wait()

    def _give(self, queue: _native.IOQueue) -> None:
        with self._changed:
            if self._is_closed:
                queue.close()
            else:
                (self._stalled if queue.stalled() else self._free).append(queue)
            self._changed.notify()

    def _revive(self) -> None:
        """Take back queues whose transfers have ended after all."""
        for queue in [queue for queue in self._stalled if not queue.stalled()]:
            self._stalled.remove(queue)
            self._free.append(queue)
