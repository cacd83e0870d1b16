"""The on-media format, version 1: superblock, segment headers, summary entries.

Layer: L2, pure.

    log segment (one file, or one slot of an arena), `segment_bytes` long
    0                                                                               segment_bytes
    | payload, payload, ...  -->            free            <-- entry 2|entry 1|entry 0|seal|open|
                                                             128 B each           4 KiB  4 KiB

    file segment: the payload file holds one file's bytes and nothing else; a sidecar holds
    | ... entry 1|entry 0|seal|open|   with the same distances from its end.

    superblock: one 4 KiB header page, then the namespace table (MessagePack), zero-padded to 4 KiB.

- All integers are little-endian; an XXH3-128 is stored as its low, then its high 64 bits. Unused
  bytes are zero.
- Every checksum covers all bytes of its structure before it. Header and superblock checksums are
  XXH3-64 with seed 0; entry checksums are seeded by `entry_seed`, so that an entry of another
  device, slot or generation is never valid.
- Payloads start at multiples of 4 KiB; the bytes up to the next payload are zero.
- The open header is persisted before the first payload; the seal header is written after a
  successful persist of all it covers. An entry is valid if its checksum is; a payload is valid if
  its XXH3-128 is.

FORMAT.md is rendered from the tables in this module (`python tools/format_doc.py`).
"""

import uuid
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.errors import CorruptionError, FormatVersionError, UsageError
from kvfs.units import PAGE, align_up

FORMAT_VERSION: Final = 1
SEGMENT_MAGIC: Final = b"KVFSSEG1"
SUPERBLOCK_MAGIC: Final = b"KVFSSUP1"
HEADER_BYTES: Final = PAGE
HEADERS_BYTES: Final = 2 * HEADER_BYTES
ENTRY_BYTES: Final = 128
OPEN_POSITION: Final = HEADER_BYTES  # distance of the open header's start from the end
SEAL_POSITION: Final = 2 * HEADER_BYTES
SUPERBLOCK_BYTES_MAX: Final = 64 << 20


class HeaderKind(IntEnum):
    """What a segment header page says. Zero is never written."""

    OPEN = 1
    SEAL = 2


class SegmentKind(IntEnum):
    """How a segment holds its payloads. Zero is never written."""

    LOG = 1
    FILE = 2


class Codec(IntEnum):
    """How a payload is encoded."""

    RAW = 0


class EntryFlag(IntEnum):
    """Bits of an entry's flags."""

    PARTIAL = 1  # fewer tokens than a full block


ENTRY: Final = np.dtype([
    ("key", "u1", 32), ("parent", "u1", 32), ("offset", "<u8"), ("stored_bytes", "<u8"),
    ("logical_bytes", "<u8"), ("token_count", "<u4"), ("codec", "u1"), ("flags", "u1"),
    ("reserved", "<u2"), ("payload_xxh3", "u1", 16), ("reserved2", "<u8"), ("checksum", "<u8"),
])  # fmt: skip
HEADER: Final = np.dtype([
    ("magic", "S8"), ("format_version", "<u4"), ("header_kind", "<u4"), ("pool_uuid", "u1", 16),
    ("device_uuid", "u1", 16), ("slot", "<u4"), ("generation", "<u4"), ("namespace_id", "<u8"),
    ("layout_digest", "u1", 16), ("segment_kind", "<u4"), ("entry_count", "<u4"),
    ("segment_bytes", "<u8"), ("payload_bytes", "<u8"), ("created_ns", "<u8"),
    ("entries_xxh3", "u1", 16), ("reserved", "u1", HEADER_BYTES - 136), ("checksum", "<u8"),
])  # fmt: skip
SUPERBLOCK: Final = np.dtype([
    ("magic", "S8"), ("format_version", "<u4"), ("device_index", "<u4"), ("pool_uuid", "u1", 16),
    ("device_uuid", "u1", 16), ("sequence", "<u8"), ("segment_bytes", "<u8"),
    ("capacity_bytes", "<u8"), ("tier", "<u4"), ("generation_limit", "<u4"),
    ("owner_epoch", "<u8"), ("owner_host", "u1", 16), ("owner_boot", "u1", 16),
    ("owner_pid", "<u8"), ("heartbeat_ns", "<u8"), ("location", "<u8"),
    ("table_bytes", "<u8"), ("table_xxh3", "u1", 16),
    ("reserved", "u1", HEADER_BYTES - 176), ("checksum", "<u8"),
])  # fmt: skip

