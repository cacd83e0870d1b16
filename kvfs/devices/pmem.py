"""Files on persistent memory, below a filesystem mounted with -o dax.

Layer: L1.

- Log segments are mapped with MAP_SYNC, so that what was stored and written back from the caches is
  persistent: payloads go past the caches, summaries are stored and their lines written back, each
  with a fence on the storing thread. `sync` of a segment has nothing left to do.
- When a segment is made, its blocks are allocated, touched once and persisted, so that no later
  store waits for the filesystem.
- All else is small or foreign (superblock, sidecars, staging, raw files): written by the
  filesystem, which goes past the page cache here, and persisted by fdatasync.
- Reads are the filesystem's, too: bad memory is EIO there, not a signal.
"""

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from kvfs import _native
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.devices.dax_source import domain_of
from kvfs.devices.osfile import OSFile
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.transfers import IOOptions
from kvfs.units import MIB, PAGE

_FAULT: Final = 3  # a status of native batches
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BYTES: Final = 256
_STATX_ATTR_DAX: Final = 0x00200000
_ATTRIBUTES: Final = struct.Struct("<IIQ")  # stx_mask, stx_blksize, stx_attributes
_SYSFS: Final = Path("/sys")
_PLAIN: Final = IOOptions()
Mapper = Callable[[int, int], _native.Arena]


def map_synchronously(fd: int, nbytes: int) -> _native.Arena:
    """Map a file so that stores need no fdatasync; OSError (EOPNOTSUPP) where that cannot be."""
    return _native.Arena(fd, nbytes, sync=True)


def why_not_dax(root: str, mapper: Mapper = map_synchronously) -> str:
    """Say why files below a directory cannot be used as memory; "" if they can.

    Tried with a file without a name: what the mount's options say need not hold for it.
    """
    try:
        fd = os.open(root, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return f"no file can be made to try it: {error.strerror}"
    try:
        os.posix_fallocate(fd, 0, 2 * MIB)
        if mapper is map_synchronously and not _has_attribute(fd):
            return "its filesystem is not mounted with -o dax"
        mapper(fd, 2 * MIB).close()
    except OSError as error:
        return f"MAP_SYNC is refused: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def persistence_of(root: str, sysfs: Path = _SYSFS) -> str:
    """Return what holds stored bytes when the power fails; see DeviceInfo.

    Where the region does not say, written back lines count: MAP_SYNC is granted for no less.
    """
    number = os.stat(root).st_dev
    device = (sysfs / "dev/block" / f"{os.major(number)}:{os.minor(number)}").resolve()
    return domain_of(device) or "memory_controller"


class PmemFile(OSFile):
    """A log segment, mapped."""

    def __init__(self, fd: int, arena: _native.Arena) -> None:
        super().__init__(fd)
        self._arena = arena

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Store a small thing and write its lines back. Durability: persist.

        Raises:
            OSError: EIO: a page cannot be touched.
        """
        view = memoryview(data).cast("B")
        assert offset + len(view) <= self._arena.nbytes, "a segment has a fixed size"
        if _native.store(self._arena.address + offset, view) != 0:
            raise OSError(5, "memory fault", f"offset {offset:#x}")

    def write_hashed(
        self, offsets: AddressArray, sources: AddressArray, lengths: AddressArray,
        digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Copy past the caches and hash in one pass. Durability: persist."""
        targets = offsets + np.uint64(self._arena.address)
        return _native.copy_hash(targets, sources, lengths, digests, statuses, PAGE)

    def resize(self, nbytes: int) -> None:
        """Refuse: the map would have no file below it."""
        raise AssertionError("a segment has a fixed size")

    def sync(self) -> None:
        """Do nothing: every write has persisted what it wrote."""

    def close(self) -> None:
        """Unmap and close once."""
        with contextlib.suppress(ValueError):
            self._arena.close()
        super().close()


class PmemFileSystem(OSFileSystem):
    """Files below a directory on persistent memory."""

    def __init__(
        self, root: str, *, create: bool = True, options: IOOptions = _PLAIN,
        mapper: Mapper = map_synchronously,
    ) -> None:  # fmt: skip
        """Open and lock a directory, as OSFileSystem does.

        Args:
            root: Absolute path.
            create: Make the directory if it is missing.
            options: How payloads are read; how those of files and segments found are written.
            mapper: Maps a segment; tests without persistent memory give another.
        """
        super().__init__(root, create=create, options=options)
        self._mapper = mapper

    def create(self, path: str, nbytes: int = 0) -> OSFile:
        """Make a new file with its space reserved, a segment mapped and its blocks persisted."""
        file = super().create(path, nbytes)
        if not _is_segment(path):
            return file
        try:
            _native.Arena(file.fd, nbytes, populate=True).close()
            file.sync()
            return PmemFile(file.fd, self._mapper(file.fd, nbytes))
        except BaseException:
            file.close()
            self.unlink(path)
            raise

    def open(self, path: str, *, writable: bool = False) -> OSFile:
        """Open an existing file; a segment that may be written is mapped."""
        file = super().open(path, writable=writable)
        nbytes = os.fstat(file.fd).st_size
        if not (writable and _is_segment(path) and nbytes):  # empty: a crash ended its making
            return file
        try:
            return PmemFile(file.fd, self._mapper(file.fd, nbytes))
        except BaseException:
            file.close()
            raise


def _is_segment(path: str) -> bool:
    return path.endswith(".seg")


def _has_attribute(fd: int) -> bool:
    """Say whether statx finds STATX_ATTR_DAX on a regular file."""
    assert stat.S_ISREG(os.fstat(fd).st_mode)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, 0, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    attributes: int = _ATTRIBUTES.unpack_from(buffer)[2]
    return bool(attributes & _STATX_ATTR_DAX)
