"""The checker on segments: damage of headers, entries and payloads is found and repaired."""

import dataclasses
import os
import uuid
from pathlib import Path

import numpy as np
import pytest

from kvfs import _native
from kvfs.engine import format as fmt
from kvfs.engine.format import ENTRY, HEADERS_BYTES
from kvfs.units import PAGE
from tests.unit.checker_bench import (
    BLOCKS,
    DEVICE_UUID,
    SEGMENT_BYTES,
    checker_bench,
)


@pytest.fixture
def bench():
    with checker_bench() as made:
        yield made


def sign(entry, generation: int, slot: int) -> bytes:
    _native.sign_entries(entry, fmt.entry_seed(DEVICE_UUID, slot, generation))
    return entry.tobytes()


def names_of(path: Path) -> tuple[int, int]:
    slot, _, generation = path.stem.partition("-")
    return int(slot, 16), int(generation, 16)


# --- headers


def test_open_header(bench):
    bench.flip(bench.segments(sealed=True)[0], -100)
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    assert bench.check().exit_code == 14
    bench.assert_repaired()


def test_open_header_lost(bench):
    path = bench.segments(sealed=True)[0]
    os.truncate(path, SEGMENT_BYTES - PAGE)
    os.truncate(path, SEGMENT_BYTES)
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_seal_header(bench):
    bench.flip(bench.segments(sealed=True)[0], -PAGE - 100)
    assert bench.codes() == [("WARNING", "seal-damaged")]
    assert bench.check().exit_code == 3
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS
        assert bench.read(pool, "small") == bench.small


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"pool_uuid": uuid.UUID(int=99)}, "segment-foreign"),
        ({"device_uuid": uuid.UUID(int=99)}, "segment-foreign"),
        ({"segment_kind": fmt.SegmentKind.FILE}, "segment-foreign"),
        ({"segment_bytes": 2 * SEGMENT_BYTES}, "segment-truncated"),
        ({"layout_digest": bytes(16)}, "segment-layout-mismatch"),
        ({"slot": 31}, "segment-header-damaged"),
    ],
)
def test_header_that_disagrees(bench, change, code):
    path = bench.segments(sealed=True)[0]
    raw = path.read_bytes()
    header = fmt.decode_header(raw[-PAGE:], fmt.HeaderKind.OPEN, "here")
    forged = fmt.encode_header(dataclasses.replace(header, **change))
    path.write_bytes(raw[:-PAGE] + forged)
    assert ("ERROR", code) in bench.codes()
    bench.assert_repaired()


def test_truncated_segment(bench):
    os.truncate(bench.segments(sealed=True)[0], SEGMENT_BYTES // 2)
    assert bench.check().exit_code == 14
    bench.assert_repaired()


def test_segment_of_another_slot(bench):
    path = bench.segments(sealed=True)[0]
    path.rename(path.with_name("0000001e-00000fff.seg"))
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_copied_segment(bench):
    path = bench.segments(sealed=True)[0]
    slot, _ = names_of(path)
    path.with_name(f"{slot:08x}-00000fff.seg").write_bytes(path.read_bytes())
    assert ("ERROR", "segment-header-damaged") in bench.codes()
    bench.assert_repaired()


def test_other_format_version_is_left_alone(bench):
    path = bench.segments(sealed=True)[0]
    raw = bytearray(path.read_bytes()[-PAGE:])
    raw[8:12] = (9).to_bytes(4, "little")
    raw[-8:] = _native.xxh3_64(bytes(raw[:-8])).to_bytes(8, "little")
    path.write_bytes(path.read_bytes()[:-PAGE] + raw)
    report = bench.check()
    assert [f.code for f in report.findings if f.code == "format-version"]
    assert not [a for a in report.plan if a.slot == names_of(path)[0] and a.device_index == 0]


def test_never_started(bench):
    bench.path("segments/0000001e-00000001.seg").write_bytes(bytes(SEGMENT_BYTES))
    bench.path("segments/0000001d-00000001.seg").write_bytes(b"")
    assert bench.codes() == [("NOTE", "segment-never-started")] * 2
    assert bench.check().exit_code == 0
    bench.assert_repaired()


# --- entries


@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_entry(bench, sealed):
    path = bench.segments(sealed=sealed)[0]
    bench.flip(path, -fmt.entry_position(1) + 40)
    codes = bench.codes()
    assert ("ERROR", "entry-damaged") in codes
    assert (("WARNING", "seal-damaged") in codes) == sealed
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) >= BLOCKS - 1


