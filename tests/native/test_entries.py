"""Entries of a batch, the records and summary pages made of them, and lists of keys.

The oracles are numpy, field by field.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfs import _native
from kvfs.engine.format import ENTRY
from tests.native.support import PAGE, RECORD, make_keys, random_bytes, u64

SEED = 0x1234_5678_9ABC_DEF0
COLUMNS = ("keys", "parents", "offsets", "lengths", "tokens", "flags", "digests")


def columns(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(count)
    return {
        "keys": make_keys(count, 1),
        "parents": make_keys(count, 2),
        "offsets": rng.integers(0, 1 << 40, count, np.uint64) * np.uint64(PAGE),
        "lengths": rng.integers(1, 1 << 28, count, np.uint64),
        "tokens": rng.integers(0, 1 << 32, count, np.uint32),
        "flags": rng.integers(0, 256, count, np.uint8),
        "digests": random_bytes(3, count * 16).reshape(count, 16),
    }


def filled(given: dict[str, Any]) -> Any:
    """What `fill_entries` promises, by numpy."""
    made = np.zeros(len(given["keys"]), ENTRY)
    made["key"], made["parent"], made["offset"] = given["keys"], given["parents"], given["offsets"]
    made["stored_bytes"] = made["logical_bytes"] = given["lengths"]
    made["token_count"], made["flags"] = given["tokens"], given["flags"]
    made["payload_xxh3"] = given["digests"]
    _native.sign_entries(made, SEED)
    return made


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_fill_writes_whole_entries(count: int) -> None:
    given_columns = columns(count)
    entries = random_bytes(4, count * 128)  # what a failed batch left is overwritten
    _native.fill_entries(entries, SEED, **given_columns)
    assert entries.tobytes() == filled(given_columns).tobytes()


@pytest.mark.parametrize("name", COLUMNS)
def test_fill_checks_every_length_first(name: str) -> None:
    given_columns = columns(4)
    given_columns[name] = given_columns[name][:-1]
    entries = bytearray(4 * 128)
    with pytest.raises(ValueError, match=name):
        _native.fill_entries(entries, SEED, **given_columns)
    assert not any(entries)
    with pytest.raises(ValueError, match="seed"):
        _native.fill_entries(entries, -1, **columns(4))
    with pytest.raises(BufferError):
        _native.fill_entries(bytes(4 * 128), SEED, **columns(4))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_pack_is_the_order_of_a_summary(count: int) -> None:
    entries = filled(columns(count))
    nbytes = -(-count * 128 // PAGE) * PAGE
    assert _native.pack_summary(entries) == entries[::-1].tobytes().rjust(nbytes, b"\0")
    raw, indices, end = _native.scan_entries(_native.pack_summary(entries), SEED, count, 0)
    assert raw == entries.tobytes()
    assert list(np.frombuffer(indices, "<u4")) == list(range(count))
    assert end == count
    with pytest.raises(ValueError, match="entries"):
        _native.pack_summary(bytes(127))


def test_records_of_some_entries() -> None:
    entries = filled(columns(50))
    chosen = np.array([7, 0, 49, 7], np.int64)
    records = np.frombuffer(bytearray(b"\xff" * 4 * 64), RECORD)
    _native.entry_records(entries, chosen, 3, 17, 4_000_000_000, 5, records)
    assert (records["key"] == entries["key"][chosen]).all()
    assert (records["page"] == (entries["offset"][chosen] // PAGE).astype(np.uint32)).all()
    assert (records["length"] == entries["stored_bytes"][chosen]).all()
    assert (records["tokens"] == entries["token_count"][chosen]).all()
    assert records["entry"].tolist() == chosen.tolist()
    common = np.unique(records[["device", "flags", "segment", "generation", "sequence"]])
    assert common.tolist() == [(3, 5, 17, 4_000_000_000, 0)]


@pytest.mark.parametrize(("change", "match"), [
    ({"indices": np.array([0, 4], np.int64)}, "indices: expected 0 to 3, found 4"),
    ({"indices": np.array([0, -1], np.int64)}, "found -1"),
    ({"indices": bytes(15)}, "indices"), ({"entries": bytes(127)}, "entries"),
    ({"entries": b""}, "indices"), ({"records": bytearray(64)}, "records"),
    ({"device": 1 << 16}, "device"), ({"segment": 1 << 32}, "segment"),
    ({"generation": -1}, "generation"), ({"flags": 1 << 16}, "flags"),
])  # fmt: skip
def test_records_check_their_arguments(change: dict[str, Any], match: str) -> None:
    records = bytearray(2 * 64)
    arguments: dict[str, Any] = {
        "entries": bytes(4 * 128), "indices": np.array([0, 3], np.int64), "device": 0,
        "segment": 0, "generation": 1, "flags": 0, "records": records,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        _native.entry_records(**arguments | change)
    assert not any(records)


sizes = st.integers(0, 3 * PAGE) | st.sampled_from([2**64 - 1, 2**64 - PAGE, 2**63])


@settings(deadline=None)
@given(st.lists(sizes, max_size=80), st.integers(0, 10), st.integers(0, 70), st.integers(0, 60))
def test_place_equals_oracle(lengths: list[int], used: int, entry_count: int, pages: int) -> None:
    limit, end = pages * PAGE, used * PAGE
    expected = []
    for length in lengths:
        after = end + -(-length // PAGE) * PAGE
        if after + -(-(entry_count + len(expected) + 1) * 128 // PAGE) * PAGE > limit:
            break
        expected.append(end)
        end = after
    offsets = u64(*[7] * len(lengths))
    found = _native.place_payloads(u64(*lengths), used * PAGE, entry_count, limit, offsets)
    assert found == (len(expected), end)
    assert offsets.tolist() == expected + [7] * (len(lengths) - len(expected))


def test_place_arguments() -> None:
    assert _native.place_payloads(b"", 0, 0, 0, bytearray()) == (0, 0)
    assert _native.place_payloads(u64(1), 2**63 - 1, 2**32 - 1, 2**63 - 1, u64(0))[0] == 0
    with pytest.raises(ValueError, match="offsets"):
        _native.place_payloads(u64(1, 2), 0, 0, 1 << 20, u64(0))
    for name in ("payload_end", "entry_count", "limit"):
        numbers = {"payload_end": 0, "entry_count": 0, "limit": 0, name: -1}
        with pytest.raises(ValueError, match=name):
            _native.place_payloads(u64(1), offsets=u64(0), **numbers)


key_lists = st.lists(st.integers(0, 20).map(lambda n: bytes([n, 255 - n]) * 16), max_size=60)


@settings(deadline=None)
@given(key_lists, key_lists)
def test_keys_equal_oracle(keys: list[bytes], among: list[bytes]) -> None:
    firsts = np.full(len(keys), 99, np.int64)
    distinct = _native.distinct_keys(b"".join(keys), firsts)
    assert firsts[:distinct].tolist() == [i for i, key in enumerate(keys) if key not in keys[:i]]
    assert (firsts[distinct:] == 99).all()
    positions = np.full(len(keys), 99, np.int64)
    found = _native.find_keys(b"".join(keys), b"".join(among), positions)
    expected = [among.index(key) if key in among else -1 for key in keys]
    assert positions.tolist() == expected
    assert found == sum(position >= 0 for position in expected)


def test_many_keys() -> None:
    keys = make_keys(10_000)
    order = np.random.default_rng(5).permutation(len(keys))
    positions = np.empty(len(keys), np.int64)
    assert _native.find_keys(keys[order], keys, positions) == len(keys)
    assert (positions == order).all()
    assert _native.distinct_keys(np.concatenate([keys, keys]), np.empty(20_000, np.int64)) == 10_000


def test_keys_arguments() -> None:
    with pytest.raises(ValueError, match="keys"):
        _native.distinct_keys(bytes(33), bytearray(8))
    with pytest.raises(ValueError, match="firsts"):
        _native.distinct_keys(bytes(32), bytearray(16))
    with pytest.raises(ValueError, match="among"):
        _native.find_keys(bytes(32), bytes(31), bytearray(8))
    with pytest.raises(ValueError, match="positions"):
        _native.find_keys(bytes(32), bytes(32), bytearray(7))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 2)), max_size=50),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_tally_equals_oracle(items: list[Any], has_lengths: bool, has_statuses: bool) -> None:
    records = np.zeros(len(items), RECORD)
    records["device"] = [device for device, _, _ in items]
    records["length"] = [length for _, length, _ in items]
    lengths = np.arange(len(items), dtype=np.uint64) if has_lengths else None
    statuses = np.array([status for _, _, status in items], np.int32) if has_statuses else None
    counts = np.full((4, 2), 7, np.uint64)
    expected = counts.copy()
    for i, (device, length, status) in enumerate(items):
        if length and not (has_statuses and status):
            expected[device] += np.array([1, i if has_lengths else length], np.uint64)
    counted = _native.tally(records, lengths, statuses, counts)
    assert counts.tolist() == expected.tolist()
    assert counted == int((expected - 7)[:, 0].sum())


def test_tally_arguments() -> None:
    records = np.zeros(2, RECORD)
    records["length"], records["device"] = 5, [0, 3]
    counts = np.zeros((3, 2), np.uint64)
    with pytest.raises(ValueError, match="no room for a device"):
        _native.tally(records, None, None, counts)
    assert not counts.any()
    with pytest.raises(ValueError, match="no room for a device"):
        _native.tally(records, None, None, bytearray(16 * 257))
    for arguments, name in (
        ((bytes(65), None, None, bytearray(16)), "records"),
        ((bytes(64), bytes(16), None, bytearray(16)), "lengths"),
        ((bytes(64), None, bytes(3), bytearray(16)), "statuses"),
        ((bytes(64), None, None, bytearray(15)), "counts"),
    ):
        with pytest.raises(ValueError, match=name):
            _native.tally(*arguments)
    with pytest.raises((BufferError, TypeError)):
        _native.tally(bytes(64), None, None, bytes(16))
