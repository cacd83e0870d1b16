"""The few file operations that a directory device is built on, as an interface.

Layer: L1.

This is the seam at which tests record, reorder, drop and tear writes: everything that a directory
device does to its medium goes through here. Paths are relative to the root; "." is the root.
"""

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.abilities import NOTHING as NO_ABILITIES
from kvfs.devices.abilities import Abilities
from kvfs.devices.base import SHORT_READ, AddressArray, DigestArray, StatusArray
from kvfs.devices.reflink import NOTHING, Cloning, Extent
from kvfs.errors import UsageError
from kvfs.units import MIB

SUPERBLOCK: Final = "kvfs.superblock"
SUPERBLOCK_NEW: Final = "kvfs.superblock.new"
LOCK: Final = "kvfs.lock"
SEGMENTS: Final = "segments"
STAGING: Final = "staging"
RAW: Final = "raw"
READ_BYTES_MAX: Final = 64 * MIB
SEGMENT_FILE: Final = re.compile(r"([0-9a-f]{8})-([0-9a-f]{8})\.(seg|file|sum)\Z")
RAW_FILE: Final = re.compile(r"[0-9a-f]{16}\Z")
STAGING_FILE: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,126}\Z")


def is_own_name(path: str) -> bool:
    """Say whether kvfs makes files of this name; all others below the root are left alone."""
    folder, _, name = path.rpartition("/")
    patterns = {SEGMENTS: SEGMENT_FILE, STAGING: STAGING_FILE, RAW: RAW_FILE}
    if folder in patterns:
        return patterns[folder].match(name) is not None
    return path in (SUPERBLOCK, SUPERBLOCK_NEW, LOCK)


def check_staging_name(name: str) -> None:
    """Refuse names that could leave the staging directory.

    Raises:
        UsageError: The name is not made of letters, digits, '.', '-', '_'.
    """
    if not STAGING_FILE.match(name):
        raise UsageError(
            f"staging name not usable: {name!r}: expected up to 127 letters, digits, '.', '-' or "
            "'_', not starting with '.'"
        )


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
    ) -> int:  # fmt: skip
        """Write and hash n memory ranges, zero-filled to 4 KiB; see `_native.pwrite_hash`."""

    @abstractmethod
    def resize(self, nbytes: int) -> None:
        """Set the size; new bytes are zero."""

    @abstractmethod
    def clear(self) -> None:
        """Give the space of the whole file back: it reads as zeros, and keeps its size."""

    @abstractmethod
    def sync(self) -> None:
        """fdatasync: contents and size survive; the name may not."""

    @abstractmethod
    def has_writers(self) -> bool | None:
        """Say whether anybody has the file open or mapped for writing; None: cannot be told.

        REQUIRES: opened for reading alone.
        """

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
        """Return names and sizes of the regular files in a directory, by name."""

    @abstractmethod
    def create(self, path: str, nbytes: int = 0) -> File:
        """Make a new file, open for writing, with its space reserved; a failure leaves no file.

        Raises:
            FileExistsError: The name is in use.
        """

    @abstractmethod
    def open(self, path: str, *, writable: bool = False) -> File:
        """Open an existing file."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Return a whole small file, at most `READ_BYTES_MAX`, or None if there is none."""

    @abstractmethod
    def read_uncached(self, path: str, offset: int, nbytes: int) -> bytes:
        """Read from the medium, past the page cache where it can; fewer bytes at the end."""

    def read_payloads(
        self, files: Sequence[tuple[str, File]], which: npt.NDArray[np.intp],
        offsets: AddressArray, lengths: AddressArray, targets: AddressArray,
        digests: DigestArray | None, statuses: StatusArray, *, uncached: bool,
    ) -> int:  # fmt: skip
        """Read n ranges of open files, given with their paths; see `Device.read_payloads`."""
        if not uncached:
            fds = np.array([file.fd for _, file in files], np.int32)[which]
            return _native.pread_verify(fds, offsets, lengths, targets, digests, statuses)
        for i, number in enumerate(which.tolist()):
            nbytes = int(lengths[i])
            try:
                raw = self.read_uncached(files[number][0], int(offsets[i]), nbytes)
            except OSError as error:
                statuses[i] = -(error.errno or errno.EIO)
                continue
            source = np.frombuffer(raw or b"\0", np.uint8)
            address = np.array([source.ctypes.data], np.uint64)
            one = slice(i, i + 1)
            _native.copy_verify(
                targets[one], address, np.array([len(raw)], np.uint64),
                None if digests is None else digests[one], statuses[one],
            )  # fmt: skip
            if len(raw) < nbytes:
                statuses[i] = SHORT_READ
        return int(np.count_nonzero(statuses))

    @abstractmethod
    def rename(self, source: str, target: str) -> None:
        """Rename over whatever is there."""

    @abstractmethod
    def unlink(self, path: str) -> None:
        """Remove a name; FileNotFoundError if there is none. Open files and maps live on."""

    @abstractmethod
    def sync_directory(self, path: str) -> None:
        """Make the names in a directory survive."""

    @abstractmethod
    def remove_tree(self) -> None:
        """Delete all that kvfs made below the root (see `is_own_name`); the root itself stays."""

    @abstractmethod
    def location(self) -> int:
        """Return a number that a copy of the directory would not have; 0 if unknown."""

    def abilities(self) -> Abilities:
        """Find out what else the filesystem can do."""
        return NO_ABILITIES

    def way(self) -> tuple[str, str]:
        """Return how payloads pass the page cache, and what moves them past it."""
        return "page", "threads"

    def cloning(self) -> Cloning:
        """Find out what files here can share."""
        return NOTHING

    def assemble(self, extents: Sequence[Extent], nbytes: int) -> int:
        """Make an unnamed file of extents of other files; see `reflink.assemble`."""
        del extents, nbytes
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    @abstractmethod
    def close(self) -> None:
        """Release locks and descriptors; idempotent."""


def pread_all(fd: int, offset: int, nbytes: int) -> bytes:
    """Read `nbytes`, resuming short reads; fewer at the end of the file."""
    first = os.pread(fd, nbytes, offset)
    if len(first) == nbytes or not first:
        return first
    parts = [first]
    done = len(first)
    while done < nbytes:
        part = os.pread(fd, nbytes - done, offset + done)
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)
