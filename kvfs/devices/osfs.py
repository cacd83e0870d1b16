"""A directory of this machine as a FileSystem.

Layer: L1.

- One process at a time: an exclusive flock on `kvfs.lock` is held from open to close.
- Network and FUSE filesystems are refused: their locks, fsync and mmap do not hold what a device
  promises, and a device below kvfs's own mount would wait for itself.
- Space is reserved by posix_fallocate. Where the filesystem cannot (ZFS), glibc writes a byte into
  every block instead: slower, and on a copy-on-write filesystem no guarantee.
- Uncached reads use O_DIRECT; where that is refused, the clean page cache of the range is dropped
  first (POSIX_FADV_DONTNEED), which leaves dirty pages in place.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices import abilities, reflink
from kvfs.devices.abilities import LIFETIME_LONG, LIFETIME_SHORT, Abilities
from kvfs.devices.base import AddressArray, DigestArray, StatusArray
from kvfs.devices.filesystem import (
    LOCK,
    RAW,
    READ_BYTES_MAX,
    SEGMENTS,
    STAGING,
    SUPERBLOCK,
    SUPERBLOCK_NEW,
    File,
    FileSystem,
    is_own_name,
    pread_all,
)
from kvfs.devices.osfile import OSFile
from kvfs.devices.reflink import Cloning, Extent
from kvfs.devices.transfers import IOOptions, Transfers
from kvfs.errors import BusyError, CorruptionError, NotFoundError, RefusedError, UsageError
from kvfs.units import PAGE, align_up, format_bytes

# f_type of statfs(2), from linux/magic.h and the filesystems' own sources.
REMOTE_FILESYSTEMS: Final = {
    0x6969: "NFS", 0x517B: "SMB", 0xFF534D42: "CIFS", 0xFE534D42: "SMB2", 0x65735546: "FUSE",
    0x01021997: "9p", 0x00C36400: "Ceph", 0x5346414F: "AFS", 0x6B414653: "AFS",
    0x73757245: "Coda", 0x0BD00BD0: "Lustre", 0x01161970: "GFS2", 0x7461636F: "OCFS2",
    0x47504653: "GPFS", 0x786F4256: "VirtualBox shared folder", 0xAAD7AAEA: "PanFS",
    0x19830326: "BeeGFS",
}  # fmt: skip
MEMORY_FILESYSTEMS: Final = frozenset((0x01021994, 0x958458F6))  # tmpfs (memfds, too), hugetlbfs
_STABLE_FSID: Final = {0xEF53, 0x9123683E}  # ext4, btrfs: made from the filesystem's uuid
_FS_IOC_GETVERSION: Final = 0x80087601
_PLAIN: Final = IOOptions()
_LOCK_ATTEMPTS: Final = 8
_MODE_FILE: Final = 0o600
_MODE_DIRECTORY: Final = 0o700


def filesystem_type(fd: int) -> int:
    """Return f_type of the filesystem that holds an open file (64-bit Linux)."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fstatfs: {os.strerror(code)}")
    return int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF


def refuse_remote(f_type: int, root: str) -> None:
    """Refuse filesystems whose promises do not hold.

    Raises:
        RefusedError: Network, cluster or FUSE filesystem.
    """
    name = REMOTE_FILESYSTEMS.get(f_type)
    if name is not None:
        raise RefusedError(
            f"not a local filesystem: {root}: found {name}, whose locks, fsync and mmap do not "
            "hold what a device promises; use a directory on ext4, XFS, btrfs or tmpfs"
        )


def nearest_existing(path: str) -> str:
    """Return the path itself or its nearest ancestor that exists."""
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


