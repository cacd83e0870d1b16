"""The few file operations that a directory device is built on, as an interface.

Layer: L1.

This is the seam at which tests record, reorder, drop and tear writes: everything that a directory device does to its medium goes
through here. Paths are relative to the root.
"""

import os
from abc import ABC, abstractmethod

from kvfs import _native
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.units import PAGE


class File(ABC):
    """One open regular file. `fd` is a real descriptor; it may be mapped and pread."""

    fd: int

    @abstractmethod
    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`."""

    @abstractmethod
    def write_hashed(
        self, offsets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:
        """Write and hash n memory ranges, zero-filled up to 4 KiB; see `_native.pwrite_hash`."""  # fmt: skip

    @abstractmethod
    def resize(self, nbytes: int) -> None:
        """Set the size; new bytes are zero."""

    @abstractmethod
    def sync(self) -> None:
        """fdatasync: contents and size survive; the name may not."""

    @abstractmethod
    def close(self) -> None:
        """Close the descriptor; idempotent."""


class FileSystem(ABC):
    """Files below one root."""

    @abstractmethod
    def make_directory(self, path: str) -> None:
        """Make a directory and its parents; existing ones are fine."""

    @abstractmethod
    def list(self, path: str) -> list[tuple[str, int]]:
        """Names and sizes of the regular files in a directory."""

    @abstractmethod
    def create(self, path: str, nbytes: int = 0) -> File:
        """Make a new file with its space reserved. FileExistsError; ENOSPC leaves no file."""

    @abstractmethod
    def open(self, path: str, *, writable: bool = False) -> File:
        """Open an existing file."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Return a whole small file, or None if there is none."""

    @abstractmethod
    def read_uncached(self, path: str, offset: int, nbytes: int) -> bytes:
        """Read from the medium, past the page cache where the filesystem can (O_DIRECT)."""

    @abstractmethod
    def rename(self, source: str, target: str) -> None:
        """Rename over whatever is there."""

    @abstractmethod
    def unlink(self, path: str) -> None:
        """Remove a name."""

    @abstractmethod
    def sync_directory(self, path: str) -> None:
        """Make the names in a directory survive."""

    @abstractmethod
    def remove_tree(self) -> None:
        """Delete all that was made below the root; the root itself stays."""

    @abstractmethod
    def location(self) -> int:
        """Return a number that a copy of the directory would not have; 0 if unknown."""

    @abstractmethod
    def close(self) -> None:
        """Release locks and descriptors."""


class OSFile(File):
    """A file of the operating system."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

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
    ) -> int:
        """Write and hash in native code, without the GIL."""
        return _native.pwrite_hash(self.fd, offsets, sources, lengths, digests, statuses, PAGE)  # fmt: skip

    def resize(self, nbytes: int) -> None:
        """ftruncate."""
        os.ftruncate(self.fd, nbytes)

    def sync(self) -> None:
        """fdatasync."""
        os.fdatasync(self.fd)

    def close(self) -> None:
        """Close once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
