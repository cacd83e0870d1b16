"""An open file of the operating system.

Layer: L1.

Concurrency: `_lock` guards the descriptor that is opened when it is needed.
"""

import ctypes
import errno
import fcntl
import os
import signal
import threading
from typing import Final

from kvfs import _native
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.devices.filesystem import File
from kvfs.devices.transfers import Transfers
from kvfs.units import PAGE

_PUNCH_HOLE: Final = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_NO_LEASES: Final = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.ENOLCK)


class OSFile(File):
    """A file of the operating system."""

    def __init__(self, fd: int, transfers: Transfers | None = None) -> None:
        self.fd = fd
        self._transfers = transfers
        self._direct_fd = -1
        self._lock = threading.Lock()

    def direct_fd(self) -> int:
        """Return a second descriptor of the file, past the page cache; opened when first asked."""
        with self._lock:
            if self._direct_fd < 0:
                mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
                path = f"/proc/self/fd/{self.fd}"  # it may have another name by now, or none
                self._direct_fd = os.open(path, mode | os.O_DIRECT | os.O_CLOEXEC)
            return self._direct_fd

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`, resuming short writes."""
        view = memoryview(data).cast("B")
        while len(view):
            done = os.pwrite(self.fd, view, offset)
            offset += done
            view = view[done:]

    def write_hashed(
        self, offsets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Write and hash in native code, without the GIL."""
        if self._transfers is None:
            return _native.pwrite_hash(self.fd, offsets, sources, lengths, digests, statuses, PAGE)
        fd = self.direct_fd() if self._transfers.is_direct else self.fd
        return self._transfers.write(fd, offsets, sources, lengths, digests, statuses)

    def resize(self, nbytes: int) -> None:
        """Call ftruncate."""
        os.ftruncate(self.fd, nbytes)

    def clear(self) -> None:
        """Call fallocate; not ftruncate, as maps of what is cut off end in SIGBUS."""
        nbytes = max(1, os.fstat(self.fd).st_size)
        library = ctypes.CDLL(None, use_errno=True)
        if library.fallocate(self.fd, _PUNCH_HOLE, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"fallocate: {os.strerror(code)}")

    def sync(self) -> None:
        """Call fdatasync."""
        os.fdatasync(self.fd)

    def has_writers(self) -> bool | None:
        """Ask for a read lease, and give it back: it is granted only if there is no writer.

        None where there are no leases (EINVAL: many network filesystems, or leases switched off),
        or only the owner of a file may ask (EACCES). Whoever opens the file for writing while we
        have the lease waits, and would make the kernel send SIGIO, which ends a process that does
        not expect it: so it is told to send SIGURG, which nobody minds.
        """
        fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return True
            if error.errno in _NO_LEASES:
                return None
            raise
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False

    def close(self) -> None:
        """Close once."""
        with self._lock:
            for fd in (self.fd, self._direct_fd):
                if fd >= 0:
                    os.close(fd)
            self.fd = self._direct_fd = -1
