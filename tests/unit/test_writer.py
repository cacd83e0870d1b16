"""The writer on failing devices: poisoned segments, second tries, devices out of service."""

import errno
import mmap

import numpy as np
import pytest

from kvfs.buffers import addresses_of
from kvfs.devices.wrappers import CountingDevice, Effect, Fault, Verb
from kvfs.durability import Durability
from kvfs.errors import (
    DeviceError,
    PoisonedError,
    UnavailableError,
    UsageError,
)
from tests.unit.engine_bench import (
    BLOCK,
    SPACE,
    chain,
    disk,
    faulty,
    memory,
)


def test_failed_write_is_tried_again_on_a_fresh_segment(make, tmp_path) -> None:
    device = faulty(disk(tmp_path), Fault(Verb.WRITE, 2, operation="write_payloads"))
    engine = make(device)
    first, second = chain(4)[0], chain(4, 100)[0]
    engine.put(first)
    engine.put(second)
    assert engine.counters["segments_poisoned"] == engine.counters["write_errors"] == 1
    poisoned = engine.segment_of(first[0])
    assert poisoned.is_poisoned
    assert poisoned.needs_verify
    assert engine.segment_of(second[0]) is not poisoned
    assert all(engine.read(first))
    assert all(engine.read(second))
    assert engine.store.device_statistics()[0].state == "degraded"
    engine.check()
    engine = engine.reopen(lambda: disk(tmp_path))
    assert all(engine.read(np.concatenate([first, second])))
    engine.close()


def test_unpersisted_blocks_of_a_poisoned_segment_are_dropped(make, tmp_path) -> None:
    device = faulty(disk(tmp_path), Fault(Verb.WRITE, 3, operation="write_payloads"))
    engine = make(device)
    kept, lost, late = chain(2)[0], chain(3, 100)[0], chain(1, 200)[0]
    engine.put(kept)
    engine.put(lost, durability="async")
    engine.put(late)
    assert engine.resident(kept) == [True, True]
    assert engine.resident(lost) == [False] * 3
    assert engine.resident(late) == [True]
    engine.close()


def test_failed_persist_is_reported_and_what_it_covered_dropped(make, tmp_path) -> None:
    # A segment's start persists once, each sync put once more.
    device = faulty(disk(tmp_path), Fault(Verb.PERSIST, 3, operation="persist"))
    engine = make(device)
    kept, lost = chain(2)[0], chain(3, 100)[0]
    engine.put(kept)
    with pytest.raises(DeviceError, match="persist failed: dir0 segment 0"):
        engine.put(lost)
    assert device.injected[Effect.FAIL] == 1
    assert engine.resident(lost) == [False] * 3
    assert all(engine.read(kept))
    engine.put(lost)
    assert all(engine.read(lost))
    assert not engine.segment_of(lost[0]).is_poisoned
    engine.check()
    engine = engine.reopen(lambda: disk(tmp_path))
    assert all(engine.read(np.concatenate([kept, lost])))
    engine.close()


def test_persisted_blocks_of_a_poisoned_segment_come_from_the_medium(make, tmp_path) -> None:
    device = CountingDevice(disk(tmp_path))
    engine = make(faulty(device, Fault(Verb.WRITE, 2, operation="write_payloads")))
    kept, other = chain(2)[0], chain(1, 100)[0]
    engine.put(kept)
    assert device.calls["read_payloads"] == 0
    engine.put(other)
    assert all(engine.read(kept))
    assert device.calls["read_payloads"] == 2, "a batch verifies, a batch reads"
    assert all(engine.read(kept))
    assert device.calls["read_payloads"] == 3, "verified once"


