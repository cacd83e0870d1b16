"""Hostile bytes: whatever is on the medium, decoding gives the truth or a DataError, never more."""

import tracemalloc
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs import _native
from kvfs.engine import format as fmt
from kvfs.engine.format import (
    ENTRY,
    HEADER,
    SUPERBLOCK,
    HeaderKind,
    NamespaceRecord,
    SegmentHeader,
    SegmentKind,
    Superblock,
)
from kvfs.errors import CorruptionError, DataError, FormatVersionError

POOL, DEVICE = uuid.UUID(int=0x1111), uuid.UUID(int=0x2222)
SEED = fmt.entry_seed(DEVICE, 3, 4)


def decode_open(raw: bytes) -> Any:
    return fmt.decode_header(raw, HeaderKind.OPEN, "ssd0 segment 3 open")


def decode_seal(raw: bytes) -> Any:
    return fmt.decode_header(raw, HeaderKind.SEAL, "ssd0 segment 3 seal")


def decode_superblock(raw: bytes) -> Any:
    return fmt.decode_superblock(raw, "ssd0 superblock")


def header(kind: HeaderKind) -> bytes:
    return fmt.encode_header(
        SegmentHeader(
            kind=kind, pool_uuid=POOL, device_uuid=DEVICE, slot=3, generation=4, namespace_id=5,
            layout_digest=b"L" * 16, segment_kind=SegmentKind.LOG, segment_bytes=1 << 24,
            created_ns=6, entry_count=7, payload_bytes=8192, entries_xxh3=b"E" * 16,
        )
    )  # fmt: skip


def superblock(namespaces: int = 3) -> bytes:
    return fmt.encode_superblock(
        Superblock(
            pool_uuid=POOL, device_uuid=DEVICE, device_index=1, tier=2, segment_bytes=1 << 24,
            capacity_bytes=1 << 30, sequence=9, namespaces=tuple(
                NamespaceRecord(2**63 + i, f"namespace-{i}", "{" + "x" * 50 + "}")
                for i in range(namespaces)
            ),
        )
    )  # fmt: skip


STRUCTURES: list[Any] = [
    pytest.param(header(HeaderKind.OPEN), decode_open, id="open"),
    pytest.param(header(HeaderKind.SEAL), decode_seal, id="seal"),
    pytest.param(superblock(), decode_superblock, id="superblock"),
    pytest.param(superblock(100), decode_superblock, id="superblock-of-100"),
    pytest.param(superblock(0), decode_superblock, id="superblock-of-none"),
]
Decoder = Callable[[bytes], Any]


def signed(record: np.ndarray) -> bytes:
    """Return a page with a checksum that holds, whatever it says."""
    raw = record.tobytes()[:-8]
    return raw + _native.xxh3_64(raw).to_bytes(8, "little")


def superblock_around(table: bytes, length: int | None = None) -> bytes:
    """Return a superblock whose checksums hold around a table of any bytes."""
    record = np.zeros(1, SUPERBLOCK)
    record["magic"], record["format_version"] = fmt.SUPERBLOCK_MAGIC, fmt.FORMAT_VERSION
    record["table_bytes"] = len(table) if length is None else length
    record["table_xxh3"] = np.frombuffer(_native.xxh3_128(table), np.uint8)
    return signed(record) + table + bytes(-len(table) % 4096)


# --- damage


@pytest.mark.parametrize(("raw", "decode"), STRUCTURES)
def test_the_undamaged_structure_decodes(raw: bytes, decode: Decoder) -> None:
    assert decode(raw) is not None


@pytest.mark.parametrize(("raw", "decode"), STRUCTURES)
def test_a_flipped_bit_in_any_byte_is_found(raw: bytes, decode: Decoder) -> None:
    bits = np.random.default_rng(1).integers(8, size=len(raw))
    for at in range(len(raw)):
        for mask in (1 << int(bits[at]), 0xFF):
            damaged = bytearray(raw)
            damaged[at] ^= mask
            with pytest.raises((CorruptionError, FormatVersionError)) as caught:
                decode(bytes(damaged))
            assert "ssd0" in str(caught.value)


@pytest.mark.parametrize(("raw", "decode"), STRUCTURES)
def test_every_truncation_is_found(raw: bytes, decode: Decoder) -> None:
    for length in [*range(0, len(raw), 61), len(raw) - 1]:
        with pytest.raises(CorruptionError):
            decode(raw[:length])