class OSFileSystem(FileSystem):
    """Files below one directory, owned by this process until `close`."""

    def __init__(self, root: str, *, create: bool = True, options: IOOptions = _PLAIN) -> None:
        """Open and lock a directory.

        Args:
            root: Absolute path.
            create: Make the directory if it is missing.
            options: How payloads move.

        Raises:
            NotFoundError: The directory is missing, or is none.
            UsageError: No directory can be made there, or it cannot do what the options ask for.
            RefusedError: It lies on a network, cluster or FUSE filesystem.
            BusyError: Another process, or another device of this one, has it open.
        """
        self.root = root
        self._lock_fd = -1
        self._root_fd = -1
        self._transfers: Transfers = None  # type: ignore[assignment]  # until it is open
        if create and not os.path.isdir(root):
            _make_root(root)
        try:
            self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"device directory missing: {root}: {error.strerror}; mount its filesystem, or "
                "put the directory back where it was"
            ) from error
        try:
            f_type = filesystem_type(self._root_fd)
            refuse_remote(f_type, root)
            self._lock_fd = self._take_lock()
            self._transfers = Transfers(options, self._probe(f_type), root)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> int:
        """Lock `kvfs.lock`, and be sure that the file locked is the one that has the name."""
        for _ in range(_LOCK_ATTEMPTS):
            fd = self._open(LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                named = os.stat(LOCK, dir_fd=self._root_fd)
                if named.st_ino == os.fstat(fd).st_ino:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return fd
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(fd)
                raise BusyError(
                    f"device is in use: {self.root}/{LOCK}: held by pid {holder}; "
                    "close that pool, or connect to its owner"
                ) from error
            os.close(fd)
        raise BusyError(f"device lock keeps changing: {self.root}/{LOCK}; try again")

    def _open(self, path: str, flags: int) -> int:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, _MODE_FILE, dir_fd=self._root_fd)

    def make_directory(self, path: str) -> None:
        """Make a directory and its parents; existing ones are fine."""
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            try:
                os.mkdir("/".join(parts[:count]), _MODE_DIRECTORY, dir_fd=self._root_fd)
            except FileExistsError:
                continue

    def list(self, path: str) -> list[tuple[str, int]]:
        """Return names and sizes of the regular files in a directory, by name."""
        found = []
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # unlinked by another thread since it was listed
                    if stat.S_ISREG(status.st_mode):
                        found.append((entry.name, status.st_size))
        finally:
            os.close(fd)
        return sorted(found)

    def create(self, path: str, nbytes: int = 0) -> OSFile:
        """Make a new file with its space reserved; a failure leaves no file."""
        file = self._file(self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        is_kept = path.startswith((SEGMENTS, STAGING))  # others are soon written again
        abilities.hint_lifetime(file.fd, LIFETIME_LONG if is_kept else LIFETIME_SHORT)
        try:
            if nbytes:
                os.posix_fallocate(file.fd, 0, nbytes)
        except BaseException:
            file.close()
            self.unlink(path)
            raise
        return file

    def open(self, path: str, *, writable: bool = False) -> OSFile:
        """Open an existing file."""
        return self._file(self._open(path, os.O_RDWR if writable else os.O_RDONLY))

    def read(self, path: str) -> bytes | None:
        """Return a whole small file, or None if there is none.

        Raises:
            CorruptionError: It is larger than kvfs would ever write.
        """
        try:
            fd = self._open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            nbytes = os.fstat(fd).st_size
            if nbytes > READ_BYTES_MAX:
                raise CorruptionError(
                    f"file too large: {self.root}/{path}: expected at most "
                    f"{format_bytes(READ_BYTES_MAX)}, found {format_bytes(nbytes)}"
                )
            return pread_all(fd, 0, nbytes)
        finally:
            os.close(fd)

    def read_uncached(self, path: str, offset: int, nbytes: int) -> bytes:
        """Read from the medium, past the page cache where the filesystem can (O_DIRECT)."""
        for flags, read in ((os.O_DIRECT, _read_direct), (0, _read_dropped)):
            try:
                fd = self._open(path, os.O_RDONLY | flags)
            except OSError as error:
                if flags and _is_refusal(error):
                    continue
                raise
            try:
                return read(fd, offset, nbytes)
            except OSError as error:
                if not (flags and _is_refusal(error)):
                    raise
            finally:
                os.close(fd)
        raise AssertionError("the last way either returns or raises")

    def read_payloads(
        self, files: Sequence[tuple[str, File]], which: npt.NDArray[np.intp],
        offsets: AddressArray, lengths: AddressArray, targets: AddressArray,
        digests: DigestArray | None, statuses: StatusArray, *, uncached: bool,
    ) -> int:  # fmt: skip
        """Read n ranges of files as one batch."""
        transfers = self._transfers
        if uncached and not transfers.abilities.direct:
            return super().read_payloads(
                files, which, offsets, lengths, targets, digests, statuses, uncached=True
            )
        is_direct = transfers.is_direct or uncached
        fds = []
        for _, file in files:
            assert isinstance(file, OSFile)
            fds.append(file.direct_fd() if is_direct else file.fd)
        numbers = np.array(fds, np.int32)[which]
        return transfers.read(
            numbers, offsets, lengths, targets, digests, statuses, is_direct=is_direct
        )

    def rename(self, source: str, target: str) -> None:
        """Rename over whatever is there."""
        os.rename(source, target, src_dir_fd=self._root_fd, dst_dir_fd=self._root_fd)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path, dir_fd=self._root_fd)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory survive."""
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove_tree(self) -> None:
        """Delete kvfs's own files and, where nothing else is in them, its directories.

        The lock goes last, while it is held.
        """
        for folder in (SEGMENTS, STAGING, RAW):
            try:
                names = [f"{folder}/{name}" for name, _ in self.list(folder)]
            except FileNotFoundError:
                continue
            for path in filter(is_own_name, names):
                self.unlink(path)
            try:
                os.rmdir(folder, dir_fd=self._root_fd)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
        for path in (SUPERBLOCK, SUPERBLOCK_NEW, LOCK):
            with contextlib.suppress(FileNotFoundError):
                self.unlink(path)
        self.sync_directory(".")

    def location(self) -> int:
        """Return a number that a copy of the directory would not have; 0 if unknown.

        Made from the inode's number and generation and, where it is stable, the filesystem's id. A
        copy of the whole block device is not told from the original.
        """
        status = os.fstat(self._root_fd)
        generation = 0
        try:
            raw = fcntl.ioctl(self._root_fd, _FS_IOC_GETVERSION, bytes(8))
            generation = int.from_bytes(raw[:4], "little")
        except OSError:
            pass  # tmpfs and others have none
        is_stable = filesystem_type(self._root_fd) in _STABLE_FSID
        fsid = os.fstatvfs(self._root_fd).f_fsid if is_stable else 0
        mask = (1 << 64) - 1
        return _native.xxh3_64(struct.pack("<QQQ", status.st_ino, generation, fsid & mask)) or 1

    def abilities(self) -> Abilities:
        """Return what was found when it was opened."""
        return self._transfers.abilities

    def way(self) -> tuple[str, str]:
        """Return what was chosen when it was opened."""
        return self._transfers.options.cache, self._transfers.way

    def _probe(self, f_type: int) -> Abilities:
        """Find out what the filesystem can do."""
        return abilities.probe(self._root_fd, f_type)

    def _file(self, fd: int) -> OSFile:
        return OSFile(fd, self._transfers)

    def cloning(self) -> Cloning:
        """Try it with two unnamed files."""
        return reflink.probe(self._root_fd, filesystem_type(self._root_fd))

    def assemble(self, extents: Sequence[Extent], nbytes: int) -> int:
        """Share their extents."""
        return reflink.assemble(self._root_fd, extents, nbytes)

    def close(self) -> None:
        """Release the lock, the directory and the queues; idempotent."""
        if self._transfers is not None:
            self._transfers.close()
        for fd in (self._lock_fd, self._root_fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._root_fd = -1


def _make_root(root: str) -> None:
    """Make a device's directory, with those above it, on a filesystem that will do."""
    try:
        above = os.open(nearest_existing(root), os.O_RDONLY | os.O_CLOEXEC)
        try:
            refuse_remote(filesystem_type(above), root)
        finally:
            os.close(above)
        os.makedirs(root, mode=_MODE_DIRECTORY, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"device directory cannot be made: {root}: {error.strerror}; choose another path"
        ) from error


def _is_refusal(error: OSError) -> bool:
    return error.errno in (errno.EINVAL, errno.EOPNOTSUPP)


def _read_direct(fd: int, offset: int, nbytes: int) -> bytes:
    """Read with O_DIRECT through a page-aligned buffer."""
    start = offset // PAGE * PAGE
    length = align_up(offset + nbytes, PAGE) - start
    if nbytes == 0:
        return b""
    with mmap.mmap(-1, length) as buffer:
        done = 0
        with memoryview(buffer) as view:
            while done < length:
                with view[done:] as rest:
                    count = os.preadv(fd, [rest], start + done)
                done += count
                if count == 0 or done % PAGE:
                    break  # the end of the file
        end = min(done, offset - start + nbytes)
        return bytes(buffer[offset - start : end])


def _read_dropped(fd: int, offset: int, nbytes: int) -> bytes:
    """Drop the clean page cache of the range, then read."""
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
    return pread_all(fd, offset, nbytes)
