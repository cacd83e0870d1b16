"""What lies in the header of a DAX device, byte by byte.

Layer: L1, pure.

    0                                                          2 MiB
    | superblock copies 0 1 2 3, 384 KiB each | labels | bad |  place 0 | place 1 | ...
                                       1.5 MiB     2 MiB - 64 KiB

- A *place* is `segment_bytes` of the device, at 2 MiB + number * segment_bytes; a segment lives in
  one from `create` to `free`. Its *label* says which segment: one cache line per place, written
  whole, so that one torn by a power cut fails its checksum and the place counts as free.
- A copy of the superblock: a page that says what follows it, then the superblock. The copies are
  written one after the other, three of four at least; two at least are needed to read. So any two
  have the newest among them, however old the others are. Where less than three were ever begun, no
  write was ever finished.
- The table of bad ranges: what could not be read or written. A place with such a range is given to
  no segment any more. There are two copies, written one after the other; what either says counts.
- All integers are little-endian; checksums are XXH3 (see kvfs.engine.format).
"""

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kvfs import _native
from kvfs.units import KIB, MIB, PAGE

HEADER_BYTES: Final = 2 * MIB
COPIES: Final = 4
COPY_BYTES: Final = 384 * KIB
WRITE_QUORUM: Final = 3
READ_QUORUM: Final = 2
LABELS_OFFSET: Final = COPIES * COPY_BYTES
BAD_OFFSET: Final = HEADER_BYTES - 64 * KIB
BAD_COPIES: Final = 2
BAD_BYTES: Final = (HEADER_BYTES - BAD_OFFSET) // BAD_COPIES
SUPERBLOCK_BYTES_MAX: Final = COPY_BYTES - PAGE
LABEL_BYTES: Final = 64
PLACES_MAX: Final = (BAD_OFFSET - LABELS_OFFSET) // LABEL_BYTES

_COPY_MAGIC: Final = b"KVFSDAX1"
_LABEL_MAGIC: Final = b"KVFSPLC1"
_BAD_MAGIC: Final = b"KVFSBAD1"
_COPY: Final = struct.Struct("<8sQQ16s")  # magic, sequence, length, XXH3-128; XXH3-64 of these
_LABEL: Final = struct.Struct("<8sII16s24x")  # magic, slot, generation, device; XXH3-64 of these
_BAD: Final = struct.Struct("<8sQ")  # magic, count; pairs of offset and length; XXH3-64 at the end
_PAIR: Final = struct.Struct("<QQ")
BAD_RANGES_MAX: Final = (BAD_BYTES - _BAD.size - 8) // _PAIR.size

Range = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of the superblock."""

    sequence: int
    raw: bytes


def encode_copy(copy: Copy) -> bytes:
    """Encode a copy: its page, then the superblock. REQUIRES: at most SUPERBLOCK_BYTES_MAX."""
    head = _COPY.pack(_COPY_MAGIC, copy.sequence, len(copy.raw), _native.xxh3_128(copy.raw))
    return _signed(head).ljust(PAGE, b"\0") + copy.raw


def copy_bytes(head: bytes) -> int:
    """Return how many bytes follow a copy's page; 0 if the page does not hold."""
    magic, _, nbytes, _ = _COPY.unpack(head[: _COPY.size])
    holds = magic == _COPY_MAGIC and head[: _COPY.size + 8] == _signed(head[: _COPY.size])
    return min(nbytes, SUPERBLOCK_BYTES_MAX) if holds else 0


def decode_copy(area: bytes) -> Copy | None:
    """Decode a copy from its area; None if it does not hold."""
    head = area[: _COPY.size]
    magic, sequence, nbytes, digest = _COPY.unpack(head)
    if area[: _COPY.size + 8] != _signed(head) or magic != _COPY_MAGIC:
        return None
    raw = area[PAGE : PAGE + nbytes]
    if len(raw) != nbytes or _native.xxh3_128(raw) != digest:
        return None
    return Copy(sequence, raw)


def is_copy(area: bytes) -> bool:
    """Say whether an area was meant to hold a copy, be it damaged."""
    return area[: len(_COPY_MAGIC)] == _COPY_MAGIC


def encode_label(device: UUID, place: int, slot: int, generation: int) -> bytes:
    """Encode the label of a place that holds a segment; one without is zero."""
    head = _LABEL.pack(_LABEL_MAGIC, slot, generation, device.bytes)
    return _signed(head, place)


def decode_label(device: UUID, place: int, raw: bytes) -> tuple[int, int] | None:
    """Return slot and generation; None if the place is free, or was another device's."""
    head = raw[: _LABEL.size]
    magic, slot, generation, owner = _LABEL.unpack(head)
    if raw != _signed(head, place) or magic != _LABEL_MAGIC or owner != device.bytes:
        return None
    return slot, generation


def encode_bad(ranges: list[Range]) -> bytes:
    """Encode the table of bad ranges."""
    pairs = b"".join(_PAIR.pack(*one) for one in ranges[:BAD_RANGES_MAX])
    return _signed(_BAD.pack(_BAD_MAGIC, len(pairs) // _PAIR.size) + pairs)


def decode_bad(area: bytes) -> list[Range]:
    """Decode the table; empty if it does not hold."""
    magic, count = _BAD.unpack_from(area)
    end = _BAD.size + count * _PAIR.size
    if magic != _BAD_MAGIC or count > BAD_RANGES_MAX or area[: end + 8] != _signed(area[:end]):
        return []
    return list(_PAIR.iter_unpack(area[_BAD.size : end]))


def merged(ranges: list[Range]) -> list[Range]:
    """Return the ranges in order, those that touch made one."""
    done: list[Range] = []
    for offset, nbytes in sorted(ranges):
        if done and offset <= sum(done[-1]):
            start = done[-1][0]
            done[-1] = (start, max(sum(done[-1]), offset + nbytes) - start)
        else:
            done.append((offset, nbytes))
    return done


def _signed(head: bytes, seed: int = 0) -> bytes:
    return head + _native.xxh3_64(head, seed).to_bytes(8, "little")