@pytest.mark.parametrize(("raw", "decode"), STRUCTURES)
def test_every_torn_write_is_found(raw: bytes, decode: Decoder) -> None:
    """A prefix of sectors of the new page over zeros, or over an older page."""
    for older in (bytes(len(raw)), bytes([0xA5]) * len(raw)):
        for at in range(512, len(raw), 512):
            torn = raw[:at] + older[at:]
            if torn != raw:
                with pytest.raises(CorruptionError):
                    decode(torn)


@pytest.mark.parametrize(("raw", "decode"), STRUCTURES[2:])
def test_bytes_behind_a_superblock_are_found(raw: bytes, decode: Decoder) -> None:
    for more in (b"\0", bytes(4096), b"x"):
        with pytest.raises(CorruptionError, match="wrong size"):
            decode(raw + more)


def test_structures_in_each_others_place_are_found() -> None:
    for raw, decode in (
        (header(HeaderKind.OPEN), decode_seal),
        (header(HeaderKind.SEAL), decode_open),
        (header(HeaderKind.OPEN), decode_superblock),
        (superblock(), decode_open),
        (bytes(4096), decode_open),
        (b"\xff" * 4096, decode_seal),
        (bytes(8192), decode_superblock),
    ):
        with pytest.raises(CorruptionError):
            decode(raw)


@given(st.binary(max_size=200), st.booleans())
def test_noise_is_never_a_structure(noise: bytes, has_magic: bool) -> None:
    for magic, decode in (
        (fmt.SEGMENT_MAGIC, decode_open),
        (fmt.SUPERBLOCK_MAGIC, decode_superblock),
    ):
        page = (magic + noise if has_magic else noise).ljust(4096, b"\0")
        with pytest.raises(CorruptionError):
            decode(page)
        with pytest.raises(CorruptionError):
            decode(noise)


# --- lies whose checksums hold


@pytest.mark.parametrize("length", [1, 4097, 1 << 26, 1 << 31, 1 << 32, 2**63, 2**64 - 1])
def test_a_huge_table_is_refused_without_memory(length: int) -> None:
    raw = superblock_around(b"", length)
    tracemalloc.start()
    with pytest.raises(CorruptionError, match="wrong size"):
        decode_superblock(raw)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_table_at_the_limit_is_judged_by_its_bytes() -> None:
    length = fmt.SUPERBLOCK_BYTES_MAX - 4096
    with pytest.raises(CorruptionError, match="not understood"):
        decode_superblock(superblock_around(b"\xc1" * length))
    with pytest.raises(CorruptionError, match="wrong size"):
        decode_superblock(superblock_around(b"\xc1" * (length + 1)))


HOSTILE_TABLES = {
    "empty": b"",
    "not an array": msgspec.msgpack.encode(7),
    "trailing bytes": msgspec.msgpack.encode(()) + b"\x90",
    "array that says four billion": b"\xdd\xff\xff\xff\xff",
    "map that says four billion": b"\x91\xdf\xff\xff\xff\xff",
    "string that says four billion": b"\x91\x83\xdb\xff\xff\xff\xff",
    "nested without end": b"\x91" * 100_000,
    "nested maps in an unknown field": b"\x91\x81\xa1x" + b"\x81\xa1x" * 100_000,
    "field missing": msgspec.msgpack.encode([{"namespace_id": 1, "name": "x"}]),
    "wrong type": msgspec.msgpack.encode([{"namespace_id": "1", "name": "x", "layout_json": ""}]),
    "negative id": msgspec.msgpack.encode([{"namespace_id": -1, "name": "x", "layout_json": ""}]),
    "name not UTF-8": b"\x91\x83\xacnamespace_id\x01\xa4name\xa2\xff\xfe\xablayout_json\xa0",
    "key not UTF-8": b"\x91\x84\xacnamespace_id\x01\xa4name\xa0\xablayout_json\xa0\xa2\xff\xfe\x01",
}


@pytest.mark.parametrize("name", [name for name in HOSTILE_TABLES if name != "key not UTF-8"])
def test_a_hostile_table_is_corruption(name: str) -> None:
    with pytest.raises(CorruptionError, match="ssd0 superblock"):
        decode_superblock(superblock_around(HOSTILE_TABLES[name]))