# What each field means; FORMAT.md shows it beside offset and size.
ENTRY_FIELDS: Final = {
    "key": "Block key: 8 bytes of namespace id, 24 bytes of digest. Opaque to the store.",
    "parent": "Key of the block before it in its context; zero: none, or unknown.",
    "offset": "Where the payload starts in the segment or payload file; a multiple of 4096.",
    "stored_bytes": "Length of the payload as stored, without the zeros that pad it to 4096.",
    "logical_bytes": "Length once decoded; equals `stored_bytes` for codec 0.",
    "token_count": "Tokens whose KV the block holds; 0 if unknown (a file made through POSIX).",
    "codec": "How the payload is encoded, see Codec.",
    "flags": "Bits of EntryFlag.",
    "reserved": "Zero.",
    "payload_xxh3": "XXH3-128 of the stored payload, low 64 bits first: protects the payload.",
    "reserved2": "Zero.",
    "checksum": "XXH3-64 of bytes 0 to 119 under `entry_seed`: protects the entry, and binds it "
    "to one device, slot and generation.",
}
HEADER_FIELDS: Final = {
    "magic": "The bytes `KVFSSEG1`.",
    "format_version": "1.",
    "header_kind": "Which of the two pages this is, see HeaderKind.",
    "pool_uuid": "The pool. Protects against devices of two pools being mixed.",
    "device_uuid": "The device. Protects against files copied between devices.",
    "slot": "Slot of the segment; as in its name. Protects against renamed files.",
    "generation": "Life of the slot, never used twice; as in its name.",
    "namespace_id": "The namespace all blocks of the segment belong to: 64 random bits.",
    "layout_digest": "Digest of the namespace's layout; another layout's segment is rejected.",
    "segment_kind": "How payloads are held, see SegmentKind.",
    "entry_count": "Seal: how many entries there are. Open: 0.",
    "segment_bytes": "Size of the log segment, or of the payload file of a file segment.",
    "payload_bytes": "Seal: end of the last payload (padded to 4096 in a log segment). Open: 0.",
    "created_ns": "When the segment was opened, nanoseconds since 1970 UTC; for people only.",
    "entries_xxh3": "Seal: XXH3-128 of all entries in order of their index: protects the set, so "
    "that a missing entry is noticed. Open: zero.",
    "reserved": "Zero.",
    "checksum": "XXH3-64, seed 0, of all bytes before it.",
}
SUPERBLOCK_FIELDS: Final = {
    "magic": "The bytes `KVFSSUP1`.",
    "format_version": "1.",
    "device_index": "Number of the device in its pool, at most 255; never reused.",
    "pool_uuid": "The pool.",
    "device_uuid": "The device. A device whose uuid is not the catalog's is refused.",
    "sequence": "Counts writes of this superblock.",
    "segment_bytes": "Size of a log segment: a power of two from 16 MiB to 1 GiB.",
    "capacity_bytes": "Hard bound of all bytes on the device, superblock excepted.",
    "tier": "Tier, 0 the fastest.",
    "generation_limit": "Generations below it may have been used; the next owner starts here, so "
    "that none is used twice, whatever the crash took.",
    "owner_epoch": "Counts owners.",
    "owner_host": "Host id of the owner. Protects against two hosts on one medium.",
    "owner_boot": "Boot id of the owner's host.",
    "owner_pid": "Process of the owner; 0 after a clean close.",
    "heartbeat_ns": "When the owner last said that it lives, nanoseconds since 1970 UTC.",
    "location": "Made from the inode of the directory, 0 unknown. Protects against a copied "
    "directory being taken for the original.",
    "table_bytes": "Length of the namespace table that follows the page.",
    "table_xxh3": "XXH3-128 of the namespace table: protects it.",
    "reserved": "Zero.",
    "checksum": "XXH3-64, seed 0, of all bytes of the page before it.",
}
VALUES: Final = {
    "HeaderKind.OPEN": "Written and persisted before the first payload.",
    "HeaderKind.SEAL": "Written after everything it covers was persisted.",
    "SegmentKind.LOG": "Payloads and summary share one file or slot.",
    "SegmentKind.FILE": "The payload file holds one file's bytes; the summary is a sidecar.",
    "Codec.RAW": "Stored as given.",
    "EntryFlag.PARTIAL": "The block holds fewer tokens than a full one.",
}
assert ENTRY.itemsize == ENTRY_BYTES == _native.ENTRY_BYTES
assert HEADER.itemsize == HEADER_BYTES
assert SUPERBLOCK.itemsize == HEADER_BYTES

EntryArray = npt.NDArray[np.void]


def entry_position(entry_index: int) -> int:
    """Return the distance of an entry's start from the segment's (or sidecar's) end."""
    return HEADERS_BYTES + (entry_index + 1) * ENTRY_BYTES


def sidecar_bytes(entry_count: int) -> int:
    """Return the size of a sidecar with that many entries."""
    return HEADERS_BYTES + align_up(entry_count * ENTRY_BYTES, PAGE)


