"""The writer on failing devices: poisoned segments, second tries, devices out of service."""

import errno

import numpy as np
import pytest

from kvfs.devices.wrappers import CountingDevice, Effect, Fault, Verb
from kvfs.errors import (
    DeviceError,
    NoSpaceError,
    UsageError,
)
from tests.unit.engine_bench import (
    chain,
    disk,
    faulty,
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
    assert device.calls["read"] == 0
    engine.put(other)
    assert all(engine.read(kept))
    assert device.calls["read"] == 2
    assert all(engine.read(kept))
    assert device.calls["read"] == 2, "verified once"


def test_failing_device_leaves_service(make, tmp_path) -> None:
    faults = Fault(Verb.WRITE, 2, times=99, operation="write_payloads")
    engine = make(faulty(disk(tmp_path), faults), device_failures_max=2)
    kept, lost = chain(2)[0], chain(1, 100)[0]
    engine.put(kept)
    with pytest.raises(DeviceError, match="write failed"):
        engine.put(lost)
    (figures,) = engine.store.device_statistics()
    assert (figures.state, figures.failures) == ("offline", 2)
    with pytest.raises(UsageError, match="needs a persistent device"):
        engine.put(lost)
    with pytest.raises(NoSpaceError, match="no device in service"):
        engine.put(lost, durability="async")
    assert all(engine.read(kept))
    engine.check()


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
