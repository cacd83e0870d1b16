"""Memory that outlives its owner: what the next one finds, and what it is not to find."""

import os
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from kvfs import _native
from kvfs.devices.base import Segment, SegmentName
from kvfs.devices.keeper import MEMORY_VERSION, Keeper, is_memory, prefix_of
from kvfs.devices.memory import MemoryDevice
from kvfs.devices.memory_label import Label
from kvfs.errors import CorruptionError, FormatVersionError
from kvfs.units import KIB, PAGE

UUID_ = UUID(int=7)
SEGMENT = 256 * KIB
CAPACITY = 8 * SEGMENT
TAG = b"tenant01"


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


@pytest.fixture
def opened(keeper) -> Callable[..., MemoryDevice]:
    def open_again(**changes: Any) -> MemoryDevice:
        options = {
            "index": 1, "uuid": UUID_, "capacity_bytes": CAPACITY, "segment_bytes": SEGMENT,
            "name": "kept7", "keeper": keeper,
        }  # fmt: skip
        return MemoryDevice(**{**options, **changes})

    return open_again


def put(device: MemoryDevice, segment: Segment, data: bytes) -> None:
    source = np.frombuffer(data, np.uint8).copy()
    failed = device.write_payloads(
        segment, np.zeros(1, np.uint64), np.array([source.ctypes.data], np.uint64),
        np.array([len(data)], np.uint64), np.zeros((1, 16), np.uint8), np.zeros(1, np.int32),
    )  # fmt: skip
    assert not failed


def make_log(device: MemoryDevice, slot: int, generation: int, data: bytes) -> Segment:
    segment = device.create(slot, generation, TAG)
    put(device, segment, data)
    device.write_tail(segment, PAGE, b"head")
    device.persist(segment)
    return segment


def make_file(device: MemoryDevice, slot: int, generation: int, data: bytes) -> Segment:
    staging = device.create_staging(f"s{slot}")
    device.write_staging(staging, 0, data)
    return device.adopt(staging, slot, generation, b"sidecar")


def abandon(device: MemoryDevice) -> None:
    """Let an owner end without a word: its maps and descriptors go, the keeper's stay."""
    for state in (*device._segments.values(), *device._raw.values(), *device._staging):
        if state.frame is not None:
            state.frame.close()
        else:
            state.file.close()
    for frame in device._free_frames:
        frame.close()
    device._kept.label.close()


def test_what_was_there_is_there(opened, keeper) -> None:
    device = opened()
    make_log(device, 3, 5, b"log" * 1000)
    make_file(device, 4, 6, b"file" * 1000)
    device.write_superblock(b"one" * 100)
    device.write_superblock(b"two" * 1000)
    raw = device.create_staging("raw")
    device.write_staging(raw, 0, b"raw" * 10)
    device.keep_raw(raw, 99)
    used = device.used_bytes
    device.create_staging("lost")
    abandon(device)

    device = opened()
    assert device.segments() == [
        SegmentName(3, 5, False, SEGMENT), SegmentName(4, 6, True, 4000),
    ]  # fmt: skip
    assert device.used_bytes == used
    assert device.read_superblock() == b"two" * 1000
    log, file = (device.attach(name) for name in device.segments())
    assert log.is_fixed
    assert not file.is_fixed
    assert device.read(log, 0, 3000) == b"log" * 1000
    assert _native.xxh3_128(device.read(log, 0, SEGMENT)) == _hash_at(log.address)
    assert device.read_tail(log, PAGE)[:4] == b"head"
    assert device.read(file, 0, 4000) == b"file" * 1000
    assert device.read_tail(file, 100) == b"sidecar"
    assert device.raw_files() == [(99, 30)]
    again = device.open_raw(99)
    device.write_staging(again, 30, b"more")
    assert os.pread(again.fd, 100, 0) == b"raw" * 10 + b"more"
    device.drop_staging(again)
    device.free(log)
    device.free(file)
    assert device.used_bytes == 0
    device.close()
    assert keeper.names() == [prefix_of(UUID_) + "label"]


def _hash_at(address: int) -> bytes:
    copy = np.zeros(SEGMENT, np.uint8)
    statuses = np.zeros(1, np.int32)
    digest = np.zeros((1, 16), np.uint8)
    _native.copy_hash(
        np.array([copy.ctypes.data], np.uint64), np.array([address], np.uint64),
        np.array([SEGMENT], np.uint64), digest, statuses, PAGE,
    )  # fmt: skip
    assert not statuses.any()
    return digest.tobytes()


def test_nobody_writes_an_earlier_owners_frame(opened) -> None:
    device = opened()
    make_log(device, 3, 5, b"log" * 1000)
    device.close()
    device = opened()
    segment = device.attach(device.segments()[0])
    with pytest.raises(OSError, match="earlier owner"):
        put(device, segment, b"x")
    with pytest.raises(OSError, match="earlier owner"):
        device.write_tail(segment, PAGE, b"x")
    with pytest.raises(PermissionError):
        _native.Arena(segment.fd, SEGMENT)
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"x", 0)
    device.close()