def entry_seed(device_uuid: uuid.UUID, slot: int, generation: int) -> int:
    """Return the seed that binds an entry to one life of one segment."""
    identity = device_uuid.bytes + slot.to_bytes(4, "little") + generation.to_bytes(4, "little")
    return _native.xxh3_64(identity)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """An open or seal header, decoded. Sizes in bytes; `entries_xxh3` is zero in open headers."""

    kind: HeaderKind
    pool_uuid: uuid.UUID
    device_uuid: uuid.UUID
    slot: int
    generation: int
    namespace_id: int
    layout_digest: bytes
    segment_kind: SegmentKind
    segment_bytes: int
    created_ns: int
    entry_count: int = 0
    payload_bytes: int = 0
    entries_xxh3: bytes = bytes(16)


@dataclass(frozen=True, slots=True)
class NamespaceRecord:
    """A namespace as every device remembers it."""

    namespace_id: int
    name: str
    layout_json: str


@dataclass(frozen=True, slots=True)
class Superblock:
    """Identity, geometry and owner of one device.

    Attributes:
        sequence: Counts writes of this superblock.
        generation_limit: Segment generations below it may have been used; the next owner starts
            here.
        owner_epoch: Counts owners. `owner_pid` is zero after a clean close.
        location: What tells this device from a copy of it (inode of the directory; 0 unknown).
        capacity_bytes: Hard bound of all bytes on the device.
    """

    pool_uuid: uuid.UUID
    device_uuid: uuid.UUID
    device_index: int
    tier: int
    segment_bytes: int
    capacity_bytes: int
    sequence: int = 0
    generation_limit: int = 1
    owner_epoch: int = 0
    owner_host: bytes = bytes(16)
    owner_boot: bytes = bytes(16)
    owner_pid: int = 0
    heartbeat_ns: int = 0
    location: int = 0
    namespaces: tuple[NamespaceRecord, ...] = field(default=())


_SEGMENT_KINDS: Final = frozenset(int(kind) for kind in SegmentKind)


def _uuid_bytes(value: uuid.UUID) -> npt.NDArray[np.uint8]:
    return np.frombuffer(value.bytes, np.uint8)


def _signed_page(record: npt.NDArray[np.void]) -> bytes:
    """Return the record with its checksum, the last 8 bytes, filled."""
    raw = record.tobytes()
    return raw[:-8] + _native.xxh3_64(raw[:-8]).to_bytes(8, "little")


def _checked_page(raw: bytes, dtype: np.dtype[np.void], magic: bytes, where: str) -> Any:
    """Verify length, magic, checksum and version, in this order, and return the record."""
    if len(raw) < HEADER_BYTES:
        raise CorruptionError(
            f"truncated: {where}: expected {HEADER_BYTES} bytes, found {len(raw)}"
        )
    page = bytes(raw[:HEADER_BYTES])
    record = np.frombuffer(page, dtype)[0]
    if page[:8] != magic:
        raise CorruptionError(f"wrong magic: {where}: expected {magic!r}, found {page[:8]!r}")
    expected, found = _native.xxh3_64(page[:-8]), int(record["checksum"])
    if expected != found:
        raise CorruptionError(
            f"checksum mismatch: {where}: expected {expected:#018x}, found {found:#018x}"
        )
    version = int(record["format_version"])
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"format version {version}: {where}: this kvfs reads version {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    return record


def encode_header(header: SegmentHeader) -> bytes:
    """Encode a segment header page, 4096 bytes."""
    record = np.zeros(1, HEADER)
    record["magic"] = SEGMENT_MAGIC
    record["format_version"] = FORMAT_VERSION
    record["header_kind"] = header.kind
    record["pool_uuid"] = _uuid_bytes(header.pool_uuid)
    record["device_uuid"] = _uuid_bytes(header.device_uuid)
    record["layout_digest"] = np.frombuffer(header.layout_digest, np.uint8)
    record["entries_xxh3"] = np.frombuffer(header.entries_xxh3, np.uint8)
    for name in ("slot", "generation", "namespace_id", "segment_kind", "segment_bytes",
                 "created_ns", "entry_count", "payload_bytes"):  # fmt: skip
        record[name] = getattr(header, name)
    return _signed_page(record)