@pytest.mark.parametrize("durability", ["none", "async", "sync"])
def test_memory_that_cannot_be_read_is_its_callers_alone(make, tmp_path, durability) -> None:
    engine = make(disk(tmp_path), memory(), device_failures_max=1)
    others, keys = chain(2)[0], chain(3, 100)[0]
    engine.put(others, durability=durability)
    with (tmp_path / "truncated").open("w+b") as file:
        file.truncate(BLOCK)
        mapped = mmap.mmap(file.fileno(), BLOCK)
        file.truncate(0)
    buffers = [bytes(BLOCK), mapped, bytes(BLOCK)]
    for _ in range(2):
        with pytest.raises(UsageError, match="cannot be read: block 1 of 3: 4096 bytes at 0x"):
            engine.store.put(SPACE, keys, *addresses_of(buffers, 3),
                             durability=Durability(durability))  # fmt: skip
    assert engine.resident(keys) == [False] * 3
    assert all(engine.read(others))
    assert engine.counters["write_errors"] == engine.counters["segments_poisoned"] == 0
    assert [figures.state for figures in engine.store.device_statistics()] == ["online"] * 2
    engine.put(keys)
    engine = engine.reopen(lambda: disk(tmp_path), memory)
    assert all(engine.read(keys))
    engine.close()


def test_address_zero_is_its_callers_fault(make, tmp_path) -> None:
    engine = make(disk(tmp_path), device_failures_max=1)
    keys = chain(2)[0]
    addresses, lengths = addresses_of([bytes(BLOCK), (0, BLOCK)], 2)
    with pytest.raises(UsageError, match="cannot be read: block 1 of 2: 4096 bytes at 0x0"):
        engine.store.put(SPACE, keys, addresses, lengths)
    assert engine.counters["write_errors"] == 0
    engine.put(keys)
    engine.close()


def test_failing_device_leaves_service(make, tmp_path) -> None:
    faults = Fault(Verb.WRITE, 2, times=99, operation="write_payloads")
    engine = make(faulty(disk(tmp_path), faults), device_failures_max=2)
    kept, lost = chain(2)[0], chain(1, 100)[0]
    engine.put(kept)
    with pytest.raises(DeviceError, match="write failed"):
        engine.put(lost)
    (figures,) = engine.store.device_statistics()
    assert (figures.state, figures.failures) == ("offline", 2)
    for durability in ("sync", "async", "none"):
        with pytest.raises(UnavailableError, match="no device in service takes blocks"):
            engine.put(lost, durability=durability)
    assert engine.counters["puts_refused"] == 4
    assert all(engine.read(kept))
    engine.check()


def test_memory_takes_no_blocks_that_must_last(make, tmp_path) -> None:
    faults = Fault(Verb.WRITE, 2, times=99, operation="write_payloads")
    engine = make(faulty(disk(tmp_path), faults), memory(), device_failures_max=2)
    kept, lost, quick = chain(2)[0], chain(1, 100)[0], chain(1, 200)[0]
    engine.put(kept)
    with pytest.raises(DeviceError, match="write failed"):
        engine.put(lost)
    for durability in ("sync", "async"):
        with pytest.raises(UnavailableError, match=f"with durability '{durability}'"):
            engine.put(lost, durability=durability)
    assert not any(engine.resident(lost))
    assert engine.put(quick, durability="none").blocks_stored == 1
    assert all(engine.read(kept))
    engine = engine.reopen(lambda: disk(tmp_path), lambda: memory())
    assert engine.resident(kept) == [True, True]
    assert engine.put(lost).blocks_stored == 1
    engine.close()


@pytest.mark.parametrize("is_there", [False, True], ids=["written", "found"])
def test_sync_hears_of_a_failed_persist_whose_segment_is_gone(make, tmp_path, is_there) -> None:
    device = faulty(disk(tmp_path), Fault(Verb.PERSIST, 2, operation="persist"))
    engine = make(device)
    lost = chain(3, 100)[0]
    if is_there:
        engine.put(lost, durability="async")
    writer = engine.store._writer
    persist_holding = writer.persist_holding

    def late(runs) -> None:
        with pytest.raises(DeviceError):
            engine.store.flush()  # as the background does
        engine.store.drop(SPACE, chain(1, 500)[0])  # as anybody may; frees what is empty
        assert engine.state.devices[0].segments == {}
        writer.persist_holding = persist_holding
        persist_holding(runs)

    writer.persist_holding = late
    with pytest.raises(PoisonedError, match="a persist failed meanwhile: dir0 segment 0"):
        engine.put(lost)
    assert engine.resident(lost) == [False] * 3
    assert engine.put(lost).blocks_stored == 3
    engine.close()


