"""The store: deduplication, durability, pins, figures, closing."""

from functools import partial

import numpy as np
import pytest

from kvfs.devices.wrappers import CountingDevice
from kvfs.engine import device_state, recovery
from kvfs.errors import (
    BusyError,
    ClosedError,
    DeviceError,
    NotFoundError,
    UsageError,
)
from tests.unit.engine_bench import (
    BLOCK,
    BLOCKS_PER_SEGMENT,
    SPACE,
    chain,
    disk,
    memory,
)


def test_put_and_read(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, parents = chain(20)
    result = engine.put(keys, parents)
    assert (result.blocks_stored, result.blocks_deduplicated) == (20, 0)
    assert (result.bytes_stored, result.bytes_deduplicated) == (20 * BLOCK, 0)
    assert engine.store.match_prefix(SPACE, keys) == 20
    assert all(engine.read(keys))
    assert not any(engine.read(chain(3, 500)[0]))
    engine.close()


def test_present_blocks_are_not_written_again(make, tmp_path) -> None:
    device = CountingDevice(disk(tmp_path))
    engine = make(device)
    keys, parents = chain(10)
    engine.put(keys[:6], parents[:6])
    result = engine.put(keys, parents)
    assert (result.blocks_stored, result.blocks_deduplicated) == (4, 6)
    assert device.nbytes["write_payloads"] == 10 * BLOCK
    again = engine.put(np.concatenate([keys, keys]))
    assert (again.blocks_stored, again.blocks_deduplicated) == (0, 20)
    twice = engine.put(np.concatenate([chain(2, 900)[0]] * 2))
    assert (twice.blocks_stored, twice.blocks_deduplicated) == (2, 2)
    assert device.nbytes["write_payloads"] == 12 * BLOCK
    assert engine.counters["blocks_deduplicated"] == 28
    engine.close()


@pytest.mark.parametrize(
    ("durability", "homes"),
    [("none", (False, True)), ("async", (True, True)), ("sync", (True, True))],
)
def test_where_blocks_go(make, tmp_path, durability: str, homes: tuple[bool, bool]) -> None:
    engine = make(disk(tmp_path), memory())
    keys, _ = chain(3)
    engine.put(keys, durability=durability)
    assert (all(engine.resident(keys, 0)), all(engine.resident(keys, 1))) == homes
    engine.store.flush()
    assert not engine.store.has_unsynced
    assert all(engine.read(keys))
    engine.close()


def test_no_extra_copy_where_none_is_wanted(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory(), copy_to_dram=False)
    keys, _ = chain(3)
    engine.put(keys)
    assert engine.resident(keys, 1) == [False] * 3


def test_none_becomes_persistent_when_asked_for(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory())
    keys, _ = chain(3)
    engine.put(keys, durability="none")
    result = engine.put(keys, durability="sync")
    assert result.blocks_stored == 3
    assert all(engine.resident(keys, 0))
    engine = engine.reopen(lambda: disk(tmp_path), lambda: memory(), crash=True)
    assert all(engine.read(keys))
    engine.close()


def test_sync_persists_what_async_left(make, tmp_path) -> None:
    device = CountingDevice(disk(tmp_path))
    engine = make(device)
    keys, _ = chain(3)
    engine.put(keys, durability="async")
    assert engine.store.has_unsynced
    before = device.calls["persist"]
    assert engine.put(keys, durability="sync").blocks_stored == 0
    assert device.calls["persist"] == before + 1
    assert not engine.store.has_unsynced
    engine.put(keys, durability="sync")
    assert device.calls["persist"] == before + 1


def test_volatile_store_refuses_sync(make) -> None:
    engine = make(memory())
    keys, _ = chain(2)
    with pytest.raises(UsageError, match="needs a persistent device"):
        engine.put(keys, durability="sync")
    for durability in ("none", "async"):
        engine.put(keys, durability=durability)
    assert all(engine.read(keys))
    engine.close()


def test_wrong_batches_are_refused(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, parents = chain(2)
    with pytest.raises(UsageError, match="expected 1 to 4096 bytes, found 4097"):
        engine.put(keys, nbytes=BLOCK + 1)
    with pytest.raises(UsageError, match="found 0 to 0"):
        engine.put(keys, nbytes=0)
    with pytest.raises(UsageError, match="2 keys need as many parents"):
        engine.put(keys, parents[:1])
    with pytest.raises(NotFoundError, match="no such namespace"):
        engine.store.lookup(99, keys)
    engine.close()
    for operation in (engine.put, engine.read):
        with pytest.raises(ClosedError):
            operation(keys)


def test_partial_blocks(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, _ = chain(3)
    engine.put(keys, nbytes=100)
    assert all(engine.read(keys, nbytes=100))
    assert engine.read(keys, nbytes=99) == [False] * 3  # no room for it: a miss
    assert all(engine.read(keys, nbytes=100))
    engine.close()


def test_reopened_segment_takes_more(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, parents = chain(20)
    engine.put(keys[:5], parents[:5])
    engine = engine.reopen(lambda: disk(tmp_path))
    assert (engine.report.segments, engine.report.unsealed, engine.report.blocks) == (1, 1, 5)
    engine.put(keys[5:8], parents[5:8])
    assert len(engine.state.devices[0].segments) == 1
    engine.put(keys[8:], parents[8:])
    assert all(engine.read(keys))
    engine.close()


def test_full_segments_are_sealed(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys = engine.fill(3)
    engine.put(chain(1)[0])
    engine.store.flush()
    states = sorted(s.status.value for s in engine.state.devices[0].segments.values())
    assert states == ["open", "sealed", "sealed", "sealed"]
    engine = engine.reopen(lambda: disk(tmp_path))
    assert engine.report.unsealed == 1
    assert all(engine.read(keys))
    engine.close()


def test_drop(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory())
    keys, _ = chain(5)
    engine.put(keys)
    assert engine.store.drop(SPACE, keys[:2]) == 4
    assert engine.store.drop(SPACE, keys[:2]) == 0
    assert engine.resident(keys) == [False, False, True, True, True]
    engine.close()


def test_pins_are_counted_and_bounded(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 4), pinned_share=0.25)
    keys, _ = chain(17)
    held = engine.store.pin(SPACE, keys[:8])
    again = engine.store.pin(SPACE, keys[:8])
    assert engine.state.pinned_bytes[SPACE] == 8 * BLOCK
    rest = engine.store.pin(SPACE, keys[:16])
    with pytest.raises(BusyError, match="at most 65536 bytes may be held"):
        engine.store.pin(SPACE, keys)
    for nbytes, part in ((held, 8), (again, 8), (rest, 16)):
        engine.store.unpin(SPACE, keys[:part], nbytes)
    assert engine.state.pins == {}
    assert engine.state.pinned_bytes[SPACE] == 0
    engine.close()


def test_destroyed_namespace_frees_its_segments(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory())
    engine.fill(2)
    engine.store.destroy_namespace(SPACE)
    assert [figures.segment_count for figures in engine.store.device_statistics()] == [0, 0]
    assert engine.state.devices[0].device.used_bytes == 0
    engine.close()


def test_capacity_is_counted_in_whole_segments(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    engine.fill(2)
    (figures,) = engine.store.device_statistics()
    assert (figures.segment_count, figures.block_count) == (2, 2 * BLOCKS_PER_SEGMENT)
    assert figures.used_bytes == 2 * figures.segment_bytes
    assert figures.live_bytes == 2 * BLOCKS_PER_SEGMENT * BLOCK
    assert (figures.state, figures.is_persistent, figures.tier) == ("online", True, 2)


def test_every_device_is_closed_whatever_one_does(make, tmp_path, monkeypatch) -> None:
    devices = [disk(tmp_path), disk(tmp_path, index=1, name="dir1"), memory(index=2)]
    engine = make(*devices)
    closed = [0, 0, 0]

    def surprise(data: bytes) -> None:
        raise ValueError("first")

    def close(index: int, really) -> None:
        closed[index] += 1
        really()
        if index == 0:
            raise OSError("second")

    monkeypatch.setattr(devices[0], "write_superblock", surprise)
    for index, device in enumerate(devices):
        monkeypatch.setattr(device, "close", partial(close, index, device.close))
    with pytest.raises(ValueError, match="first"):
        engine.store.close()
    assert closed == [1, 1, 1]
    engine.store.close()  # idempotent
    assert closed == [1, 1, 1]


def test_generations_are_reserved_ahead(make, tmp_path, monkeypatch) -> None:
    """A claim, made under the engine's lock, never waits for the medium."""
    monkeypatch.setattr(device_state, "GENERATIONS_RESERVED", 4)
    monkeypatch.setattr(recovery, "GENERATIONS_RESERVED", 4)
    engine = make(disk(tmp_path, 32))
    device = engine.state.devices[0]
    claim, write = device.claim, device.device.write_superblock
    held, limits = [], []

    def claiming() -> tuple[int, int]:
        held.append(True)
        try:
            limits.append(device.superblock.generation_limit)
            return claim()
        finally:
            held.pop()

    def writing(data: bytes) -> None:
        assert not held
        write(data)

    monkeypatch.setattr(device, "claim", claiming)
    monkeypatch.setattr(device.device, "write_superblock", writing)
    for start in range(20):
        keys, parents = chain(BLOCKS_PER_SEGMENT, start * 1000)
        engine.put(keys, parents)
    assert len(limits) >= 20
    assert limits[-1] > limits[0] + 8
    assert all(s.handle.generation < limits[-1] for s in device.segments.values())


def test_no_generation_is_used_that_was_not_reserved(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    device = engine.state.devices[0]
    device._next_generation = device.superblock.generation_limit
    with pytest.raises(DeviceError, match="no generation in reserve"):
        engine.put(chain(1)[0])
    assert device.failures == 1