@given(st.one_of(st.binary(max_size=300), st.sampled_from(sorted(HOSTILE_TABLES.values()))))
def test_any_table_is_decoded_or_corruption(table: bytes) -> None:
    try:
        found = decode_superblock(superblock_around(table))
    except CorruptionError:
        return
    for record in found.namespaces:
        assert 0 <= record.namespace_id < 1 << 64
        assert isinstance(record.name, str)


VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))


@given(VALUES, VALUES, VALUES, VALUES, VALUES, VALUES)
def test_any_signed_header_is_sane_or_corruption(
    version: int, kind: int, segment_kind: int, count: int, size: int, payload: int
) -> None:
    record = np.zeros(1, HEADER)
    record["magic"], record["format_version"] = fmt.SEGMENT_MAGIC, version
    record["header_kind"], record["segment_kind"], record["entry_count"] = kind, segment_kind, count
    record["segment_bytes"], record["payload_bytes"] = size, payload * 4096
    try:
        found = decode_seal(signed(record))
    except FormatVersionError:
        assert version != fmt.FORMAT_VERSION
    except CorruptionError:
        assert version == fmt.FORMAT_VERSION
    else:
        assert (version, kind) == (fmt.FORMAT_VERSION, HeaderKind.SEAL)
        assert found.payload_bytes <= found.segment_bytes
        if found.segment_kind == SegmentKind.LOG:
            summary = fmt.HEADERS_BYTES + found.entry_count * fmt.ENTRY_BYTES
            assert summary + found.payload_bytes <= found.segment_bytes


def test_data_errors_are_the_only_ones() -> None:
    assert issubclass(CorruptionError, DataError)
    assert issubclass(FormatVersionError, DataError)


# --- entries


def entries(count: int) -> np.ndarray:
    rows = np.zeros(count, ENTRY)
    rows["key"] = np.arange(count * 32, dtype=np.uint64).astype(np.uint8).reshape(count, 32)
    rows["offset"] = np.arange(count, dtype=np.uint64) * 4096
    rows["stored_bytes"] = rows["logical_bytes"] = 4000
    _native.sign_entries(rows, SEED)
    return rows


def scan(summary: bytes, count: int, limit: int = 0) -> tuple[bytes, list[int]]:
    raw, indices, _ = _native.scan_entries(summary, SEED, count, limit)
    return raw, np.frombuffer(indices, np.uint32).tolist()


def test_a_flipped_bit_drops_one_entry_and_no_other() -> None:
    rows = entries(3)
    whole = rows[::-1].tobytes()
    assert scan(whole, 3) == (rows.tobytes(), [0, 1, 2])
    kept = rows[0].tobytes() + rows[2].tobytes()
    for at in range(128):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[128 + at] ^= 1 << bit
            assert scan(bytes(damaged), 3) == (kept, [0, 2])


def test_an_entry_of_another_life_is_never_valid() -> None:
    raw = entries(1).tobytes()
    assert scan(raw, 1)[1] == [0]
    for device, slot, generation in ((POOL, 3, 4), (DEVICE, 2, 4), (DEVICE, 3, 5)):
        seed = fmt.entry_seed(device, slot, generation)
        assert _native.scan_entries(raw, seed, 1, 0)[0] == b""


def test_an_entry_shifted_by_some_bytes_is_never_valid() -> None:
    raw = bytes(128) + entries(1).tobytes() + bytes(128)
    for shift in range(1, 128):
        assert scan(raw[shift : shift + 256], 2) == (b"", [])


@pytest.mark.parametrize("offset", [0, 4096, 2**63, 2**64 - 4096])
@pytest.mark.parametrize("stored", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_signed_lies_about_offsets_do_not_break_the_scan(offset: int, stored: int) -> None:
    rows = entries(8)
    rows["offset"][0], rows["stored_bytes"][0] = offset, stored
    _native.sign_entries(rows, SEED)
    summary = rows[::-1].tobytes()
    for limit in (0, 1 << 20, 2**63):
        raw, indices = scan(summary, -1, limit)
        assert len(raw) == 128 * len(indices)
        assert indices == sorted(set(indices))
        assert all(index < 8 for index in indices)


@given(st.binary(max_size=1000), st.integers(-1, 20), st.integers(0, 1 << 20))
def test_noise_holds_no_entries(noise: bytes, count: int, limit: int) -> None:
    try:
        assert scan(noise, count, limit) == (b"", [])
    except ValueError:
        assert count * 128 > len(noise) or len(noise) % 128
