"""Memory that clients have shared with the owner: mapped read-only, trusted in nothing.

Layer: L5.

- Only memory files (memfd, tmpfs): a file of another filesystem could keep the owner waiting. They
  need not be sealed: a part that is cut off costs the client its put, as any bad address would.
- What is stored is hashed from a copy, so that nobody can change it in between (native).
- A file is mapped once for each user, however many connections share it, and what is mapped of a
  user's is bounded: sparse files are as large as anybody says.
- A hole is not read, since the kernel would fill it, at the owner's expense. So a range is put only
  if all of it is there. Who takes pages away in that very moment gets zeros stored.
"""

import contextlib
import errno
import fcntl
import os
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.errors import BusyError, RefusedError, UsageError
from kvfs.units import GIB, PAGE, align_up, format_bytes

REGION_BYTES_MAX: Final = 1 << 40
USER_FILES_MAX: Final = 1024
"""Files that the owner has mapped for one user at a time: a descriptor each."""
SHARED_BYTES_MAX: Final = (32 << 10) * GIB
"""Of all users: a quarter of the address space."""


@dataclass(slots=True, eq=False)
class _Shared:
    """A file that is mapped. `users`: how many pieces lie in it."""

    key: tuple[int, int, int]  # user, device, inode
    fd: int
    mapping: _native.Mapping
    users: int = 1

    @property
    def nbytes(self) -> int:
        return self.mapping.nbytes


class SharedFiles:
    """What all clients of a pool have shared. Thread-safe."""

    def __init__(self, user_bytes_max: int) -> None:
        """Make it empty; `user_bytes_max`: how much of one user's may be mapped."""
        self._user_bytes_max = user_bytes_max
        self._lock = threading.Lock()
        self._found: dict[tuple[int, int, int], _Shared] = {}  # the largest map of each file
        self._all: set[_Shared] = set()

    def take(self, uid: int, fd: int, nbytes: int) -> _Shared:
        """Return a map of at least the first bytes of a file; give it back with `drop`.

        Raises:
            BusyError: Too much is mapped already.
            RefusedError: It cannot be mapped.
        """
        found = os.fstat(fd)
        key = (uid, found.st_dev, found.st_ino)
        size = align_up(nbytes, PAGE)
        with self._lock:
            shared = self._found.get(key)
            if shared is not None and shared.nbytes >= size:
                shared.users += 1
                return shared
            self._check_room(uid, size)
            shared = self._found[key] = _map(key, fd, nbytes)
            self._all.add(shared)
        return shared

    def drop(self, shared: _Shared) -> None:
        """Give a map back; the last one unmaps."""
        with self._lock:
            shared.users -= 1
            if shared.users:
                return
            self._all.discard(shared)
            if self._found.get(shared.key) is shared:
                del self._found[shared.key]
        shared.mapping.close()
        os.close(shared.fd)

    def mapped_bytes(self) -> int:
        """Return how much is mapped, of all users."""
        with self._lock:
            return sum(one.nbytes for one in self._all)

    def _check_room(self, uid: int, size: int) -> None:
        mine = [one.nbytes for one in self._all if one.key[0] == uid]
        remedy = "unshare some, share a smaller part, or raise PoolOptions.client_shared_bytes"
        if sum(mine) + size > self._user_bytes_max:
            raise BusyError(
                f"user {uid} shares {format_bytes(sum(mine))} with the pool's owner and may share "
                f"{format_bytes(self._user_bytes_max)}, not {format_bytes(size)} more; {remedy}"
            )
        if len(mine) >= USER_FILES_MAX:
            raise BusyError(
                f"user {uid} shares {len(mine)} memory files with the pool's owner, the most that "
                "one may; unshare some, or end idle clients"
            )
        if sum(one.nbytes for one in self._all) + size > SHARED_BYTES_MAX:
            raise BusyError(
                f"clients share {format_bytes(SHARED_BYTES_MAX)} with the pool's owner, all that "
                "there is room for; end idle clients, or share smaller parts"
            )


