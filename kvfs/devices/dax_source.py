"""Opening what a DAX device lies on, and what the kernel says of it.

Layer: L1.

- A DAX character device (/dev/daxX.Y) tells its size, its alignment, what holds its bytes when the
  power fails, and where its memory is known to be bad in sysfs. A regular file or memfd stands in
  for one: a CXL memory exported as a file, or a test. There a page lasts once it was written back.
- One owner at a time on this host: an exclusive flock from open to close.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from kvfs.devices.dax_layout import Range
from kvfs.devices.dax_memory import DaxMemory, fdatasync
from kvfs.errors import BusyError, NotFoundError, UsageError
from kvfs.units import MIB, PAGE, format_bytes

ALIGNMENT: Final = 2 * MIB
PERSISTENCE_OF_FILES: Final = "page"
_log = logging.getLogger("kvfs.devices")
_SYSFS: Final = Path("/sys")
_SECTOR: Final = 512
_DOMAINS: Final = ("cpu_cache", "memory_controller")
_HINT: Final = "'daxctl list' shows the DAX devices there are"


@dataclass(frozen=True, slots=True)
class DaxSource:
    """What was opened, until `close`, or as a context manager.

    Attributes:
        persistence: See DeviceInfo.
        is_file: A file's bytes are persisted by fdatasync, a device's by a fence.
        bad: Ranges the kernel knows to be bad.
        deep_flush: Where to write "1" to flush the platform's own buffers; None if nowhere.
        location: See Device.location.
        granularity: Of maps; see Backing.
    """

    fd: int
    nbytes: int
    persistence: str
    is_file: bool
    bad: tuple[Range, ...] = ()
    deep_flush: Path | None = None
    location: int = 0
    granularity: int = PAGE

    def map(self, nbytes: int = 0) -> DaxMemory:
        """Map so many bytes of it, all when missing. The map is the caller's to close."""
        return DaxMemory(self.fd, nbytes or self.nbytes, fdatasync if self.is_file else None)

    def close(self) -> None:
        """Close the descriptor, and let the lock go. To be called once."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def is_persistent(self) -> bool:
        """Whether what was persisted survives a power cut."""
        return self.persistence != "none"


def open_source(location: str, *, persistence: str = "", sysfs: Path = _SYSFS) -> DaxSource:
    """Open a DAX device, or a file in its place, and take its lock.

    Args:
        location: Absolute path.
        persistence: Overrides what the kernel says.
        sysfs: Where sysfs is mounted.

    Raises:
        NotFoundError: There is nothing.
        UsageError: It is no DAX device and no file, or its size is not a multiple of 2 MiB.
        BusyError: Another process has it, or the kernel uses it as memory.
    """
    try:
        fd = os.open(location, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"no DAX device: {location}; {_HINT}") from error
    except IsADirectoryError as error:
        raise UsageError(f"not a DAX device but a directory: {location}; use dir:") from error
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.ENXIO):
            raise BusyError(
                f"DAX device is in use by the kernel: {location}; give it back with "
                f"'daxctl reconfigure-device --mode=devdax {Path(location).name}'"
            ) from error
        raise
    try:
        source = _describe(fd, location, sysfs)
        if source.nbytes % ALIGNMENT:
            raise UsageError(
                f"not 2 MiB aligned: {location}: expected a size of a multiple of 2 MiB, found "
                f"{source.nbytes} bytes; make it {source.nbytes // ALIGNMENT * ALIGNMENT}"
            )
        _lock(fd, location)
        if source.is_file:
            _reserve(fd, source.nbytes)
    except BaseException:
        os.close(fd)
        raise
    if not persistence:
        return source
    return replace(source, persistence=persistence)


def size_of(location: str, *, sysfs: Path = _SYSFS) -> int:
    """Return the size of a DAX device or file in bytes.

    Raises:
        NotFoundError: There is nothing.
        UsageError: It is no DAX device and no file.
    """
    try:
        status = os.stat(location)
    except FileNotFoundError as error:
        raise NotFoundError(f"no DAX device: {location}; {_HINT}") from error
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    return _number(_device_of(status, location, sysfs) / "size")


def _describe(fd: int, location: str, sysfs: Path) -> DaxSource:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        inode = (status.st_ino << 1 | 1) & (1 << 64) - 1
        return DaxSource(fd, status.st_size, PERSISTENCE_OF_FILES, True, location=inode)
    device = _device_of(status, location, sysfs)
    region = _region_of(device)
    domain = _text(region / "persistence_domain") if region is not None else ""
    return DaxSource(
        fd, _number(device / "size"), domain if domain in _DOMAINS else "none", False,
        bad=_badblocks(device, region),
        deep_flush=_deep_flush(region),
        granularity=max(PAGE, _number(device / "align")),
    )  # fmt: skip


def _device_of(status: os.stat_result, location: str, sysfs: Path) -> Path:
    """Return the directory of a DAX character device in sysfs."""
    if stat.S_ISBLK(status.st_mode):
        raise UsageError(
            f"not a DAX device but a block device: {location}; put a filesystem on it and use dir:,"
            f" or make it one: 'ndctl create-namespace -f -e {Path(location).name} -m devdax'"
        )
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    link = sysfs / "dev/char" / number
    if not stat.S_ISCHR(status.st_mode) or not (link / "align").exists():
        raise UsageError(f"not a DAX device: {location}; {_HINT}")
    return link.resolve()


def _region_of(device: Path) -> Path | None:
    """Return the memory region that a device lies in: the first directory above that says so."""
    for parent in device.parents:
        if (parent / "persistence_domain").exists():
            return parent
    return None


def _deep_flush(region: Path | None) -> Path | None:
    """Return where to write for a deep flush; None where there is none, or only root may."""
    if region is None:
        return None
    path = region / "deep_flush"
    return path if _text(path) == "1" and os.access(path, os.W_OK) else None


def _badblocks(device: Path, region: Path | None) -> tuple[Range, ...]:
    """Return what the region knows to be bad, as ranges of the device."""
    if region is None or not _text(region / "badblocks"):
        return ()
    first, size = _number(device / "resource"), _number(device / "size")
    base = _number(region / "resource")
    if not first or not base:  # root alone may know where they lie
        _log.warning("bad blocks of %s are not known before they are met: run as root", device.name)
        return ()
    delta = first - base
    found = []
    for line in _text(region / "badblocks").splitlines():
        offset, nbytes = (int(field) * _SECTOR for field in line.split())
        start, end = max(0, offset - delta), min(size, offset - delta + nbytes)
        if start < end:
            found.append((start, end - start))
    return tuple(found)


def _lock(fd: int, location: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(
            f"device is in use: {location}: another process has its lock; "
            "close that pool, or connect to its owner"
        ) from error


def _reserve(fd: int, nbytes: int) -> None:
    """Take a file's space now: a store into a hole of a full filesystem is a memory fault."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _number(path: Path) -> int:
    return int(_text(path) or "0", 0)


def require_room(location: str, nbytes: int, needed_bytes: int) -> None:
    """Raise UsageError unless a device has room for its header and segments."""
    if nbytes < needed_bytes:
        raise UsageError(
            f"device too small: {location}: expected at least {format_bytes(needed_bytes)}, header "
            f"and segments, found {format_bytes(nbytes)}; give a smaller size or segment"
        )
