"""The log of one segment: appending, persisting, sealing, poison, and reading it all back."""

import errno
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvfs.buffers import addresses_of
from kvfs.clock import ManualClock
from kvfs.devices.base import Device
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.wrappers import CountingDevice, Effect, Fault, Verb
from kvfs.engine import format as fmt
from kvfs.engine.format import HEADERS_BYTES
from kvfs.engine.log import Batch, SegmentLog, is_unborn, load_segment
from kvfs.engine.recovery import format_device
from kvfs.engine.segment_table import SegmentStatus
from kvfs.errors import CorruptionError, DeviceError, FormatVersionError, PoisonedError
from kvfs.units import PAGE
from tests.unit.engine_bench import (
    BLOCKS_PER_SEGMENT,
    OWNER,
    POOL_UUID,
    SEGMENT,
    chain,
    content_of,
    disk,
    faulty,
    spec,
)


class Bench:
    """A device with one open segment."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.state = format_device(device, POOL_UUID, 0, OWNER, ManualClock())
        self.log = self.open()

    def open(self) -> SegmentLog:
        slot, generation = self.state.claim()
        return self.state.open_segment(spec(), POOL_UUID, slot, generation)

    def append(self, count: int, start: int = 0, nbytes: int = 4096) -> np.ndarray:
        keys, parents = chain(count, start)
        buffers = [content_of(key.tobytes(), nbytes) for key in keys]
        addresses, lengths = addresses_of(buffers, count)
        flags = np.zeros(count, np.uint8)
        batch = Batch(keys, parents, addresses, lengths, np.arange(count, dtype=np.uint32), flags)
        self.log.append(batch)
        return keys

    def load(self):
        return load_segment(self.device, self.log.state.handle)

    def keys(self) -> list[bytes]:
        return [key.tobytes() for key in self.load().entries["key"]]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(CountingDevice(disk(tmp_path)))
    yield made
    made.device.close()


def with_faults(root: Path, *faults: Fault) -> Bench:
    return Bench(faulty(disk(root), *faults))


def as_bytes(keys: np.ndarray) -> list[bytes]:
    return [key.tobytes() for key in keys]


def test_appended_blocks_are_found_without_a_seal(bench: Bench) -> None:
    keys = np.concatenate([bench.append(3), bench.append(2, 100)])
    loaded = bench.load()
    assert not loaded.is_sealed
    assert loaded.residue == ()
    assert loaded.indices.tolist() == [0, 1, 2, 3, 4]
    assert as_bytes(loaded.entries["key"]) == as_bytes(keys)
    state = bench.log.state
    assert loaded.entries.tobytes() == state.entries[: state.entry_count].tobytes()
    for entry in loaded.entries:
        raw = bench.device.read(state.handle, int(entry["offset"]), int(entry["stored_bytes"]))
        assert raw == content_of(entry["key"].tobytes())


def test_sealed_segment(bench: Bench) -> None:
    keys = bench.append(5)
    bench.log.seal()
    assert bench.log.state.status is SegmentStatus.SEALED
    loaded = bench.load()
    assert loaded.is_sealed
    assert as_bytes(loaded.entries["key"]) == as_bytes(keys)
    with pytest.raises(PoisonedError, match="takes no writes: dir0 segment 0 generation"):
        bench.append(1, 100)


def test_what_fits(bench: Bench) -> None:
    def fitting(*lengths: int) -> int:
        return bench.log.fitting(np.array(lengths, np.uint64))

    assert fitting(*[4096] * 40) == BLOCKS_PER_SEGMENT
    assert fitting(SEGMENT - HEADERS_BYTES - PAGE) == 1
    assert fitting(SEGMENT - HEADERS_BYTES - PAGE + 1) == 0
    assert fitting(1, 1 << 20, 1) == 1
    bench.append(BLOCKS_PER_SEGMENT - 1)
    assert fitting(*[4096] * 3) == 1
    bench.append(1, 100)
    assert fitting(1) == 0
    assert len(bench.keys()) == BLOCKS_PER_SEGMENT


def test_small_blocks_leave_room_for_their_entries(tmp_path: Path) -> None:
    device = disk(tmp_path)
    bench = Bench(device)
    while count := bench.log.fitting(np.full(5, 10, np.uint64)):
        bench.append(count, 1000 * bench.log.state.entry_count, nbytes=10)
    loaded = bench.load()
    assert len(loaded.entries) == bench.log.state.entry_count == BLOCKS_PER_SEGMENT
    bench.log.seal()
    assert bench.load().is_sealed
    device.close()


def test_entries_of_earlier_pages_are_left_alone(tmp_path: Path) -> None:
    """More than a page of entries: 32 fit into one."""
    device = DirectoryDevice(
        OSFileSystem(str(tmp_path)), index=0, uuid=POOL_UUID,
        capacity_bytes=4 << 20, segment_bytes=1 << 20, name="dir0",
    )  # fmt: skip
    bench = Bench(device)
    keys = [bench.append(7, 1000 * i, nbytes=100) for i in range(20)]
    loaded = bench.load()
    assert as_bytes(loaded.entries["key"]) == as_bytes(np.concatenate(keys))
    assert loaded.entry_count == 140
    bench.log.seal()
    assert bench.load().entries.tobytes() == loaded.entries.tobytes()
    device.close()


def test_persist_covers_what_is_wanted(bench: Bench) -> None:
    calls = bench.device.calls
    before = calls["persist"]
    bench.append(2)
    bench.log.persist(wanted=1)
    assert bench.log.state.persisted_count == 2
    bench.log.persist(wanted=2)
    bench.log.persist()
    assert calls["persist"] == before + 1
    bench.append(1, 100)
    bench.log.persist(wanted=2)
    assert calls["persist"] == before + 1
    bench.log.persist()
    assert (calls["persist"], bench.log.state.persisted_count) == (before + 2, 3)


def test_persisters_share_a_round(bench: Bench) -> None:
    """Those that come while one persists are covered by one more persist."""
    entered, go_on = threading.Event(), threading.Event()
    persist, calls = bench.device.persist, []

    def slow(segment) -> None:
        calls.append(segment)
        entered.set()
        assert go_on.wait(30)
        persist(segment)

    bench.device.persist = slow  # type: ignore[method-assign]
    bench.append(1)
    first = threading.Thread(target=bench.log.persist)
    first.start()
    assert entered.wait(30)
    bench.append(1, 100)
    others = [threading.Thread(target=bench.log.persist) for _ in range(4)]
    for thread in others:
        thread.start()
    go_on.set()
    for thread in [first, *others]:
        thread.join(30)
    assert bench.log.state.persisted_count == 2
    assert len(calls) == 2


@pytest.mark.parametrize("operation", ["write_payloads", "write_tail"])
def test_failed_append_poisons(tmp_path: Path, operation: str) -> None:
    at = 2 if operation == "write_payloads" else 3  # the header, the first entries, these
    bench = with_faults(tmp_path, Fault(Verb.WRITE, at, operation=operation))
    kept = bench.append(2)
    bench.log.persist()
    with pytest.raises(DeviceError, match="write failed: dir0 segment 0") as caught:
        bench.append(3, 100)
    assert isinstance(caught.value.__cause__, OSError)
    state = bench.log.state
    assert state.is_poisoned
    assert (state.entry_count, state.persisted_count) == (2, 2)
    with pytest.raises(PoisonedError):
        bench.append(1, 200)
    bench.log.persist()  # nothing new to persist
    assert as_bytes(kept) == bench.keys()[:2]
    bench.device.close()


def test_a_write_that_stalls_poisons_whatever_else_is_wrong(tmp_path: Path) -> None:
    """What is under way still may come after whatever would be written over it."""
    bench = with_faults(tmp_path, Fault(Verb.WRITE, operation="write_payloads",
                                        code=errno.ETIMEDOUT))  # fmt: skip
    victim = int(np.random.default_rng(0).integers(2))  # as the fault chooses
    keys, parents = chain(2, 0)
    addresses, lengths = addresses_of([content_of(key.tobytes(), 4096) for key in keys], 2)
    with (tmp_path / "gone").open("w+b") as file:
        file.truncate(PAGE)
        gone = np.frombuffer(mmap.mmap(file.fileno(), PAGE), np.uint8)
        file.truncate(0)
    addresses[1 - victim] = gone.ctypes.data
    batch = Batch(keys, parents, addresses, lengths, np.zeros(2, np.uint32), np.zeros(2, np.uint8))
    with pytest.raises(DeviceError, match="write failed"):
        bench.log.append(batch)
    assert bench.log.state.is_poisoned
    bench.device.close()


def test_torn_entry_page_keeps_persisted_entries(tmp_path: Path) -> None:
    bench = with_faults(tmp_path, Fault(Verb.WRITE, 3, Effect.SHORT, operation="write_tail"))
    kept = bench.append(2)
    with pytest.raises(DeviceError):
        bench.append(3, 100)
    assert set(as_bytes(kept)) <= set(bench.keys())
    bench.device.close()


def test_failed_persist_poisons(tmp_path: Path) -> None:
    bench = with_faults(tmp_path, Fault(Verb.PERSIST, 2, operation="persist"))
    bench.append(2)
    with pytest.raises(DeviceError, match=r"persist failed: .* stay readable"):
        bench.log.persist()
    assert bench.log.state.persisted_count == 0
    with pytest.raises(PoisonedError, match="an earlier write or persist failed"):
        bench.log.persist()
    with pytest.raises(PoisonedError):
        bench.log.seal()
    bench.device.close()


def test_failed_start_gives_the_segment_back(tmp_path: Path) -> None:
    device = faulty(disk(tmp_path), Fault(Verb.WRITE, operation="write_tail"))
    with pytest.raises(DeviceError):
        Bench(device)
    assert device.segments() == []
    assert device.used_bytes == 0
    device.close()


def test_adopted_segment_of_an_earlier_owner_gets_no_seal(bench: Bench) -> None:
    bench.append(2)
    bench.log.state.needs_verify = True
    bench.log.seal()
    assert bench.log.state.status is SegmentStatus.SEALED
    assert not bench.load().is_sealed


# --- reading damaged ones


def write_tail(bench: Bench, distance: int, raw: bytes) -> None:
    bench.device.write_tail(bench.log.state.handle, distance, raw)


def test_damaged_entries_do_not_hide_others(bench: Bench) -> None:
    keys = bench.append(5)
    write_tail(bench, HEADERS_BYTES + 3 * 128, b"\xff" * 128)  # entry 2
    loaded = bench.load()
    assert loaded.indices.tolist() == [0, 1, 3, 4]
    assert as_bytes(loaded.entries["key"]) == as_bytes(keys[[0, 1, 3, 4]])
    assert loaded.entry_count == 5
    assert [distance for distance, _ in loaded.residue] == [HEADERS_BYTES + PAGE]


def test_damaged_seal_falls_back_to_a_scan(bench: Bench) -> None:
    keys = bench.append(5)
    bench.log.seal()
    write_tail(bench, fmt.SEAL_POSITION, b"torn")
    loaded = bench.load()
    assert not loaded.is_sealed
    assert as_bytes(loaded.entries["key"]) == as_bytes(keys)
    for distance, page in loaded.residue:
        write_tail(bench, distance, page)
    assert bench.load().residue == ()


def test_seal_that_does_not_cover_the_entries_is_none(bench: Bench) -> None:
    bench.append(5)
    bench.log.seal()
    write_tail(bench, HEADERS_BYTES + 128, b"\xff")
    loaded = bench.load()
    assert not loaded.is_sealed
    assert loaded.indices.tolist() == [1, 2, 3, 4]


def test_damaged_open_header(bench: Bench) -> None:
    handle = bench.log.state.handle
    bench.append(1)
    write_tail(bench, fmt.OPEN_POSITION, b"torn")
    with pytest.raises(CorruptionError, match=r"wrong magic: dir0 segment 0 .* open"):
        bench.load()
    assert not is_unborn(bench.device, handle)


def test_unborn(bench: Bench) -> None:
    log = bench.open()
    bench.device.write_tail(log.state.handle, fmt.OPEN_POSITION, b"torn header")
    assert is_unborn(bench.device, log.state.handle)
    bench.device.write_tail(log.state.handle, fmt.OPEN_POSITION, bytes(PAGE))
    assert is_unborn(bench.device, log.state.handle)


def test_segment_of_another_place(bench: Bench) -> None:
    other = bench.open()
    other.device.write_tail(
        other.state.handle, fmt.OPEN_POSITION, bench.device.read_tail(bench.log.state.handle, PAGE)
    )
    with pytest.raises(CorruptionError, match=r"segment is somebody else's: .* says segment 0"):
        load_segment(bench.device, other.state.handle)


def test_later_format(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.append(1)
    with monkeypatch.context() as patch:
        patch.setattr(fmt, "FORMAT_VERSION", 2)
        with pytest.raises(FormatVersionError, match="format version 1"):
            bench.load()
    assert len(bench.keys()) == 1