def _map(key: tuple[int, int, int], fd: int, nbytes: int) -> _Shared:
    mapping = _native.Mapping(align_up(nbytes, PAGE))
    try:
        mapping.map(
            np.zeros(1, np.uint64), np.array([fd], np.int32), np.zeros(1, np.uint64),
            np.array([nbytes], np.uint64),
        )  # fmt: skip
        return _Shared(key, os.dup(fd), mapping)
    except OSError as error:
        mapping.close()
        raise RefusedError(f"shared memory cannot be mapped: {error.strerror}") from error


class Regions:
    """What one connection has shared. One thread."""

    def __init__(self, files: SharedFiles, uid: int) -> None:
        """Share nothing yet; `files` and `uid`: whose memory counts against what."""
        self._files = files
        self._uid = uid
        self._shared: dict[int, tuple[_Shared, int]] = {}  # and how much of it
        self._next = 1

    def share(self, fd: int, nbytes: int) -> int:
        """Map memory; return its number. The descriptor is the caller's.

        Raises:
            RefusedError: It is no memory file, cannot be read, or hides what of it is there.
            UsageError: It is shorter than that.
            BusyError: There is too much of it.
        """
        if len(self._shared) >= msg.REGIONS_MAX:
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
        if not os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True):
            # The kernel tells of a file's pages those alone who may write it.
            raise RefusedError(
                f"memory that user {os.geteuid()}, who owns the pool, may not write cannot be "
                "shared: 'chmod' the file, or put from other memory, which is copied"
            )
        shared = self._files.take(self._uid, fd, nbytes)
        number, self._next = self._next, self._next + 1
        self._shared[number] = shared, align_up(nbytes, PAGE)
        return number

    def unshare(self, number: int) -> None:
        """Forget a piece; idempotent."""
        found = self._shared.pop(number, None)
        if found is not None:
            self._files.drop(found[0])

    def addresses(
        self, numbers: npt.NDArray[np.uint32], offsets: Addresses, lengths: Addresses
    ) -> Addresses:
        """Return where ranges lie in this process, all of them in memory.

        Raises:
            UsageError: One lies outside of what was shared, or was never written.
        """
        found = np.zeros(len(numbers), np.uint64)
        for number in np.unique(numbers):
            shared, nbytes = self._shared.get(int(number), (None, 0))
            chosen = np.flatnonzero(numbers == number)
            if shared is None:
                raise UsageError(f"no such shared memory: {int(number)}")
            room = np.uint64(nbytes)
            starts, sizes = offsets[chosen], lengths[chosen]
            if (starts > room).any() or (sizes > room - np.minimum(starts, room)).any():
                raise UsageError("a range lies outside of the shared memory")
            found[chosen] = starts + np.uint64(shared.mapping.address)
            _check_present(shared, found[chosen], starts, sizes)
        return found

    def close(self) -> None:
        """Forget everything; idempotent."""
        for number in list(self._shared):
            with contextlib.suppress(BufferError):
                self.unshare(number)


def _check_present(
    shared: _Shared, addresses: Addresses, offsets: Addresses, lengths: Addresses
) -> None:
    """Raise UsageError if a range has a hole; what is swapped out is none."""
    statuses = np.zeros(len(addresses), np.int32)
    if not _native.absent(addresses, np.ascontiguousarray(lengths), statuses):
        return
    for position in np.flatnonzero(statuses):
        start, nbytes = int(offsets[position]), int(lengths[position])
        for page in range(start - start % PAGE, start + nbytes, PAGE):
            if not _has_data(shared.fd, page):
                raise UsageError(
                    f"shared memory cannot be read: {nbytes} bytes at offset {start} were not all "
                    "written, or are cut off; write blocks before they are put"
                )


def _has_data(fd: int, offset: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False  # nothing but a hole from here on
        raise
