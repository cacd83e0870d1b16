"""Files that share the extents of others: FICLONERANGE, on filesystems that can (XFS, btrfs).

Layer: L1.

- A file is assembled without a name (O_TMPFILE): nothing is left of it when its last descriptor is
  closed, nor when the process or the machine ends first.
- What is cloned must not be written again. On XFS a file of which a part is shared can be written
  elsewhere as before. On btrfs that takes the promise from space reserved by fallocate: a write
  into a reserved extent of which any part is shared goes to fresh space, which there may be none
  of. So elsewhere than on XFS only files that are never written again are cloned.
"""

import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvfs.devices.descriptors import read_only

XFS: Final = 0x58465342  # f_type of statfs(2)
_FICLONERANGE: Final = 0x4020940D
_RANGE: Final = struct.Struct("<qQQQ")
_MODE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that go to `target` of another."""

    fd: int
    offset: int
    nbytes: int
    target: int


@dataclass(frozen=True, slots=True)
class Cloning:
    """What a filesystem can share.

    Attributes:
        granularity: Offsets and lengths are multiples of it; 0: nothing can be shared.
        of_written: Parts of files that are written elsewhere meanwhile, too.
    """

    granularity: int = 0
    of_written: bool = False


NOTHING: Final = Cloning()


def probe(directory_fd: int, f_type: int) -> Cloning:
    """Find out what a directory's filesystem can share: by a hole, which takes no space."""
    granularity = os.fstatvfs(directory_fd).f_bsize
    try:
        source = _unnamed(directory_fd)
        try:
            target = _unnamed(directory_fd)
            try:
                os.ftruncate(source, granularity)
                clone(target, Extent(source, 0, granularity, 0))
            finally:
                os.close(target)
        finally:
            os.close(source)
    except OSError:  # whatever it is: nothing that is needed
        return NOTHING
    return Cloning(granularity, of_written=f_type == XFS)


def clone(fd: int, extent: Extent) -> None:
    """Let a file share an extent of another on the same filesystem.

    Pages of the source that are not written yet are written first.

    Raises:
        OSError: EOPNOTSUPP, EXDEV, EINVAL: not possible. ENOSPC: no space for the metadata.
    """
    raw = _RANGE.pack(extent.fd, extent.offset, extent.nbytes, extent.target)
    fcntl.ioctl(fd, _FICLONERANGE, raw)


def assemble(directory_fd: int, extents: Sequence[Extent], nbytes: int) -> int:
    """Make an unnamed file of extents; return a descriptor that only reads.

    What no extent covers reads as zeros; what goes beyond `nbytes` is cut off.
    """
    fd = _unnamed(directory_fd)
    try:
        for extent in extents:
            clone(fd, extent)
        os.ftruncate(fd, nbytes)
        return read_only(fd)
    finally:
        os.close(fd)


def _unnamed(directory_fd: int) -> int:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    return os.open(".", flags, _MODE, dir_fd=directory_fd)
