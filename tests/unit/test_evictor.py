"""Eviction: heads of chains outlive their ends, what is held stays, the capacity holds."""

import numpy as np
import pytest

from kvfs.errors import NoSpaceError
from tests.unit.engine_bench import (
    BLOCK,
    BLOCKS_PER_SEGMENT,
    SPACE,
    Engine,
    chain,
    disk,
    memory,
)


def used_at_most_capacity(engine: Engine) -> None:
    for device in engine.state.devices:
        assert device.device.used_bytes <= device.info.capacity_bytes


def test_full_store_goes_on(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    last = chain(1)[0]
    for i in range(12):
        last = engine.fill(2, start=10_000 * (i + 1))
        used_at_most_capacity(engine)
        engine.check()
    assert all(engine.read(last))
    assert engine.counters["segments_evicted"] > 0
    assert engine.counters["blocks_evicted"] > 0
    engine.close()


def test_least_recently_used_goes_first(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    old, used = engine.fill(2, start=1000), engine.fill(2, start=2000)
    engine.fill(1, start=3000)
    assert all(engine.read(old))
    assert all(engine.read(used))
    for i in range(5):
        engine.fill(1, start=10_000 * (i + 1))
        assert all(engine.read(used))
    assert not all(engine.resident(old))
    assert all(engine.read(used))
    engine.close()


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_heads_of_chains_outlive_their_ends(make, tmp_path, reads: int) -> None:
    engine = make(disk(tmp_path, 8))
    keys, parents = chain(5 * BLOCKS_PER_SEGMENT)
    engine.put(keys, parents)
    for _ in range(reads):
        assert all(engine.read(keys))
    lengths = []
    for i in range(5):
        engine.fill(1, start=10_000 * (i + 1))
        lengths.append(engine.store.match_prefix(SPACE, keys))
        assert sum(engine.resident(keys)) == lengths[-1], "a block without its prefix was kept"
    assert 0 < lengths[-1] < len(keys)
    assert lengths == sorted(lengths, reverse=True)
    engine.close()


def test_descendants_go_with_a_victim_on_every_device(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 6), memory(16))
    keys, parents = chain(4)
    engine.put(keys[:2], parents[:2])
    engine.put(keys[2:], parents[2:], durability="none")
    assert engine.resident(keys, 1) == [True] * 4
    assert engine.resident(keys, 0) == [True, True, False, False]
    records = engine.state.index(SPACE).lookup(keys[:2], 1)
    engine.state.forget(SPACE, records)
    for i in range(8):
        engine.fill(1, start=10_000 * (i + 1))
    assert not any(engine.resident(keys[:1]))
    assert not any(engine.resident(keys)), "descendants outlived their prefix"
    engine.check()


def test_victim_with_another_copy_takes_nothing_along(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 6), memory(32))
    keys, parents = chain(4)
    engine.put(keys, parents)
    for i in range(8):
        engine.fill(1, start=10_000 * (i + 1))
    assert not any(engine.resident(keys, 0))
    assert all(engine.resident(keys, 1))
    assert all(engine.read(keys))
    engine.close()


def test_leased_segments_are_passed_over(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    keys = engine.fill(1, start=1000)
    lease = engine.store.lease(SPACE, keys)
    slot = engine.segment_of(keys[0]).handle.slot
    for i in range(8):
        engine.fill(1, start=10_000 * (i + 1))
    assert slot in engine.state.devices[0].segments
    assert all(engine.read(keys))
    engine.store.release(lease)
    for i in range(8):
        engine.fill(1, start=1_000_000 + 10_000 * i)
    assert not any(engine.resident(keys))
    engine.close()


def test_pinned_blocks_are_carried_along(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    keys, parents = chain(2 * BLOCKS_PER_SEGMENT)
    pinned = keys[:9]
    engine.put(keys, parents)
    held = engine.store.pin(SPACE, pinned)
    for i in range(20):
        engine.fill(1, start=10_000 * (i + 1))
        used_at_most_capacity(engine)
    assert all(engine.read(pinned))
    assert not all(engine.resident(keys))
    assert engine.counters["blocks_relocated"] >= len(pinned)
    engine = engine.reopen(lambda: disk(tmp_path, 8))
    assert all(engine.read(pinned))
    engine.close()
    assert held == len(pinned) * BLOCK


@pytest.fixture
def durable(tmp_path) -> Engine:
    return Engine([disk(tmp_path, 8)], is_durable=True)


def test_named_blocks_of_a_durable_namespace_stay(durable: Engine) -> None:
    named, parents = chain(2 * BLOCKS_PER_SEGMENT)
    durable.put(named, parents)
    durable.names.reached.append(named)
    for i in range(12):
        durable.fill(1, start=10_000 * (i + 1))
    assert all(durable.read(named))
    durable.close()


def test_full_of_durable_blocks_refuses_more(durable: Engine) -> None:
    reached = durable.names.reached

    def put_all() -> None:
        for i in range(20):
            keys = chain(BLOCKS_PER_SEGMENT, 10_000 * (i + 1))[0]
            reached.append(keys)
            durable.put(keys)
            used_at_most_capacity(durable)

    with pytest.raises(NoSpaceError, match="nothing can be evicted: dir0"):
        put_all()
    assert durable.counters["puts_refused"] == 1
    assert all(durable.read(np.concatenate(reached[:-1])))
    reached.clear()
    assert durable.put(chain(3)[0]).blocks_stored == 3
    durable.close()


def test_evicted_blocks_do_not_come_back(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    keys = engine.fill(6, start=1000)
    engine.fill(6, start=10_000)
    before = engine.resident(keys)
    assert not all(before)
    engine = engine.reopen(lambda: disk(tmp_path, 8))
    assert engine.resident(keys) == before
    engine.close()


def test_crash_after_eviction_brings_back_nothing_wrong(make, tmp_path) -> None:
    engine = make(disk(tmp_path, 8))
    for i in range(6):
        last = engine.fill(2, start=10_000 * (i + 1))
    engine = engine.reopen(lambda: disk(tmp_path, 8), crash=True)
    assert all(engine.read(last))
    for i in range(6):
        engine.fill(2, start=1_000_000 + 10_000 * i)
    engine.close()
