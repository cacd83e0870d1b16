"""The messages of the control connection to kvfs-core; docs/CORE.md says what they mean.

Layer: L5.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs.file_writer import DIGEST_BYTES

VERSION: Final = 2
PAYLOAD_BYTES_MAX: Final = 65536 - 16
ANSWER: Final = 0x8000_0000
BLOCK: Final = np.dtype([
    ("ref", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("stored", "<u8"),
    ("digest", "u1", 16), ("reserved", "<u8"),
])  # fmt: skip
assert BLOCK.itemsize == 48
BLOCK_VERIFIED: Final = 1
VERIFY_READS: Final = 1  # hash blocks not yet verified at their first read
SHORT_READS: Final = 2  # answer reads across the end too, with fewer bytes
CLOSE_BRIEFLY: Final = 1  # reads under way are not waited for
COUNTERS: Final = (
    "requests_native_read", "bytes_native_read", "requests_native_write", "bytes_native_write",
    "lookups_answered", "forwarded", "deadline_hits", "interrupts", "verify_failures", "faults",
    "respawns", "pending", "open_files", "threads", "page_cache_bytes",
)  # fmt: skip

HEADER: Final = struct.Struct("<IIQ")
ANSWER_HEADER: Final = struct.Struct("<IIq")
HELLO: Final = struct.Struct("<IIIIQ")
HANDLE: Final = struct.Struct("<QQII")
WRITTEN: Final = struct.Struct("<QQQII")
IN_ORDER: Final = 1
HAS_FAILED: Final = 2
_BLOCKS_MAX: Final = (PAYLOAD_BYTES_MAX - 8) // BLOCK.itemsize
DIGESTS_MAX: Final = (PAYLOAD_BYTES_MAX - WRITTEN.size) // DIGEST_BYTES
_DEADLINE_SHIFT: Final = 8  # of READ_BEGIN: above its flags


class Kind(IntEnum):
    """Types of messages."""

    HELLO = 1
    SEGMENT = 2
    DROP_SEGMENT = 3
    READ_BEGIN = 4
    READ_BLOCKS = 5
    READ_END = 6
    WRITE = 7
    CREDIT = 8
    BACKING = 9
    CLOSE = 10
    NAMES = 11
    STATUS = 12
    STOP = 13
    HANDLES = 14
    ALLOW = 15
    DIGESTS = 16
    HOLD = 17


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `fd` -1: no descriptor goes with it."""

    kind: Kind
    argument: int = 0
    payload: bytes = b""
    fd: int = -1


@dataclass(frozen=True, slots=True)
class Hello:
    """What the core says of itself, once it has mounted."""

    has_passthrough: bool
    max_write: int
    device_minor: int


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that the kernel has open, as the core remembers it for a new owner."""

    fh: int
    inode: int
    flags: int
    is_passthrough: bool


@dataclass(frozen=True, slots=True)
class Written:
    """What the core says of a file that it wrote.

    Attributes:
        high_water_bytes: Largest end offset; 0: nothing was written.
        start_bytes: Where the first write was to go.
        end_bytes: Up to where all writes came in order; as `start_bytes` if they did not.
        is_in_order: They did, and were hashed.
        has_failed: A write was answered with an error here.
        digests: (n, 16) uint8, of each stride from the first that begins at or after `start_bytes`.
    """

    high_water_bytes: int
    start_bytes: int
    end_bytes: int
    is_in_order: bool
    has_failed: bool
    digests: npt.NDArray[np.uint8]


def table(
    fh: int, inode: int, size_bytes: int, stride: int, blocks: npt.NDArray[np.void], flags: int,
    deadline_ms: int,
) -> list[Message]:  # fmt: skip
    """Return the messages that install a table; see `CoreClient.install_read`."""
    flags |= deadline_ms << _DEADLINE_SHIFT
    begin = struct.pack("<QQQII", inode, size_bytes, stride, len(blocks), flags)
    messages = [Message(Kind.READ_BEGIN, fh, begin)]
    for first in range(0, len(blocks), _BLOCKS_MAX):
        part = blocks[first : first + _BLOCKS_MAX]
        raw = struct.pack("<II", first, len(part)) + part.tobytes()
        messages.append(Message(Kind.READ_BLOCKS, fh, raw))
    messages.append(Message(Kind.READ_END, fh))
    return messages
