import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs import _native
from tests.native.support import ENTRY, PAGE

SEED = 0x1234_5678_9ABC_DEF0


def make_entry(offset: int, stored_bytes: int, seed: int = SEED) -> bytes:
    entry = bytearray(128)
    entry[:32] = bytes(range(32))
    struct.pack_into("<QQ", entry, 64, offset, stored_bytes)
    struct.pack_into("<Q", entry, 120, xxhash.xxh3_64_intdigest(bytes(entry[:120]), seed))
    return bytes(entry)


def scan_oracle(summary: bytes, entry_count: int, payload_limit: int) -> tuple[bytes, bytes, int]:
    """What scan_entries promises, written as the sentences of its contract."""
    found, indices, high_water = [], [], 0
    index = 0
    while True:
        position = len(summary) - (index + 1) * 128
        if position < 0 or index == entry_count:
            break
        if entry_count < 0 and payload_limit + position < high_water:
            break
        entry = summary[position : position + 128]
        checksum = int.from_bytes(entry[120:], "little")
        if any(entry) and checksum == xxhash.xxh3_64_intdigest(entry[:120], SEED):
            found.append(entry)
            indices.append(index)
            offset, stored = struct.unpack_from("<QQ", entry, 64)
            high_water = max(high_water, offset + -(-stored // PAGE) * PAGE)
        index += 1
    end = indices[-1] + 1 if indices else 0
    return b"".join(found), struct.pack(f"<{len(indices)}I", *indices), end


def test_sign() -> None:
    entries = np.zeros(100, ENTRY)
    entries["offset"] = np.arange(100)
    _native.sign_entries(entries, SEED)
    for entry in entries:
        assert entry["checksum"] == xxhash.xxh3_64_intdigest(entry.tobytes()[:120], SEED)
    with pytest.raises(ValueError, match="entries"):
        _native.sign_entries(bytearray(127), 0)
    with pytest.raises(BufferError):
        _native.sign_entries(bytes(128), 0)
    _native.sign_entries(bytearray(), 0)


kinds = st.sampled_from(["zero", "bad", "good", "other seed"])
offsets = st.integers(0, 12).map(lambda n: n * PAGE)
sizes = st.integers(0, 3 * PAGE) | st.just(2**64 - 1)
slots = st.lists(st.tuples(kinds, offsets, sizes), max_size=100)


@settings(deadline=None)
@given(slots, st.integers(0, 300), st.integers(0, 8), st.booleans())
def test_scan_equals_oracle(
    content: list[tuple[str, int, int]], slack: int, pages: int, is_sealed: bool
) -> None:
    entries = []
    for kind, offset, stored in content:
        entry = make_entry(offset, stored, SEED + 1 if kind == "other seed" else SEED)
        if kind == "zero":
            entry = bytes(128)
        if kind == "bad":
            entry = entry[:5] + b"?" + entry[6:]
        entries.append(entry)
    summary = bytes(slack) + b"".join(reversed(entries))
    entry_count = len(entries) if is_sealed else -1
    expected = scan_oracle(summary, entry_count, pages * PAGE)
    assert _native.scan_entries(summary, SEED, entry_count, pages * PAGE) == expected


def test_scan_goes_on_behind_a_page_of_zeroes() -> None:
    summary = make_entry(0, 1) + bytes(128 * 1000) + make_entry(0, 1)
    found, indices, end = _native.scan_entries(summary, SEED, 1002, 0)
    assert found == make_entry(0, 1) * 2
    assert indices == struct.pack("<II", 0, 1001)
    assert end == 1002
    assert _native.scan_entries(summary, SEED, 1001, 0)[2] == 1


def test_scan_survives_huge_numbers() -> None:
    summary = make_entry(2**64 - 1, 2**64 - 1) * 3
    assert _native.scan_entries(summary, SEED, -1, 2**64 - 1)[2] == 1
    assert _native.scan_entries(summary, SEED, 3, 2**64 - 1)[2] == 3
    assert _native.scan_entries(b"", SEED, -1, 0) == (b"", b"", 0)
    assert _native.scan_entries(b"short", SEED, -1, 0) == (b"", b"", 0)


def test_scan_arguments() -> None:
    with pytest.raises(ValueError, match="entry_count"):
        _native.scan_entries(bytes(127), 0, 1, 0)
    with pytest.raises(ValueError, match="payload_limit"):
        _native.scan_entries(b"", 0, 0, -1)
    with pytest.raises(OverflowError):
        _native.scan_entries(b"", 0, 2**63, 0)


def test_scan_skips_unreadable_pages(tmp_path: Path) -> None:
    """Truncation takes the end of a file, where the first entries are."""
    fd = os.open(tmp_path / "summary", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, make_entry(0, 1) * (3 * PAGE // 128), 0)
    arena = _native.Arena(fd, 3 * PAGE)
    os.ftruncate(fd, 2 * PAGE)
    found, indices, end = _native.scan_entries(arena, SEED, 96, 0)
    assert len(found) == 64 * 128
    assert list(np.frombuffer(indices, "<u4")) == list(range(32, 96))
    assert end == 96
    # Groups of entries that straddle a good and a bad page keep the good ones.
    view = memoryview(arena)[: 3 * PAGE - 128]
    found, indices, end = _native.scan_entries(view, SEED, 95, 0)
    assert list(np.frombuffer(indices, "<u4")) == list(range(31, 95))
    view.release()
    arena.close()
    os.close(fd)


def closure_oracle(keys: list[bytes], parents: list[bytes], dropped: set[int]) -> set[int]:
    while True:
        gone = {keys[row] for row in dropped}
        more = {
            row for row, parent in enumerate(parents)
            if any(parent) and parent in gone and row not in dropped
        }  # fmt: skip
        if not more:
            return dropped
        dropped = dropped | more


names = st.integers(0, 8).map(lambda n: bytes([n]) * 32)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(names, names, st.booleans()), max_size=30))
def test_closure_equals_oracle(rows: list[tuple[bytes, bytes, bool]]) -> None:
    keys, parents = [r[0] for r in rows], [r[1] for r in rows]
    dropped = np.array([r[2] for r in rows], np.uint8)
    expected = closure_oracle(keys, parents, {i for i, r in enumerate(rows) if r[2]})
    assert _native.closure(b"".join(keys), b"".join(parents), dropped) == len(expected)
    assert set(np.flatnonzero(dropped)) == expected


def test_closure_of_a_long_chain_and_a_wide_fan() -> None:
    count = 100_000
    keys = np.zeros((count, 32), np.uint8)
    keys.view("<u4")[:, 0] = np.arange(1, count + 1)
    chain = np.roll(keys, 1, axis=0)
    chain[0] = 0
    dropped = np.zeros(count, np.uint8)
    dropped[count // 2] = 1
    assert _native.closure(keys, chain, dropped) == count - count // 2
    fan = np.broadcast_to(keys[0], keys.shape).copy()
    fan[0] = 0
    same: Any = np.broadcast_to(keys[0], keys.shape).copy()
    dropped[:] = 0
    dropped[0] = 1
    assert _native.closure(same, fan, dropped) == count


def test_closure_arguments() -> None:
    with pytest.raises(ValueError, match="parents"):
        _native.closure(bytes(64), bytes(32), bytearray(2))
    with pytest.raises(ValueError, match="dropped"):
        _native.closure(bytes(64), bytes(64), bytearray(3))
    with pytest.raises(ValueError, match="keys"):
        _native.closure(bytes(33), bytes(64), bytearray(3))
    assert _native.closure(b"", b"", bytearray()) == 0