def test_what_was_never_persisted_or_was_freed_is_not_found(opened, keeper) -> None:
    device = opened()
    device.create(1, 1, TAG)  # a crash before its header is whole
    freed = make_log(device, 2, 2, b"freed")
    device.free(freed)
    again = device.create(3, 3, TAG)
    device.free(make_file(device, 4, 4, b"file" * 100))
    assert again.address
    abandon(device)
    device = opened()
    assert device.segments() == []
    assert device.used_bytes == 0
    assert len(keeper.names(prefix_of(UUID_) + "frame-")) == CAPACITY // SEGMENT  # fresh ones
    device.close()


def test_the_tail_of_a_second_life_ends_where_it_ends(opened) -> None:
    device = opened(capacity_bytes=SEGMENT)
    first = make_log(device, 1, 1, b"x" * SEGMENT)
    device.write_tail(first, 8 * PAGE, b"entries" * 100)
    device.free(first)
    make_log(device, 1, 2, b"second")
    abandon(device)
    device = opened(capacity_bytes=SEGMENT)
    segment = device.attach(SegmentName(1, 2, False, SEGMENT))
    tail = device.read_tail(segment, 8 * PAGE)
    assert tail[: 7 * PAGE] == bytes(7 * PAGE)
    assert tail[7 * PAGE :][:4] == b"head"
    assert device.next_data(segment, 0) == SEGMENT - PAGE
    assert device.next_data(segment, SEGMENT) == SEGMENT
    device.close()


def test_frames_are_made_anew_for_what_is_free(opened) -> None:
    device = opened()
    make_log(device, 1, 1, b"kept")
    device.close()
    device = opened()
    handles = [make_log(device, slot, 9, b"new") for slot in range(2, 9)]
    assert device.used_bytes == CAPACITY
    assert not any(handle.is_fixed for handle in handles)
    assert len(device.segments()) == 8
    abandon(device)
    device = opened()
    assert len(device.segments()) == 8
    device.close()


def test_files_without_a_sidecar_and_strange_names_are_let_go(opened, keeper) -> None:
    device = opened()
    make_file(device, 1, 1, b"file" * 100)
    device.close()
    prefix = prefix_of(UUID_)
    keeper.drop(f"{prefix}sums-00000001-00000001")
    odd = os.memfd_create("odd")
    for name in ("frame-x", "frame-5", "frame-99999999"):
        keeper.keep(prefix + name, odd)
    os.close(odd)
    device = opened()
    assert device.segments() == []
    assert f"{prefix}file-00000001-00000001" not in keeper.names()
    assert f"{prefix}frame-x" not in keeper.names()
    device.close()


def test_memory_of_another_version_or_size_is_not_used(
    opened, keeper, caplog, expected_warnings
) -> None:  # fmt: skip
    expected_warnings.append("starts empty")
    device = opened()
    make_log(device, 1, 1, b"kept")
    device.close()
    newer = Keeper({
        name.replace(prefix_of(UUID_), prefix_of(UUID_, MEMORY_VERSION + 1)): keeper.take(name)
        for name in keeper.names()
    })  # fmt: skip
    device = opened(keeper=newer)
    assert device.segments() == []
    assert f"found kvfs{MEMORY_VERSION + 1}" in caplog.text
    device.close()
    assert not newer.names(prefix_of(UUID_, MEMORY_VERSION + 1))
    newer.close()
    caplog.clear()
    device = opened(capacity_bytes=2 * CAPACITY)
    assert device.segments() == []
    assert "another size" in caplog.text
    device.close()


def test_a_label_that_is_none() -> None:
    fd = os.memfd_create("label")
    with pytest.raises(CorruptionError, match="no label"):
        Label.open(os.dup(fd), 10, SEGMENT, "d")
    os.pwrite(fd, b"KVFSMEM1\x09\0\0\0" + bytes(12), 0)
    with pytest.raises(FormatVersionError, match="version 9"):
        Label.open(fd, 10, SEGMENT, "d")


@pytest.mark.parametrize("cut", [8, 100, 5000])
def test_a_superblock_that_was_cut_leaves_the_one_before(cut) -> None:
    label = Label.create("l", 10, SEGMENT)
    label.write_superblock(b"one" * 2000)
    label.write_superblock(b"two" * 2000)
    start = label._start(2)
    os.pwrite(label.fd, os.urandom(6000 - cut), start + cut)
    again = Label.open(os.dup(label.fd), 10, SEGMENT, "l")
    assert again.superblock == b"one" * 2000
    again.write_superblock(b"three")
    assert Label.open(os.dup(label.fd), 10, SEGMENT, "l").superblock == b"three"
    label.close()
    again.close()


def test_a_keeper_tells_what_it_keeps() -> None:
    told: list[tuple[str, bool]] = []
    keeper = Keeper(tell=lambda name, fd: told.append((name, fd >= 0)))
    fd = os.memfd_create("x")
    keeper.keep("a", fd)
    keeper.drop("a")
    keeper.drop("a")
    keeper.keep("b", fd)
    os.close(fd)
    os.close(keeper.take("b"))
    with pytest.raises(KeyError):
        keeper.take("a")
    keeper.close()
    assert told == [("a", True), ("a", False), ("b", True)]


def test_names_of_memory() -> None:
    assert is_memory(prefix_of(UUID_) + "label")
    assert is_memory("kvfs12.x")
    assert not any(map(is_memory, ("clients", "door", "kvfs", "kvfs1", "kvfsx.y", "kvfs1.")))
