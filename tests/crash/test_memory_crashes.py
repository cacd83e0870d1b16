"""The model of persistent memory takes what a power cut may and no more, and sees broken devices.

Every mutant is a device that forgets one step of what `kvfs.devices.dax` promises.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

from kvfs.devices import dax_layout as layout
from kvfs.devices.base import Segment
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_copies import SuperblockCopies
from kvfs.devices.dax_memory import DaxMemory
from kvfs.engine import format as fmt
from kvfs.engine.log import Batch, SegmentLog
from kvfs.units import PAGE
from tests.crash.bench import Bench
from tests.crash.enumeration import Plan, walk
from tests.crash.events import FailedSync, Fence, Journal, Store, Sync, WriteBack
from tests.crash.lines import LINE, path_of
from tests.crash.medium import Medium
from tests.crash.simdax import SimMemory
from tests.crash.world import SEGMENT_BYTES, Geometry

_NEVER = 1 << 40
_QUICK = Plan(1, turn=1, randoms=4, deep=_NEVER, goes_on=_NEVER, crashed=_NEVER, failures=1, part=3)

# --- the model


@pytest.fixture
def journal() -> Journal:
    return Journal(("dax",))


def stored(journal: Journal, offset: int, data: bytes, *, is_streamed: bool = False) -> None:
    journal.add(Store(0, offset, data, is_streamed))


def pages(journal: Journal, randoms: int = 300) -> set[bytes]:
    """Return the distinct contents of the first page that a power cut may leave now."""
    medium = Medium.replay(journal)
    images = [medium.image(c, 0, {}).disks[0] for c in medium.choices("test", randoms)]
    return {image.get(path_of(0), bytes(PAGE)) for image in images}


def words(found: set[bytes], nbytes: int = LINE) -> set[bytes]:
    """Return the first byte of each aligned 8 bytes."""
    return {raw[:nbytes:8] for raw in found}


def test_what_was_written_back_and_fenced_stays(journal: Journal) -> None:
    stored(journal, 8, b"x" * 100)
    journal.add(WriteBack(0, 8, 100))
    assert len(pages(journal)) > 4
    journal.add(Fence(0))
    assert pages(journal) == {(bytes(8) + b"x" * 100).ljust(PAGE, b"\0")}


def test_what_was_streamed_needs_a_fence_alone(journal: Journal) -> None:
    stored(journal, 0, b"x" * PAGE, is_streamed=True)
    assert {bytes(PAGE), b"x" * PAGE} <= pages(journal)
    journal.add(Fence(0))
    assert pages(journal) == {b"x" * PAGE}


def test_a_line_that_was_never_written_back_is_there_or_not(journal: Journal) -> None:
    stored(journal, 0, b"a" * LINE)
    stored(journal, LINE, b"b" * LINE)
    journal.add(WriteBack(0, 0, LINE))
    journal.add(Fence(0))
    found = pages(journal)
    assert {raw[:LINE] for raw in found} == {b"a" * LINE}
    assert {bytes(LINE), b"b" * LINE} <= {raw[LINE : 2 * LINE] for raw in found}
    journal.add(Fence(0))
    assert pages(journal) == found, "a fence alone persists nothing"


def test_a_write_back_covers_what_was_stored_before_it(journal: Journal) -> None:
    stored(journal, 0, b"a" * LINE)
    journal.add(WriteBack(0, 0, LINE))
    stored(journal, 0, b"b" * LINE)
    journal.add(Fence(0))
    found = words(pages(journal))
    assert {b"a" * 8, b"b" * 8} <= found
    assert all(set(raw) <= set(b"ab") for raw in found)


def test_eight_bytes_are_never_torn_and_lines_are(journal: Journal) -> None:
    stored(journal, 0, b"x" * LINE)
    found = pages(journal)
    assert len(words(found)) > 25
    assert all(len(set(raw[i : i + 8])) == 1 for raw in found for i in range(0, LINE, 8))


def test_a_line_keeps_the_order_of_its_stores(journal: Journal) -> None:
    for value in (b"1", b"2", b"3"):
        stored(journal, 0, value * LINE)
    found = {raw.replace(b"\0", b"0") for raw in words(pages(journal))}
    assert {b"0" * 8, b"1" * 8, b"2" * 8, b"3" * 8} <= found
    for raw in found:
        assert max(raw) - min(raw) <= 1, "a store is there without the one before it"


def test_other_lines_have_no_order(journal: Journal) -> None:
    for number in range(3):
        stored(journal, number * LINE, b"x" * LINE)
    found = {raw[: 3 * LINE : LINE] for raw in pages(journal)}
    assert found == {bytes(120 * (i >> bit & 1) for bit in range(3)) for i in range(8)}


def test_few_lines_are_tried_in_every_combination(journal: Journal) -> None:
    for number in range(4):
        stored(journal, number * LINE, b"x" * LINE)
    found = {raw[: 4 * LINE : LINE] for raw in pages(journal, randoms=0)}
    assert len(found) == 16


# --- the device


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench("memory", Geometry((8,), dax=1))
    yield made
    made.close()


def test_nothing_is_pending_when_a_verb_returns(bench: Bench) -> None:
    """So that whoever persists need not be who stored."""
    space = bench.space()
    for durability in ("none", "async", "sync"):
        bench.put(space, 3, durability)
        state = Medium.replay(bench.journal).disks[0]
        assert state.pages
        assert not state.pending
        assert {path: blob[0] for path, blob in state.named.items()} == bench.world.disks[0].files()


def test_every_byte_of_the_device_is_written_down(bench: Bench) -> None:
    """What the model holds after any history is what the mapped memory holds."""
    bench.may_evict = True
    space = bench.space()
    for _ in range(12):
        bench.put(space, 9)
    bench.reopen()
    state = Medium.replay(bench.journal).disks[0]
    assert {path: blob[0] for path, blob in state.named.items()} == bench.world.disks[0].files()


# --- a file in its place


@pytest.fixture
def file_journal() -> Journal:
    return Journal(("file",))


def test_of_a_file_only_a_sync_persists(file_journal: Journal) -> None:
    stored(file_journal, 0, b"x" * LINE, is_streamed=True)
    file_journal.add(WriteBack(0, 0, LINE))
    file_journal.add(Fence(0))
    assert {bytes(8), b"x" * 8} <= words(pages(file_journal))
    file_journal.add(Sync(0, 0))
    assert words(pages(file_journal)) == {b"x" * 8}


def test_what_a_failed_sync_left_is_written_with_its_page_or_never(file_journal: Journal) -> None:
    stored(file_journal, 0, b"1" * LINE)
    stored(file_journal, LINE, b"2" * LINE)
    file_journal.add(FailedSync(0, 0, (0,)))
    lost = {(b"1" * LINE).ljust(PAGE, b"\0")}
    assert pages(file_journal) == lost
    file_journal.add(Sync(0, 0))
    assert pages(file_journal) == lost, "a later sync must not bring back what was lost"
    stored(file_journal, 2 * LINE, b"3")
    file_journal.add(Sync(0, 0))
    assert pages(file_journal) == {(b"1" * LINE + b"2" * LINE + b"3").ljust(PAGE, b"\0")}


# --- mutants


def _nothing(*_arguments: Any, **_options: Any) -> None:
    return None


def _no_write_back(chosen: Callable[[int, int], bool]) -> Callable[[SimMemory, int, int], None]:
    """Return a write-back that passes over some stores."""
    original = SimMemory.write_back

    def write_back(memory: SimMemory, offset: int, nbytes: int) -> None:
        if not chosen(offset, nbytes):
            original(memory, offset, nbytes)

    return write_back


def _is_open_header(offset: int, nbytes: int) -> bool:
    del nbytes
    place = offset - layout.HEADER_BYTES
    return place >= 0 and place % SEGMENT_BYTES == SEGMENT_BYTES - fmt.OPEN_POSITION


def _is_entry(offset: int, nbytes: int) -> bool:
    return offset >= layout.HEADER_BYTES and not _is_open_header(offset, nbytes)


def _is_label(offset: int, nbytes: int) -> bool:
    del nbytes
    return layout.LABELS_OFFSET <= offset < layout.BAD_OFFSET


def _is_superblock(offset: int, nbytes: int) -> bool:
    del nbytes
    return offset < layout.LABELS_OFFSET


def _cached_payloads(memory: SimMemory, offset: int, data: bytes, *, is_streamed: bool) -> None:
    """Payloads that stay in the caches, as if copied by ordinary stores."""
    memory._disk.note(Store(memory._disk.disk, offset, data, is_streamed and not any(data)))


def _label_first(device: DaxDevice, slot: int, generation: int, tag: bytes) -> Segment:
    """Name a place before it is zero."""
    del tag
    memory = device._opened()
    place = device._take_place()
    device._ledger.add(f"{slot:08x}-{generation:08x}", device.info.segment_bytes)
    raw = layout.encode_label(device.info.uuid, place, slot, generation)
    memory.store(layout.LABELS_OFFSET + place * layout.LABEL_BYTES, raw)
    memory.zero(device._start(place), device.info.segment_bytes)
    device._segments[slot, generation] = place
    return device._handle(slot, generation, place)


def _unzeroed(memory: DaxMemory, offset: int, nbytes: int) -> None:
    """Leave a former life where it is."""


def _free_without_write_back(device: DaxDevice, segment: Segment) -> None:
    with mock.patch.object(SimMemory, "write_back", _nothing):
        _FREE(device, segment)


_FREE = DaxDevice.free


def _copies_fenced_once(copies: SuperblockCopies, raw: bytes) -> None:
    with mock.patch.object(SimMemory, "fence", _nothing):
        _WRITE(copies, raw)
    copies._memory.fence()  # type: ignore[attr-defined]


_WRITE = SuperblockCopies.write


def _entries_before_header(log: SegmentLog, batch: Batch) -> np.ndarray:
    is_first = log.state.entry_count == 0
    done = _APPEND(log, batch)
    if is_first:
        _START(log)
    return done


_APPEND, _START = SegmentLog.append, SegmentLog.start

MUTANTS: dict[str, tuple[str, dict[tuple[type, str], Any]]] = {
    "no fence": ("pmem/put", {(SimMemory, "fence"): _nothing}),
    "nothing is written back": ("pmem/put", {(SimMemory, "write_back"): _nothing}),
    "open headers stay in the caches": (
        "pmem/put",
        {(SimMemory, "write_back"): _no_write_back(_is_open_header)},
    ),
    "entries stay in the caches": (
        "pmem/put",
        {(SimMemory, "write_back"): _no_write_back(_is_entry)},
    ),
    "labels stay in the caches": (
        "pmem/put",
        {(SimMemory, "write_back"): _no_write_back(_is_label)},
    ),
    "superblock stays in the caches": (
        "pmem/superblock",
        {(SimMemory, "write_back"): _no_write_back(_is_superblock)},
    ),
    "payloads stay in the caches": ("pmem/put", {(SimMemory, "note_store"): _cached_payloads}),
    "label before its zeros": ("pmem/evict", {(DaxDevice, "create"): _label_first}),
    "place that keeps a former life": ("pmem/evict", {(DaxMemory, "zero"): _unzeroed}),
    "freed label stays in the caches": (
        "pmem/evict",
        {(DaxDevice, "free"): _free_without_write_back},
    ),
    "superblock copies fenced once": (
        "pmem/superblock",
        {(SuperblockCopies, "write"): _copies_fenced_once},
    ),
    "entries before their open header": (
        "pmem/put",
        {(SegmentLog, "start"): _nothing, (SegmentLog, "append"): _entries_before_header},
    ),
    "file that is not synced": ("page/put", {(DaxMemory, "persist"): _nothing}),
    "failed sync that is forgotten": (
        "page/failing_sync_beside_others",
        {(SimMemory, "touch"): _nothing},
    ),
}


@pytest.mark.crash
@pytest.mark.parametrize("name", MUTANTS)
def test_sees_a_broken_device(name: str, expected_warnings: list[str]) -> None:
    expected_warnings.append("set aside")
    scenario, patches = MUTANTS[name]
    with contextlib.ExitStack() as stack:
        for (target, attribute), replacement in patches.items():
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        outcome = walk(scenario, _QUICK)
    assert outcome.failures, f"{name}: not seen in {outcome.recoveries} states"
