"""What must always hold between an engine's tables, its index and its devices."""

import numpy as np

from kvfs.engine.device_state import DeviceState
from kvfs.engine.format import ENTRY_BYTES, HEADERS_BYTES
from kvfs.engine.segment_table import (
    SegmentState,
    SegmentStatus,
    group_by_segment,
    page_round,
)
from kvfs.engine.state import EngineState
from kvfs.units import PAGE


def check_engine(state: EngineState) -> None:
    """Check every invariant of tables and indexes. REQUIRES: nothing else is running."""
    with state.lock:
        for device in state.devices:
            for slot, segment in device.segments.items():
                assert segment.handle.slot == slot
                assert segment.handle.device_index == device.info.index
                _check_segment(segment)
            _check_logs(device)
            assert device.device.used_bytes <= device.info.capacity_bytes
            assert device.device.used_bytes >= sum(
                segment.handle.nbytes for segment in device.segments.values()
            )
            assert not device.claimed
        _check_indexes(state)
        assert all(count > 0 for count in state.pins.values())
        assert all(nbytes >= 0 for nbytes in state.pinned_bytes.values())


def _check_segment(segment: SegmentState) -> None:
    count = segment.entry_count
    assert segment.persisted_count <= count
    assert not segment.live[count:].any()
    live = segment.live_indices()
    entries = segment.entries[live]
    assert segment.live_count == len(live)
    assert segment.live_bytes == int(page_round(entries["stored_bytes"]).sum())
    starts = entries["offset"].astype(np.int64)
    ends = starts + page_round(entries["stored_bytes"])
    order = np.argsort(starts)
    assert (starts[order][1:] >= ends[order][:-1]).all(), "live extents overlap"
    assert not (starts % PAGE).any()
    if len(live):
        limit = segment.handle.nbytes
        if segment.handle.is_file:
            assert int((starts + entries["stored_bytes"].astype(np.int64)).max()) <= limit
        else:
            assert int(ends.max()) <= segment.payload_end
            assert segment.payload_end <= limit - HEADERS_BYTES - count * ENTRY_BYTES
    assert segment.leases >= 0
    if segment.status is SegmentStatus.DRAINING:
        assert segment.leases > 0, "a drained segment was not given back"
        assert not len(live), "blocks of a drained segment can be found"


def _check_logs(device: DeviceState) -> None:
    for namespace_id, log in device.logs.items():
        segment = log.state
        assert segment.namespace_id == namespace_id
        assert segment.status is SegmentStatus.OPEN
        assert not segment.is_poisoned
        assert device.segments[segment.handle.slot] is segment
    writable = {id(log.state) for log in [*device.full, *device.logs.values()]}
    for segment in device.segments.values():
        if segment.status is SegmentStatus.OPEN:
            assert id(segment) in writable, "an open segment has no log"


def _check_indexes(state: EngineState) -> None:
    """Every live entry has one record and every record one live entry."""
    recorded = 0
    for namespace_id, index in state.indexes.items():
        records = index.snapshot()
        recorded += len(records)
        assert len(records) == len(index)
        for device, slot, generation, positions in group_by_segment(records):
            segment = state.segment_of(device, slot, generation)
            assert segment is not None, "a record names a segment that is gone"
            assert segment.namespace_id == namespace_id
            found = records[positions]
            assert segment.live[found["entry"]].all(), "a record names a dead entry"
            entries = segment.entries[found["entry"]]
            assert (entries["key"] == found["key"]).all()
            assert (entries["offset"] == found["page"].astype(np.uint64) * PAGE).all()
            assert (entries["stored_bytes"] == found["length"]).all()
            assert len(np.unique(found["entry"])) == len(found), "two records for one entry"
    live = sum(
        segment.live_count for device in state.devices for segment in device.segments.values()
    )
    assert live == recorded, f"{live} live entries, {recorded} records"
