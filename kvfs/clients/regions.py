"""Memory that a client has shared with the owner: mapped read-only, trusted in nothing.

Layer: L5.

- Only memory files (memfd, tmpfs): a file of another filesystem could keep the owner waiting. They
  need not be sealed: a part that is cut off costs the client its put, as any bad address would.
- What is stored is hashed from a copy, so that nobody can change it in between (native).
"""

import contextlib
import fcntl
import os

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.errors import BusyError, RefusedError, UsageError
from kvfs.units import PAGE, align_up

REGION_BYTES_MAX = 1 << 40


class Regions:
    """What one connection has shared. One thread."""

    def __init__(self) -> None:
        self._maps: dict[int, _native.Mapping] = {}
        self._next = 1

    def share(self, fd: int, nbytes: int) -> int:
        """Map memory; return its number. The descriptor is not kept.

        Raises:
            RefusedError: It is no memory file, or cannot be read.
            UsageError: It is shorter than that.
            BusyError: There is too much of it.
        """
        if len(self._maps) >= msg.REGIONS_MAX:
            raise BusyError(f"more than {msg.REGIONS_MAX} pieces of memory shared; unshare some")
        try:
            fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
        except OSError as error:
            raise RefusedError(
                "only memory files can be shared: a memfd, or a file in /dev/shm"
            ) from error
        if not 0 < nbytes <= min(size, REGION_BYTES_MAX):
            raise UsageError(f"shared memory: {nbytes} bytes said, the file has {size}")
        mapped = _native.Mapping(align_up(nbytes, PAGE))
        try:
            mapped.map(
                np.zeros(1, np.uint64), np.array([fd], np.int32), np.zeros(1, np.uint64),
                np.array([nbytes], np.uint64),
            )  # fmt: skip
        except OSError as error:
            mapped.close()
            raise RefusedError(f"shared memory cannot be mapped: {error.strerror}") from error
        number, self._next = self._next, self._next + 1
        self._maps[number] = mapped
        return number

    def unshare(self, number: int) -> None:
        """Forget a piece; idempotent."""
        mapped = self._maps.pop(number, None)
        if mapped is not None:
            mapped.close()

    def addresses(
        self, numbers: npt.NDArray[np.uint32], offsets: Addresses, lengths: Addresses
    ) -> Addresses:
        """Return where ranges lie in this process.

        Raises:
            UsageError: One lies outside of what was shared.
        """
        found = np.zeros(len(numbers), np.uint64)
        for number in np.unique(numbers):
            mapped = self._maps.get(int(number))
            chosen = numbers == number
            if mapped is None:
                raise UsageError(f"no such shared memory: {int(number)}")
            room = np.uint64(mapped.nbytes)
            starts, sizes = offsets[chosen], lengths[chosen]
            if (starts > room).any() or (sizes > room - np.minimum(starts, room)).any():
                raise UsageError("a range lies outside of the shared memory")
            found[chosen] = starts + np.uint64(mapped.address)
        return found

    def close(self) -> None:
        """Forget everything; idempotent."""
        for number in list(self._maps):
            with contextlib.suppress(BufferError):
                self.unshare(number)