def test_last_entry_of_an_open_segment(bench):
    path = bench.segments(sealed=False)[0]
    raw = path.read_bytes()
    count = 0
    while any(raw[-fmt.entry_position(count) :][: fmt.ENTRY_BYTES]):
        count += 1
    bench.flip(path, -fmt.entry_position(count - 1) + 8)
    assert bench.codes()[0] == ("ERROR", "entry-damaged")
    bench.assert_repaired()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"offset": SEGMENT_BYTES - HEADERS_BYTES}, "entry-out-of-bounds"),
        ({"offset": 2**64 - PAGE}, "entry-out-of-bounds"),
        ({"offset": 13 * PAGE + 8}, "entry-misaligned"),
        ({"stored_bytes": 0}, "entry-size"),
        ({"stored_bytes": 8192, "logical_bytes": 8192}, "entry-size"),
        ({"logical_bytes": 4000}, "entry-size"),
        ({"stored_bytes": 2**64 - 1}, "entry-out-of-bounds"),
        ({"codec": 7}, "entry-codec"),
        ({"key": np.full(32, 255, np.uint8)}, "entry-foreign"),
        ({"offset": 0}, "entry-overlap"),
    ],
)
def test_forged_entry(bench, change, code):
    """Entries whose checksum holds, but which no kvfs would write."""
    path = bench.segments(sealed=False)[0]
    slot, generation = names_of(path)
    raw = bytearray(path.read_bytes())
    start = len(raw) - fmt.entry_position(1)
    entry = np.frombuffer(bytes(raw[start : start + fmt.ENTRY_BYTES]), ENTRY).copy()
    for name, value in change.items():
        entry[name] = value
    raw[start : start + fmt.ENTRY_BYTES] = sign(entry, generation, slot)
    path.write_bytes(raw)
    assert ("ERROR", code) in bench.codes(data=True)
    bench.assert_repaired()


def test_entry_of_a_former_life_is_not_valid(bench):
    path = bench.segments(sealed=False)[0]
    slot, generation = names_of(path)
    raw = bytearray(path.read_bytes())
    start = len(raw) - fmt.entry_position(1)
    entry = np.frombuffer(bytes(raw[start : start + fmt.ENTRY_BYTES]), ENTRY).copy()
    raw[start : start + fmt.ENTRY_BYTES] = sign(entry, generation - 1, slot)
    path.write_bytes(raw)
    assert ("ERROR", "entry-damaged") in bench.codes()
    bench.assert_repaired()


# --- payloads


def test_payload_of_a_sealed_segment(bench):
    bench.flip(bench.segments(sealed=True)[0], 2 * PAGE + 17)
    assert bench.codes() == []
    assert bench.codes(data=True) == [("ERROR", "payload-corrupt")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.assert_right(pool) == BLOCKS - 1


def test_payload_of_an_open_segment(bench):
    bench.flip(bench.segments(sealed=False)[0], 17)
    codes = bench.codes(data=True)
    assert codes[0] == ("WARNING", "payload-corrupt")
    bench.assert_repaired()


def test_payload_of_a_file_segment(bench):
    bench.flip(bench.segments(sealed=True, files=True)[0].with_suffix(".file"), 20_000)
    codes = bench.codes(data=True)
    assert codes == [("ERROR", "payload-corrupt"), ("WARNING", "file-not-whole")]
    bench.assert_repaired()
    with bench.open() as pool:
        assert bench.read(pool, "large") is None
        assert bench.read(pool, "small") == bench.small
