"""What a memory device remembers of itself in memory: its superblock, and which frame is what.

Layer: L1.

    page 0          magic, version, slot count, segment bytes
    from page 1     u64 per frame: what lies in it (`place_of`), 0 for nothing
    then            u64 per frame: how many bytes from its end on are of its summary
    then            two superblocks, written in turn: u64 number, u64 length, XXH3-128, bytes

- A memfd that only owners have. It is always up to date, so that an owner may end anywhere: a
  place is one store of eight bytes, after what it vouches for; of two superblocks the newest that
  is whole counts.

Concurrency: the device's.
"""

import mmap
import os
import struct
from typing import Final, Self

import numpy as np

from kvfs import _native
from kvfs.devices.filesystem import pread_all
from kvfs.errors import CorruptionError, FormatVersionError
from kvfs.units import MIB, PAGE, align_up

_MAGIC: Final = b"KVFSMEM1"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQ")
_SUPERBLOCK_HEAD: Final = struct.Struct("<QQ16s")
_SUPERBLOCK_ROOM: Final = 65 * MIB  # of which pages come into being as they are written
_IN_USE: Final = 1 << 63
_SLOT_SHIFT: Final = 32


def place_of(slot: int, generation: int) -> int:
    """Return how a segment is noted; never 0."""
    return _IN_USE | slot << _SLOT_SHIFT | generation


class Label:
    """The label of one device."""

    def __init__(self, fd: int, slot_count: int) -> None:
        """Take over a descriptor; see `create` and `open`."""
        self.fd = fd
        self._places_bytes = align_up(8 * slot_count, PAGE)
        self._map = mmap.mmap(fd, PAGE + 2 * self._places_bytes)
        self._places = np.frombuffer(self._map, "<u8", slot_count, PAGE)
        self._tails = np.frombuffer(self._map, "<u8", slot_count, PAGE + self._places_bytes)
        self._number, self._superblock = self._newest()

    @classmethod
    def create(cls, name: str, slot_count: int, segment_bytes: int) -> Self:
        """Make an empty one; `name` is for people."""
        fd = _native.memfd(name, _size(slot_count))
        os.pwrite(fd, _HEAD.pack(_MAGIC, _VERSION, slot_count, segment_bytes), 0)
        return cls(fd, slot_count)

    @classmethod
    def open(cls, fd: int, slot_count: int, segment_bytes: int, where: str) -> Self:
        """Open one that an earlier owner has left; the descriptor is closed if it is none.

        Raises:
            FormatVersionError: Written by another version of kvfs.
            CorruptionError: It is no label, or that of a device of another size.
        """
        try:
            magic, version, slots, nbytes = _HEAD.unpack(pread_all(fd, 0, _HEAD.size))
            if magic != _MAGIC:
                raise CorruptionError(f"wrong magic: {where}: {magic!r}")
            if version != _VERSION:
                raise FormatVersionError(
                    f"memory of version {version}: {where}: this kvfs reads version {_VERSION}"
                )
            found = (slots, nbytes, os.fstat(fd).st_size)
            if found != (slot_count, segment_bytes, _size(slot_count)):
                raise CorruptionError(f"memory of another size: {where}: {found}")
            return cls(fd, slot_count)
        except struct.error as error:
            os.close(fd)
            raise CorruptionError(f"no label: {where}: {error}") from error
        except BaseException:
            os.close(fd)
            raise

    @property
    def superblock(self) -> bytes | None:
        """The newest superblock, or None before the first."""
        return self._superblock

    def write_superblock(self, raw: bytes) -> None:
        """Replace the superblock; what is interrupted changes nothing."""
        assert len(raw) <= _SUPERBLOCK_ROOM - _SUPERBLOCK_HEAD.size
        number = self._number + 1
        record = _SUPERBLOCK_HEAD.pack(number, len(raw), _digest(number, raw)) + raw
        done, start = 0, self._start(number)
        while done < len(record):
            done += os.pwrite(self.fd, memoryview(record)[done:], start + done)
        self._number, self._superblock = number, raw

    def places(self) -> dict[int, tuple[int, int]]:
        """Return slot and generation of the frames that hold something, by number."""
        return {
            frame: ((int(self._places[frame]) & ~_IN_USE) >> _SLOT_SHIFT,
                    int(self._places[frame]) & 0xFFFF_FFFF)
            for frame in np.flatnonzero(self._places).tolist()
        }  # fmt: skip

    def set_place(self, frame: int, place: int) -> None:
        """Note what lies in a frame; 0: nothing."""
        self._places[frame] = place

    def tail_bytes(self, frame: int) -> int:
        """Return how many bytes at the end of a frame may be of its summary; what is below is not.

        A frame that had an earlier life is full of its bytes.
        """
        return int(self._tails[frame])

    def set_tail(self, frame: int, nbytes: int) -> None:
        """Note that, before bytes are written that far from the end; 0 begins anew."""
        if not nbytes or nbytes > self._tails[frame]:
            self._tails[frame] = nbytes

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._places = self._tails = np.empty(0, "<u8")
            self._map.close()

    def _start(self, number: int) -> int:
        return PAGE + 2 * self._places_bytes + number % 2 * _SUPERBLOCK_ROOM

    def _newest(self) -> tuple[int, bytes | None]:
        newest: tuple[int, bytes | None] = (0, None)
        for parity in (0, 1):
            start = self._start(parity)
            head = pread_all(self.fd, start, _SUPERBLOCK_HEAD.size)
            number, nbytes, digest = _SUPERBLOCK_HEAD.unpack(head)
            if number <= newest[0] or nbytes > _SUPERBLOCK_ROOM - _SUPERBLOCK_HEAD.size:
                continue
            raw = pread_all(self.fd, start + _SUPERBLOCK_HEAD.size, nbytes)
            if number % 2 == parity and _digest(number, raw) == digest:
                newest = number, raw
        return newest


def _size(slot_count: int) -> int:
    return PAGE + 2 * align_up(8 * slot_count, PAGE) + 2 * _SUPERBLOCK_ROOM


def _digest(number: int, raw: bytes) -> bytes:
    return _native.xxh3_128(number.to_bytes(8, "little") + raw)
