"""Segments that a device cannot free or write again, and leases that outlive a pool."""

from pathlib import Path

import numpy as np
import pytest

from kvfs.devices.wrappers import Fault, Verb
from kvfs.errors import DeviceError, UnavailableError
from tests.unit.engine_bench import BLOCKS_PER_SEGMENT, SPACE, chain, disk, faulty
from tests.unit.small_pools import BLOCK_TOKENS, payloads, small_namespace, small_pool

STUCK = "segment cannot be freed: dir0"


def test_a_device_that_frees_nothing_loses_one_segment(
    make, tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append(STUCK)
    device = faulty(disk(tmp_path, 8), Fault(Verb.FREE, times=99, operation="free"))
    engine = make(device, device_failures_max=3)
    keys = engine.fill(7)
    fresh = chain(1, 100)[0]
    for _ in range(3):
        with pytest.raises(DeviceError, match="no room can be made: dir0 cannot free segments"):
            engine.put(fresh)
        assert sum(engine.resident(keys)) == 6 * BLOCKS_PER_SEGMENT
    with pytest.raises(UnavailableError, match="no device in service"):
        engine.put(fresh)
    assert engine.store.device_statistics()[0].state == "offline"
    assert sum(engine.read(keys)) == 6 * BLOCKS_PER_SEGMENT


def test_what_could_not_be_freed_is_freed_later(
    make, tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append(STUCK)
    engine = make(faulty(disk(tmp_path, 8), Fault(Verb.FREE, operation="free")))
    keys = engine.fill(7)
    fresh = chain(1, 100)[0]
    with pytest.raises(DeviceError):
        engine.put(fresh)
    engine.put(fresh)
    assert engine.counters["segments_evicted"] == 1
    assert sum(engine.resident(keys)) == 6 * BLOCKS_PER_SEGMENT
    engine.close()


def test_another_device_takes_what_finds_no_room(
    make, tmp_path: Path, expected_warnings: list[str]
) -> None:
    expected_warnings.append(STUCK)
    broken = faulty(disk(tmp_path, 8), Fault(Verb.FREE, times=99, operation="free"))
    engine = make(broken, disk(tmp_path, 8, index=1, name="dir1"))
    engine.fill(7)
    fresh = chain(3, 100)[0]
    engine.put(fresh)
    assert engine.resident(fresh, 1) == [True] * 3


@pytest.mark.parametrize(
    "fault",
    [Fault(Verb.PERSIST, operation="persist"), Fault(Verb.WRITE, operation="write_tail")],
    ids=["persist", "write"],
)
def test_a_segment_that_cannot_be_written_again_is_kept_for_reading(
    make, tmp_path: Path, fault: Fault
) -> None:
    engine = make(disk(tmp_path))
    keys = chain(3)[0]
    engine.put(keys)
    engine = engine.reopen(lambda: faulty(disk(tmp_path), fault), crash=True)
    [problem] = engine.report.problems
    assert problem.startswith("segment cannot be written: dir0 segment 0 generation 1: ")
    assert engine.segment_of(keys[0]).is_poisoned
    assert all(engine.read(keys))
    assert engine.put(keys).blocks_stored == 3, "nobody knows whether the entries are durable"
    assert not engine.segment_of(keys[0]).is_poisoned
    engine.check()
    engine = engine.reopen(lambda: disk(tmp_path), crash=True)
    assert engine.report.problems == []
    assert all(engine.read(keys))
    engine.close()


def test_a_view_outlives_pool_and_namespace(tmp_path: Path) -> None:
    with small_pool(tmp_path, dram=True) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(np.arange(2 * BLOCK_TOKENS))
        space.put(keys, payloads(2))
        view = space.view(keys)
        pool.drop_namespace("n")
    assert bytes(view.numpy()[:8]) == payloads(2).tobytes()[:8]
    view.close()


@pytest.mark.parametrize(
    "fault",
    [Fault(Verb.WRITE, 3, operation="write_superblock"), Fault(Verb.FREE, operation="free")],
    ids=["superblock", "free"],
)
def test_a_namespace_goes_whatever_a_device_does(
    make, tmp_path: Path, expected_warnings: list[str], fault: Fault
) -> None:
    expected_warnings.append(STUCK)
    made = disk(tmp_path)
    engine = make(faulty(made, fault), disk(tmp_path, index=1, name="dir1"))
    engine.put(chain(2)[0])
    engine.put(chain(2, 100)[0], durability="none")
    with pytest.raises(DeviceError, match="namespace is gone, but not all it left"):
        engine.store.destroy_namespace(SPACE)
    assert SPACE not in engine.state.namespaces
    assert SPACE not in engine.state.indexes
    is_left = fault.verb is Verb.FREE
    assert len(made.segments()) == is_left
    engine.store.close()