def test_other_length_is_refused(make, tmp_path) -> None:
    engine = make(disk(tmp_path), memory())
    keys = chain(3)[0]
    engine.put(keys[:1], nbytes=100, durability="none")
    for durability in ("none", "async", "sync"):
        with pytest.raises(UsageError, match=r"another length: .*: 100 bytes, 4096 given"):
            engine.put(keys, durability=durability)
    assert engine.resident(keys) == [True, False, False]
    assert engine.put(keys[:1], nbytes=100).blocks_stored == 1
    engine.close()


def test_segment_freed_while_its_blocks_are_verified(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys = chain(2)[0]
    engine.put(keys)
    engine = engine.reopen(lambda: disk(tmp_path), crash=True)
    segment = engine.segment_of(keys[0])
    assert segment.needs_verify
    state, reader = engine.state, engine.store.reader
    verify = reader._verify_part

    def evicted(part, records):
        reader._verify_part = verify
        state.devices[0].logs.clear()
        state.forget(SPACE, segment.records(segment.live_indices()))
        with state.lock:
            state.devices[0].discard(segment)
        return verify(part, records)

    reader._verify_part = evicted
    assert engine.put(keys).blocks_deduplicated == 2
    assert segment.handle.slot not in state.devices[0].segments
    assert engine.put(keys).blocks_stored == 2
    engine.close()


def test_other_device_takes_over(make, tmp_path) -> None:
    broken = faulty(disk(tmp_path), Fault(Verb.WRITE, times=99, operation="write_payloads"))
    engine = make(broken, disk(tmp_path, index=1, name="dir1"))
    keys, _ = chain(4)
    engine.put(keys)
    assert engine.resident(keys, 0) == [False] * 4
    assert engine.resident(keys, 1) == [True] * 4
    assert all(engine.read(keys))
    engine.close()


def test_segment_that_cannot_be_made(make, tmp_path) -> None:
    device = faulty(disk(tmp_path), Fault(Verb.CREATE, code=errno.EIO))
    engine = make(device)
    keys, _ = chain(2)
    with pytest.raises(DeviceError, match="no segment could be opened: dir0"):
        engine.put(keys)
    assert engine.state.devices[0].segments == {}
    engine.put(keys)
    assert all(engine.read(keys))
    engine.close()


def test_failed_seal_keeps_what_was_persisted(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys = engine.fill(1)
    engine.put(chain(1)[0])
    device = engine.state.devices[0]
    device.device = faulty(device.device, Fault(Verb.WRITE, operation="write_tail"))
    device.full[0].device = device.device
    with pytest.raises(DeviceError, match="seal failed"):
        engine.store.flush()
    assert all(engine.read(keys))
    engine.check()
    engine = engine.reopen(lambda: disk(tmp_path))
    assert all(engine.read(keys))
    engine.close()


def test_lost_writes_are_found_out(make, tmp_path) -> None:
    """A device that lies leaves entries without payloads: misses after a crash, never garbage."""
    lie = Fault(Verb.WRITE, 2, Effect.LIE, operation="write_payloads")
    engine = make(faulty(disk(tmp_path), lie))
    kept, lost = chain(2)[0], chain(3, 100)[0]
    engine.put(kept)
    engine.put(lost)
    engine = engine.reopen(lambda: disk(tmp_path), crash=True)
    assert engine.resident(lost) == [True] * 3
    assert engine.read(lost) == [False] * 3
    assert all(engine.read(kept))
    assert engine.counters["checksum_errors"] == 3
    assert engine.resident(lost) == [False] * 3
    engine.close()
