"""What a directory's filesystem can do for a device, found by trying.

Layer: L1.

- O_DIRECT (`direct`): transfers between the medium and memory without the page cache; what it asks
  of addresses and offsets is told by statx(STATX_DIOALIGN, Linux 6.1).
- RWF_DONTCACHE (`dontcache`, Linux 6.14): through the page cache, which keeps nothing of it.
- `lifetimes`: it takes a hint (F_SET_RW_HINT) how long a file's bytes will live, by which an SSD
  can keep apart what dies apart (write streams, FDP).
- `dax`: files are mapped past the page cache.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Final

from kvfs.units import PAGE

RWF_DONTCACHE: Final = 0x80
LIFETIME_SHORT: Final = 2  # RWH_WRITE_LIFE_SHORT
LIFETIME_LONG: Final = 4  # RWH_WRITE_LIFE_LONG
_F_SET_RW_HINT: Final = 1036
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_ATTR_DAX: Final = 0x200000
_NAMES: Final = {
    0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs",
    0xF2F52010: "f2fs", 0xCA451A4E: "bcachefs", 0x2FC12FC1: "zfs", 0x794C7630: "overlayfs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Abilities:
    """What was found. Alignments of O_DIRECT in bytes; see above."""

    filesystem: str = ""
    direct: bool = False
    dontcache: bool = False
    lifetimes: bool = False
    dax: bool = False
    address_align: int = PAGE
    offset_align: int = PAGE


NOTHING: Final = Abilities()


def probe(directory_fd: int, f_type: int) -> Abilities:
    """Try it with a file without a name, of one page; nothing is left of it."""
    name = _NAMES.get(f_type, f"0x{f_type:x}")
    try:
        fd = _unnamed(directory_fd, 0)
    except OSError:
        return Abilities(name)
    try:
        os.pwrite(fd, bytes(PAGE), 0)
        address_align, offset_align, is_dax = _statx(fd)
        return Abilities(
            filesystem=name,
            direct=_can_direct(directory_fd),
            dontcache=_can_drop(fd),
            lifetimes=hint_lifetime(fd, LIFETIME_LONG),
            dax=is_dax,
            address_align=address_align,
            offset_align=offset_align,
        )
    except OSError:  # full, or worse: what comes next will say so
        return Abilities(name)
    finally:
        os.close(fd)


def hint_lifetime(fd: int, lifetime: int) -> bool:
    """Say how long the bytes of a file will live; return whether the filesystem takes that."""
    try:
        fcntl.fcntl(fd, _F_SET_RW_HINT, struct.pack("<Q", lifetime))
    except OSError:
        return False
    return True


def _unnamed(directory_fd: int, flags: int) -> int:
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flags, 0o600,
                   dir_fd=directory_fd)  # fmt: skip


def _can_direct(directory_fd: int) -> bool:
    with contextlib.suppress(OSError):
        fd = _unnamed(directory_fd, os.O_DIRECT)
        try:
            with mmap.mmap(-1, PAGE) as page:
                return os.pwritev(fd, [page], 0) == PAGE
        finally:
            os.close(fd)
    return False


def _can_drop(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return os.pwritev(fd, [bytes(PAGE)], 0, RWF_DONTCACHE) == PAGE
    return False


def _statx(fd: int) -> tuple[int, int, bool]:
    """Return the alignments of addresses and offsets, and whether the file is on DAX."""
    raw = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, raw) != 0:
        return PAGE, PAGE, False
    mask, attributes = struct.unpack_from("<I4xQ", raw.raw, 0)
    address_align, offset_align = struct.unpack_from("<II", raw.raw, 152)
    if not mask & _STATX_DIOALIGN or not address_align:
        address_align = offset_align = PAGE
    return address_align, offset_align, bool(attributes & _STATX_ATTR_DAX)
