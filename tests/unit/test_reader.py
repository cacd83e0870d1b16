"""The reader: damage becomes a miss, other copies are used first, leases hold segments."""

import numpy as np
import pytest

from kvfs.buffers import addresses_of
from kvfs.engine.log import Batch
from tests.unit.engine_bench import (
    BLOCK,
    SPACE,
    Engine,
    chain,
    content_of,
    disk,
    flip,
)


@pytest.mark.parametrize("sealed", [False, True])
def test_damaged_payload_becomes_a_miss(make, tmp_path, sealed: bool) -> None:
    engine = make(disk(tmp_path))
    keys = engine.fill(1)
    if sealed:
        engine.put(chain(1)[0])
    engine.store.flush()
    flip(engine, keys[4], tmp_path)
    engine = engine.reopen(lambda: disk(tmp_path))
    expected = [i != 4 for i in range(len(keys))]
    assert engine.read(keys) == expected
    assert engine.resident(keys) == expected
    assert engine.counters["checksum_errors"] == 1
    assert engine.put(keys).blocks_stored == 1
    assert all(engine.read(keys))
    engine.close()


def test_damage_is_found_by_a_lease_too(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, _ = chain(3)
    engine.put(keys)
    flip(engine, keys[1], tmp_path)
    engine = engine.reopen(lambda: disk(tmp_path))
    lease = engine.store.lease(SPACE, keys)
    assert (lease.records["length"] > 0).tolist() == [True, False, True]
    engine.store.release(lease)
    engine.store.release(lease)
    engine.close()


def test_put_replaces_a_damaged_copy(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys, _ = chain(3)
    engine.put(keys)
    flip(engine, keys[1], tmp_path)
    engine = engine.reopen(lambda: disk(tmp_path))
    assert engine.put(keys).blocks_stored == 1
    assert all(engine.read(keys))
    engine.close()


@pytest.fixture
def two_copies(make, tmp_path) -> Engine:
    """Three blocks on two devices; the copy of the second on the first device is damaged."""
    first, second = (lambda: disk(tmp_path)), (lambda: disk(tmp_path, index=1, name="dir1"))
    engine = make(first(), second())
    keys, parents = chain(3)
    engine.put(keys)
    buffers = [content_of(key.tobytes()) for key in keys]
    addresses, lengths = addresses_of(buffers, 3)
    batch = Batch(keys, parents, addresses, lengths, np.zeros(3, "<u4"), np.zeros(3, np.uint8))
    engine.store._writer.append(engine.state.devices[1], engine.state.namespaces[SPACE], batch)
    flip(engine, keys[1], tmp_path)
    return engine.reopen(first, second)


def test_another_copy_is_read_first(two_copies: Engine) -> None:
    engine, keys = two_copies, chain(3)[0]
    assert engine.read(keys) == [True] * 3
    assert engine.counters["checksum_errors"] == 1
    assert engine.resident(keys, 0) == [True, False, True]
    assert engine.resident(keys, 1) == [True] * 3
    engine.close()


def test_another_copy_is_leased_first(two_copies: Engine) -> None:
    engine, keys = two_copies, chain(3)[0]
    lease = engine.store.lease(SPACE, keys)
    assert lease.records["device"].tolist() == [0, 1, 0]
    assert (lease.records["length"] == BLOCK).all()
    assert engine.segment_of(keys[1]).leases == 1
    engine.store.release(lease)
    assert all(s.leases == 0 for d in engine.state.devices for s in d.segments.values())
    engine.close()


def test_lease_keeps_a_segment_from_being_freed(make, tmp_path) -> None:
    engine = make(disk(tmp_path))
    keys = engine.fill(1)
    engine.put(chain(1)[0])
    engine.store.flush()
    segment = engine.segment_of(keys[0])
    lease = engine.store.lease(SPACE, keys)
    used = engine.state.devices[0].device.used_bytes
    assert engine.store.drop(SPACE, keys) == len(keys)
    assert not any(engine.resident(keys))
    assert engine.state.devices[0].device.used_bytes == used
    raw = engine.state.devices[0].device.read(segment.handle, 0, BLOCK)
    assert raw == content_of(keys[0].tobytes())
    engine.store.release(lease)
    assert engine.state.devices[0].device.used_bytes < used
    engine.close()