def decode_header(raw: bytes, kind: HeaderKind, where: str) -> SegmentHeader:
    """Decode and verify a segment header page.

    Raises:
        CorruptionError: Truncated, wrong magic, checksum or kind, or sizes that cannot be.
        FormatVersionError: Written by another format.
    """
    record = _checked_page(raw, HEADER, SEGMENT_MAGIC, where)
    if int(record["header_kind"]) != kind:
        raise CorruptionError(
            f"wrong header kind: {where}: expected {int(kind)}, found {int(record['header_kind'])}"
        )
    if int(record["segment_kind"]) not in _SEGMENT_KINDS:
        raise CorruptionError(
            f"unknown segment kind: {where}: expected 1 or 2, found {int(record['segment_kind'])}"
        )
    needed = int(record["payload_bytes"])
    if int(record["segment_kind"]) == SegmentKind.LOG:
        needed += HEADERS_BYTES + int(record["entry_count"]) * ENTRY_BYTES
    if needed > int(record["segment_bytes"]):
        raise CorruptionError(
            f"payloads and entries overlap: {where}: expected at most "
            f"{int(record['segment_bytes'])} bytes, found {needed}"
        )
    return SegmentHeader(
        kind=kind,
        pool_uuid=uuid.UUID(bytes=record["pool_uuid"].tobytes()),
        device_uuid=uuid.UUID(bytes=record["device_uuid"].tobytes()),
        slot=int(record["slot"]),
        generation=int(record["generation"]),
        namespace_id=int(record["namespace_id"]),
        layout_digest=record["layout_digest"].tobytes(),
        segment_kind=SegmentKind(int(record["segment_kind"])),
        segment_bytes=int(record["segment_bytes"]),
        created_ns=int(record["created_ns"]),
        entry_count=int(record["entry_count"]),
        payload_bytes=int(record["payload_bytes"]),
        entries_xxh3=record["entries_xxh3"].tobytes(),
    )


_SUPERBLOCK_INTEGERS: Final = (
    "device_index", "tier", "segment_bytes", "capacity_bytes", "sequence", "generation_limit",
    "owner_epoch", "owner_pid", "heartbeat_ns", "location",
)  # fmt: skip


def encode_superblock(superblock: Superblock) -> bytes:
    """Encode a superblock: header page and namespace table, a multiple of 4096 bytes.

    Raises:
        UsageError: The namespaces do not fit into `SUPERBLOCK_BYTES_MAX`.
    """
    table = msgspec.msgpack.encode(superblock.namespaces)
    if HEADER_BYTES + align_up(len(table), PAGE) > SUPERBLOCK_BYTES_MAX:
        raise UsageError(
            f"too many namespaces: device {superblock.device_index}: expected a table of at most "
            f"{SUPERBLOCK_BYTES_MAX - HEADER_BYTES} bytes, found {len(table)}; remove some"
        )
    record = np.zeros(1, SUPERBLOCK)
    record["magic"] = SUPERBLOCK_MAGIC
    record["format_version"] = FORMAT_VERSION
    record["pool_uuid"] = _uuid_bytes(superblock.pool_uuid)
    record["device_uuid"] = _uuid_bytes(superblock.device_uuid)
    record["owner_host"] = np.frombuffer(superblock.owner_host, np.uint8)
    record["owner_boot"] = np.frombuffer(superblock.owner_boot, np.uint8)
    for name in _SUPERBLOCK_INTEGERS:
        record[name] = getattr(superblock, name)
    record["table_bytes"] = len(table)
    record["table_xxh3"] = np.frombuffer(_native.xxh3_128(table), np.uint8)
    return _signed_page(record) + table.ljust(align_up(len(table), PAGE), b"\0")


def decode_superblock(raw: bytes, where: str) -> Superblock:
    """Decode and verify a superblock.

    Raises:
        CorruptionError: Header, namespace table or its padding damaged, or bytes missing or left.
        FormatVersionError: Written by another format.
    """
    record = _checked_page(raw, SUPERBLOCK, SUPERBLOCK_MAGIC, where)
    length = int(record["table_bytes"])
    expected = HEADER_BYTES + align_up(length, PAGE)
    if expected > SUPERBLOCK_BYTES_MAX or len(raw) != expected:
        raise CorruptionError(
            f"wrong size: {where}: expected {expected} bytes, at most {SUPERBLOCK_BYTES_MAX}, "
            f"found {len(raw)}"
        )
    table = raw[HEADER_BYTES : HEADER_BYTES + length]
    if _native.xxh3_128(table) != record["table_xxh3"].tobytes():
        raise CorruptionError(f"namespace table checksum mismatch: {where}: {length} bytes")
    if any(raw[HEADER_BYTES + length :]):
        raise CorruptionError(f"padding is not zero: {where}: after {length} bytes of table")
    try:
        namespaces = msgspec.msgpack.decode(table, type=tuple[NamespaceRecord, ...])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptionError(f"namespace table not understood: {where}: {error}") from error
    if any(not 0 <= namespace.namespace_id < 1 << 64 for namespace in namespaces):
        raise CorruptionError(f"namespace id out of range: {where}: expected 64 bits")
    return Superblock(
        pool_uuid=uuid.UUID(bytes=record["pool_uuid"].tobytes()),
        device_uuid=uuid.UUID(bytes=record["device_uuid"].tobytes()),
        owner_host=record["owner_host"].tobytes(),
        owner_boot=record["owner_boot"].tobytes(),
        namespaces=namespaces,
        **{name: int(record[name]) for name in _SUPERBLOCK_INTEGERS},
    )
