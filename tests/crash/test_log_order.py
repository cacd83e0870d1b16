"""The segment log as its disk sees it: order of writes and persists, and what crashes leave."""

import random
import uuid
from collections.abc import Iterator
from dataclasses import replace as with_changes
from unittest import mock

import numpy as np
import pytest

from kvfs.devices.directory import DirectoryDevice
from kvfs.engine import format as fmt
from kvfs.engine.format import ENTRY, ENTRY_BYTES, HEADERS_BYTES
from kvfs.engine.log import (
    Batch,
    SegmentLog,
    file_sidecar,
    is_unborn,
    load_segment,
)
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.errors import DeviceError, PoisonedError
from kvfs.units import PAGE
from tests.crash.events import Journal, Sync, SyncNames, Write
from tests.crash.simfs import SimFileSystem

SEGMENT = 4 << 20
SLOT, GENERATION = 3, 8
DEVICE_UUID = uuid.UUID(int=0xD)


class Subject:
    """One log on a simulated disk."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.files = SimFileSystem(0, self.journal)
        self.device = DirectoryDevice(
            self.files, index=0, uuid=DEVICE_UUID, capacity_bytes=8 * SEGMENT,
            segment_bytes=SEGMENT, name="disk",
        )  # fmt: skip
        self.header = fmt.SegmentHeader(
            fmt.HeaderKind.OPEN, uuid.UUID(int=1), DEVICE_UUID, SLOT, GENERATION, 0x51, b"d" * 16,
            fmt.SegmentKind.LOG, SEGMENT, 0,
        )  # fmt: skip
        handle = self.device.create(SLOT, GENERATION, b"")
        self.state = SegmentState(handle, 0x51, SegmentStatus.OPEN, 0)
        self.log = SegmentLog(self.device, self.state, self.header)
        self.made = 0

    def batch(self, *lengths: int) -> Batch:
        """Make blocks; payload i is the byte i."""
        count = len(lengths)
        self.payloads = [bytes([(self.made + i) % 251]) * n for i, n in enumerate(lengths)]
        self.arrays = [np.frombuffer(payload, np.uint8) for payload in self.payloads]
        keys = np.zeros((count, 32), np.uint8)
        keys.view("<u4")[:, 0] = np.arange(self.made, self.made + count) + 1
        self.made += count
        return Batch(
            keys, np.zeros((count, 32), np.uint8),
            np.array([array.ctypes.data for array in self.arrays], np.uint64),
            np.array(lengths, np.uint64), np.zeros(count, np.uint32), np.zeros(count, np.uint8),
        )  # fmt: skip

    def append(self, *lengths: int) -> np.ndarray:
        return self.log.append(self.batch(*lengths))

    def events(self, start: int = 0) -> list[str]:
        """Return what was done since `start`, a word each."""
        words = []
        for event in self.journal.events[start:]:
            if isinstance(event, Write):
                is_header = event.offset >= SEGMENT - HEADERS_BYTES
                is_payload = event.offset + len(event.data) <= self.state.payload_end
                words.append("header" if is_header else "payload" if is_payload else "entries")
            elif isinstance(event, (Sync, SyncNames)):
                words.append("sync" if isinstance(event, Sync) else "names")
        return words


@pytest.fixture
def subject() -> Iterator[Subject]:
    made = Subject()
    yield made
    made.device.close()
    made.files.discard()


@pytest.fixture
def started(subject: Subject) -> Subject:
    subject.log.start()
    return subject


def test_the_header_is_persisted_before_anything_else(started: Subject) -> None:
    assert started.events() == ["names", "header", "sync", "names", "names"]
    loaded = load_segment(started.device, started.state.handle)
    assert (loaded.is_sealed, loaded.entry_count, loaded.header) == (False, 0, started.header)


def test_payloads_come_before_their_entries_and_one_persist_covers_both(started: Subject) -> None:
    start = len(started.journal)
    assert started.append(100, PAGE).tolist() == [0, 1]
    assert started.append(PAGE + 1).tolist() == [2]
    started.log.persist()
    started.log.persist()
    assert started.events(start) == ["payload", "payload", "entries", "payload", "entries", "sync"]
    assert started.state.persisted_count == 3


def test_a_persist_covers_those_that_wait_for_it(started: Subject) -> None:
    started.append(100, 100)
    started.log.persist(wanted=1)
    start = len(started.journal)
    started.log.persist(wanted=2)
    assert started.events(start) == []


def test_a_page_of_entries_is_only_ever_added_to(started: Subject) -> None:
    """A torn write of a page must not be able to lose an entry persisted before."""
    before = bytes(SEGMENT)
    for size in (1, 30, 3, 40, 1):
        started.append(*[64] * size)
        after = started.files.files()["segments/00000003-00000008.seg"]
        old = np.frombuffer(before, np.uint64).reshape(-1, ENTRY_BYTES // 8)
        new = np.frombuffer(after, np.uint64).reshape(-1, ENTRY_BYTES // 8)
        entries = slice((SEGMENT - HEADERS_BYTES) // ENTRY_BYTES - 200, None)
        changed = (old[entries] != new[entries]).any(axis=1)
        assert not old[entries][changed][:, 0].any() or before == bytes(SEGMENT)
        before = after


def test_sealing_vouches_only_for_what_was_persisted(started: Subject) -> None:
    started.append(100, 200)
    start = len(started.journal)
    started.log.seal()
    assert started.events(start) == ["sync", "header", "sync"]
    assert started.state.status is SegmentStatus.SEALED
    loaded = load_segment(started.device, started.state.handle)
    assert (loaded.is_sealed, loaded.entry_count, loaded.residue) == (True, 2, ())
    with pytest.raises(PoisonedError):
        started.append(1)


def test_a_failed_persist_poisons(started: Subject) -> None:
    started.append(100)
    started.log.persist()
    started.append(200)
    started.files.failing_syncs = 1
    with pytest.raises(DeviceError, match=r"persist failed: disk segment 3 generation 8"):
        started.log.persist()
    start = len(started.journal)
    started.log.persist(wanted=1)  # was persisted before
    for refused in (started.log.persist, started.log.seal, lambda: started.append(1)):
        with pytest.raises(PoisonedError):
            refused()
    assert started.events(start) == [], "a poisoned segment was written"


def test_one_payload_that_fails_fails_the_batch(started: Subject) -> None:
    batch = started.batch(100, 200, 300)
    started.files.failing_writes = 1
    with pytest.raises(DeviceError, match="write failed"):
        started.log.append(batch)
    assert load_segment(started.device, started.state.handle).entry_count == 0


def test_filling_a_segment_to_the_last_page(started: Subject, rng: random.Random) -> None:
    while True:
        lengths = np.array([rng.randint(1, 5 * PAGE) for _ in range(rng.randint(1, 40))], np.uint64)
        count = started.log.fitting(lengths)
        if not count:
            break
        started.append(*lengths[:count].tolist())
    while started.log.fitting(np.array([1], np.uint64)):
        started.append(1)
    state = started.state
    end_of_entries = SEGMENT - HEADERS_BYTES - -(-state.entry_count * ENTRY_BYTES // PAGE) * PAGE
    assert end_of_entries - PAGE < state.payload_end <= end_of_entries + PAGE
    loaded = load_segment(started.device, state.handle)
    assert (loaded.entry_count, loaded.residue) == (state.entry_count, ())
    assert (loaded.entries == state.entries[: state.entry_count]).all()
    started.log.seal()
    assert load_segment(started.device, state.handle).entry_count == state.entry_count


def test_damaged_entries_are_passed_over_and_zeroed(started: Subject) -> None:
    started.append(*[100] * 40)
    torn = fmt.entry_position(5)
    started.device.write_tail(started.state.handle, torn, b"\xff" * 64)
    started.device.write_tail(started.state.handle, fmt.entry_position(39), bytes(64))
    started.device.write_tail(started.state.handle, fmt.SEAL_POSITION, b"torn")
    loaded = load_segment(started.device, started.state.handle)
    assert loaded.indices.tolist() == [i for i in range(39) if i != 5]
    assert [distance for distance, _ in loaded.residue] == [
        HEADERS_BYTES + 2 * PAGE, HEADERS_BYTES + PAGE, fmt.SEAL_POSITION,
    ]  # fmt: skip
    for distance, page in loaded.residue:
        started.device.write_tail(started.state.handle, distance, page)
    again = load_segment(started.device, started.state.handle)
    assert again.residue == ()
    assert (again.entries == loaded.entries).all()


def test_what_a_crash_leaves_of_a_birth_is_told_from_damage(subject: Subject) -> None:
    handle = subject.state.handle
    assert is_unborn(subject.device, handle)
    raw = fmt.encode_header(subject.header)
    subject.device.write_tail(handle, fmt.OPEN_POSITION, raw[:512])
    assert is_unborn(subject.device, handle)
    subject.device.write_tail(handle, fmt.SEAL_POSITION, raw[:512])
    assert not is_unborn(subject.device, handle)


def test_sidecars(subject: Subject) -> None:
    lengths = [PAGE] * 700 + [77]
    entries = np.zeros(len(lengths), ENTRY)
    entries["stored_bytes"] = lengths
    entries["offset"] = np.arange(len(lengths)) * PAGE
    staging = subject.device.create_staging("file")
    subject.device.write_staging(staging, 0, bytes(sum(lengths)))
    header = with_changes(
        subject.header, slot=9, segment_kind=fmt.SegmentKind.FILE, segment_bytes=sum(lengths)
    )
    handle = subject.device.adopt(staging, 9, GENERATION, file_sidecar(header, entries))
    loaded = load_segment(subject.device, handle)
    assert (loaded.is_sealed, loaded.entry_count) == (True, 701)
    assert (loaded.entries["stored_bytes"] == lengths).all()
    subject.device.write_tail(handle, fmt.entry_position(3), b"\xff")
    assert not load_segment(subject.device, handle).is_sealed


def test_entries_below_a_lost_page_are_found(started: Subject) -> None:
    started.append(*[1] * 600)
    lost = HEADERS_BYTES + 14 * PAGE  # the page of entries 416 to 447
    started.device.write_tail(started.state.handle, lost, bytes(PAGE))
    loaded = load_segment(started.device, started.state.handle)
    assert loaded.indices.tolist() == [*range(416), *range(448, 600)]
    assert (loaded.entry_count, loaded.residue) == (600, ())
    kept = started.state.entries[loaded.indices]
    assert (loaded.entries == kept).all()


def test_payloads_without_entries_are_not_read_whole(started: Subject) -> None:
    """Neither into memory, nor at all where the file has holes."""
    started.append(*[PAGE] * 300)
    started.device.write_tail(started.state.handle, HEADERS_BYTES + 11 * PAGE, bytes(10 * PAGE))
    with mock.patch.object(started.device, "read", wraps=started.device.read) as read:
        loaded = load_segment(started.device, started.state.handle)
    assert loaded.entry_count == 32
    assert sum(call.args[2] for call in read.call_args_list) <= 300 * PAGE + (1 << 20)
    assert max(call.args[2] for call in read.call_args_list) <= 1 << 20
