"""The state that writer, reader and evictor of one pool share.

Layer: L3.

- `lock` guards the tables of all devices, the writing side of all indexes, pins and counters. It
  is held for book-keeping only, never while payload bytes move.
- Publishing and forgetting go through `publish` and `forget`, which keep index and segment tables
  in step.
"""

import dataclasses
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvfs.clock import Clock
from kvfs.config import PoolOptions
from kvfs.engine.activity import Activity
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.holds import Holds
from kvfs.engine.index import VERIFIED, BlockIndex, RecordArray
from kvfs.engine.segment_table import (
    SegmentState,
    SegmentStatus,
    group_by_segment,
    page_round,
)
from kvfs.errors import NotFoundError
from kvfs.keys import KeyArray
from kvfs.metrics import Counters
from kvfs.units import PAGE


class Names(Protocol):
    """What eviction must know of the catalog."""

    def reachable_keys(self, namespace_id: int) -> Iterable[KeyArray]:
        """Yield the keys that a name of the namespace reaches."""

    def forget_files(self, lost: KeyArray) -> list[KeyArray]:
        """Remove the names of files that need one of these keys; return all keys of each.

        Durability: flush.
        """


@dataclasses.dataclass(slots=True, eq=False)
class EngineState:
    """Everything an open pool knows. Fields are guarded by `lock` unless constant."""

    pool_uuid: uuid.UUID
    devices: list[DeviceState]
    names: Names
    options: PoolOptions
    clock: Clock
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)
    counters: Counters = dataclasses.field(init=False)
    indexes: dict[int, BlockIndex] = dataclasses.field(default_factory=dict)
    namespaces: dict[int, NamespaceSpec] = dataclasses.field(default_factory=dict)
    pins: dict[bytes, int] = dataclasses.field(default_factory=dict)
    pinned_bytes: dict[int, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_index = {device.info.index: device for device in self.devices}
        self.holds = Holds(self.options.client_timeout_s, self.options.client_share)
        for device in self.devices:
            device.failures_max = self.options.device_failures_max
            device.is_held, device.note_freed = self.holds.is_held, self.holds.note_freed
        self.activity = Activity(self.lock, self.clock)
        self.counters = Counters(max(self._by_index, default=0) + 1)

    _by_index: dict[int, DeviceState] = dataclasses.field(init=False)
    activity: Activity = dataclasses.field(init=False)
    holds: Holds = dataclasses.field(init=False)
    unpinned: list[KeyArray] | None = None  # during a round of eviction: what it must still hold
    on_pressure: Callable[[], None] | None = None
    """Called by eviction, without the engine's lock, when leases may be what keeps it from freeing:
    gives back leases that can be taken again later."""

    def device(self, index: int) -> DeviceState:
        """Return the device with this number."""
        return self._by_index[index]

    def ranks(self) -> list[int]:
        """Return the tier of each device number, for the index."""
        ranks = [255] * (max(self._by_index) + 1)
        for index, device in self._by_index.items():
            ranks[index] = device.info.tier
        return ranks

    def add_namespace(self, namespace: NamespaceSpec) -> None:
        """Make a namespace known; replacing a spec keeps its blocks."""
        with self.lock:
            self.namespaces[namespace.namespace_id] = namespace
            self.counters.begin(namespace.namespace_id)
            if namespace.namespace_id not in self.indexes:
                self.indexes[namespace.namespace_id] = BlockIndex(self.ranks())

    def index(self, namespace_id: int) -> BlockIndex:
        """Return the index of a namespace."""
        try:
            return self.indexes[namespace_id]
        except KeyError:
            raise NotFoundError(f"no such namespace: {namespace_id:#018x}") from None

    def tiers(self, *, persistent: bool) -> list[DeviceState]:
        """Return the devices in service of one durability, fastest tier first."""
        chosen = [
            device
            for device in self.devices
            if device.info.is_persistent == persistent and not device.is_offline
        ]
        return sorted(chosen, key=lambda device: (device.info.tier, device.info.index))

    def lasting_tiers(self) -> list[DeviceState]:
        """Return the devices in service for what must last, fastest tier first.

        Volatile ones only in a pool that has no others: one whose disks are out of service promises
        nothing rather than what memory cannot keep.
        """
        return self.tiers(persistent=any(device.info.is_persistent for device in self.devices))

    def segment_of(self, device: int, slot: int, generation: int) -> SegmentState | None:
        """Return the segment that records of this place mean, or None if it is gone."""
        return self._by_index[device].state_of(slot, generation)

    def note_faults(self, records: RecordArray) -> None:
        """Tell devices of memory that could not be read, where the segment is there still."""
        for device, slot, generation, positions in group_by_segment(records):
            segment = self.segment_of(device, slot, generation)
            if segment is None:
                continue
            for record in records[positions]:
                start, nbytes = int(record["page"]) * PAGE, int(record["length"])
                self._by_index[device].device.note_bad(segment.handle, start, nbytes)

    def segment_at(self, device: int, slot: int) -> SegmentState | None:
        """Return what lies in a slot now; None for nothing, and for numbers that are none."""
        found = self._by_index.get(device)
        return None if found is None else found.segments.get(slot)

    def publish(
        self, segment: SegmentState, indices: npt.NDArray[np.integer], *, verified: bool
    ) -> RecordArray:
        """Make entries of a segment findable. Older copies on the same device become dead.

        The indices ascend.
        """
        records = segment.records(indices, flags=VERIFIED if verified else 0)
        with self.lock:
            index = self.index(segment.namespace_id)
            segment.mark_live(indices, self.clock.monotonic_ns())
            self.mark_dead(index.insert(records))
        return records

    def forget(self, namespace_id: int, records: RecordArray) -> int:
        """Remove exactly these copies from index and tables; return how many were there."""
        hits = records[records["length"] > 0]
        if not len(hits):
            return 0
        with self.lock:
            removed = self.index(namespace_id).remove(hits)
            self.mark_dead(hits)
        return removed

    def hold(self, records: RecordArray) -> list[tuple[SegmentState, npt.NDArray[np.int64]]]:
        """Lease the segments of these copies; return each with the entries in it.

        What is gone becomes a miss, and so does what a failed persist may have lost.
        """
        held = []
        with self.lock:
            for device, slot, generation, positions in group_by_segment(records):
                segment = self.segment_of(device, slot, generation)
                if segment is None or segment.status is SegmentStatus.DRAINING:
                    records["length"][positions] = 0
                    continue
                entries = records["entry"][positions].astype(np.int64)
                if segment.is_poisoned:
                    is_safe = entries < segment.persisted_count
                    records["length"][positions[~is_safe]] = 0
                    entries = entries[is_safe]
                segment.leases += 1
                held.append((segment, entries))
        return held

    def release(self, segment: SegmentState) -> bool:
        """Give back one lease; a segment that waited for it, or has become empty, is freed.

        False if the device cannot free it.
        """
        with self.lock:
            segment.leases -= 1
            if segment.leases == 0 and (
                segment.status is SegmentStatus.DRAINING
                or (segment.status is SegmentStatus.SEALED and not segment.live_count)
            ):
                return self.device(segment.handle.device_index).discard(segment)
            return True

    def count_broken_pins(self, namespace_id: int, keys: KeyArray) -> None:
        """Count the pinned ones among blocks that are lost for good: those without another copy.

        For the rare loss alone: it looks at them one by one.
        """
        with self.lock:
            missing = self.index(namespace_id).lookup(keys)["length"] == 0
            broken = sum(key.tobytes() in self.pins for key in keys[missing])
            self.counters[namespace_id].pins_broken += broken

    def free_drained(self) -> int:
        """Free what clients held and hold no more; return how many segments."""
        freed = 0
        with self.lock:
            for device in self.devices:
                for segment in device.waiting():
                    device.discard(segment)
                    freed += segment.handle.slot not in device.segments
        for device in self.devices:
            device.clear_freed()
        return freed

    def keep_bytes(self) -> None:
        """Leave their bytes to whoever has segments open now, also when they are freed.

        For the end of serving: views of clients stay valid, and are not asked for any more.
        """
        with self.lock:
            for device in self.devices:
                for segment in device.segments.values():
                    segment.handle.keeps_bytes = True

    def mark_dead(self, records: RecordArray) -> None:
        """Count the entries that these records name as dead. REQUIRES: `lock`; not in the index."""
        for device, slot, generation, positions in group_by_segment(records):
            segment = self.segment_of(device, slot, generation)
            if segment is not None:
                segment.mark_dead(records["entry"][positions].astype(np.int64))

    def pin(self, namespace_id: int, keys: KeyArray, nbytes: int) -> None:
        """Forbid the eviction of these keys, of `nbytes` in all. REQUIRES: `lock`.

        A block that is pinned several times counts once.
        """
        fresh = 0
        for key in keys:
            raw = key.tobytes()
            count = self.pins.get(raw, 0)
            self.pins[raw] = count + 1
            fresh += count == 0
        more = fresh * (nbytes // max(1, len(keys)))
        self.pinned_bytes[namespace_id] = self.pinned_bytes.get(namespace_id, 0) + more

    def unpin(self, namespace_id: int, keys: KeyArray, nbytes: int) -> None:
        """Undo one pin of these keys; perhaps they have a name by now."""
        with self.lock:
            namespace = self.namespaces.get(namespace_id)  # perhaps it was dropped meanwhile
            if self.unpinned is not None and namespace is not None and namespace.is_durable:
                self.unpinned.append(keys)
            gone = 0
            for key in keys:
                raw = key.tobytes()
                count = self.pins[raw] - 1
                if count:
                    self.pins[raw] = count
                else:
                    del self.pins[raw]
                    gone += 1
            self.pinned_bytes[namespace_id] -= gone * (nbytes // max(1, len(keys)))

    def resident_bytes(self, records: RecordArray) -> int:
        """Return the space these copies take, in bytes."""
        return int(page_round(records["length"]).sum())
