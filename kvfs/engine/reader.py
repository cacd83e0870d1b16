"""The reading side: lookups, batch copies, verification, leases.

Layer: L3.

- A block that cannot be read back is dropped from the index and counted; the caller sees a miss.
  Another copy is tried first. It is not dropped if time, descriptors or memory ran out.
- Payloads of segments without a seal header (and of poisoned ones) are verified from the medium,
  past the page cache, before they are first served; others at the first read of this process
  (`PoolOptions.verify_reads`).
- Reads hold a lease on the segments they touch, so that no slot is recycled under a copy.
"""

import errno
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import AddressArray
from kvfs.engine.index import RECORD, VERIFIED, RecordArray
from kvfs.engine.segment_table import SegmentState, group_by_segment, is_verified
from kvfs.engine.state import EngineState
from kvfs.engine.stitching import Backings, backings_of
from kvfs.keys import KeyArray
from kvfs.phase import Phase
from kvfs.units import PAGE

_ATTEMPTS = 3  # copies of one block tried before it is a miss
_SCRATCH_BYTES = 32 << 20
Mask = npt.NDArray[np.bool_]
EventArray = npt.NDArray[np.void]
_FAULT = 3  # a status of native batches: memory cannot be read
# What says nothing of the blocks: a device that stalls, a process without descriptors or memory.
_TRANSIENT = [-code for code in (
    errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR,
)]  # fmt: skip
EVENT = np.dtype([
    ("device", "<u2"), ("phase", "u1"), ("flags", "u1"), ("segment", "<u4"), ("entry", "<u4"),
    ("tag", "<u4"),
])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """The records of a batch that lie in one segment, by their positions in the batch."""

    segment: SegmentState
    positions: npt.NDArray[np.intp]


@dataclass(slots=True, eq=False)
class Lease:
    """Segments that must not be recycled.

    `records` says where the bytes are; misses have length 0. `parts` groups them as they were
    found: a record that was found bad since is still in its part.
    """

    records: RecordArray
    segments: list[SegmentState] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def backings(self) -> Backings:
        """Say where to map each block from."""
        return backings_of(
            self.records, ((part.segment.handle.backing, part.positions) for part in self.parts)
        )

    def check(self) -> None:
        """Do nothing: what is held in this process is never taken away."""


class Reader:
    """Reads blocks of a pool."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return where the fastest copy of each block is; length 0 for a miss."""
        records = self._state.index(namespace_id).lookup(keys)
        tally = self._state.counters[namespace_id]
        tally.lookups_missed += len(keys) - _native.tally(records, None, None, tally.looked_up)
        return records

    def lease(
        self, namespace_id: int, keys: KeyArray, *, verify: bool = True, device: int | None = None,
        phase: Phase = Phase.UNKNOWN,
    ) -> Lease:  # fmt: skip
        """Look up blocks and hold their segments until `release`; an access, for `phase`.

        With `verify`, copies that do not hold what their entry says are dropped; a block without
        a good copy is reported as a miss. With `device`, only copies there count, unverified.
        """
        assert device is None or not verify, "a bad copy would be replaced by one elsewhere"
        index = self._state.index(namespace_id)
        with self._state.lock:
            lease = Lease(index.lookup(keys, device))
            self._hold(lease)
        self._touch(lease, phase)
        if verify:
            found = lease.parts.copy()
            self._verify_held(lease, namespace_id, keys)
            tally = self._state.counters[namespace_id]
            hits = _native.tally(lease.records, None, None, tally.leased)
            if hits < len(keys):
                there = sum(len(part.positions) for part in found)
                tally.misses_absent += len(keys) - there
                tally.misses_unreadable += there - hits
        return lease

    def hold(self, segment: SegmentState) -> Lease:
        """Hold one segment until `release`. The caller holds it already, by another lease."""
        with self._state.lock:
            assert segment.leases > 0, "an unheld segment may be gone"
            segment.leases += 1
        return Lease(np.zeros(0, RECORD), [segment])

    def share(self, lease: Lease) -> Lease:
        """Hold what a lease holds, which the caller has, once more, until `release`."""
        with self._state.lock:
            for segment in lease.segments:
                assert segment.leases > 0, "an unheld segment may be gone"
                segment.leases += 1
        return Lease(lease.records, list(lease.segments), lease.parts)

    def release(self, lease: Lease) -> None:
        """Let go of a lease; idempotent."""
        with self._state.lock:
            for segment in lease.segments:
                self._state.release(segment)
            lease.segments.clear()

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: AddressArray, lengths: AddressArray,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verifying checksums in the same pass.

        Args:
            namespace_id: Where.
            keys: (n, 32) uint8.
            addresses: Where block i goes; room for `lengths[i]` bytes.
            lengths: Bytes of room; a block that is longer is a miss.
            phase: What for.

        Returns:
            Which blocks were copied. The memory of a failed one holds unspecified bytes.
        """
        done = np.zeros(len(keys), np.bool_)
        first: tuple[Mask, Mask] | None = None
        for _ in range(_ATTEMPTS):
            todo = np.flatnonzero(~done)
            if not len(todo):
                break
            part = keys if len(todo) == len(keys) else np.ascontiguousarray(keys[todo])
            lease = self.lease(namespace_id, part, verify=False, phase=phase)
            try:
                records = lease.records
                there = records["length"] > 0
                usable = there & (records["length"] <= lengths[todo])
                first = first or (there, usable)
                if not usable.any():
                    break
                records["length"][~usable] = 0
                self._require_medium(lease)
                good = self._copy(lease, addresses[todo])
            finally:
                self.release(lease)
            done[todo[good]] = True
            if good[usable].all():
                break
        if first is not None and not done.all():
            missed = len(keys) - int(np.count_nonzero(done))
            self._count_misses(namespace_id, missed, *first)
        return done

    def read_ranges(
        self,
        lease: Lease,
        positions: npt.NDArray[np.integer],
        offsets: AddressArray,
        lengths: AddressArray,
        addresses: AddressArray,
    ) -> Mask:
        """Copy parts of leased, verified blocks.

        For each i: `lengths[i]` bytes from `offsets[i]` of record `positions[i]`.

        A part that cannot be read is False, and its block dropped.
        """
        records = lease.records[positions]
        starts = records["page"].astype(np.uint64) * np.uint64(PAGE) + offsets
        statuses = self._transfer(records, self._parts(records), starts, lengths, addresses, None)
        bad = (statuses != 0) & (records["length"] > 0)
        if bad.any():
            self._drop_bad(records[bad], statuses[bad])
        good: Mask = (statuses == 0) & (records["length"] > 0)
        if lease.parts:
            tally = self._state.counters[lease.parts[0].segment.namespace_id]
            _native.tally(records, lengths, statuses, tally.read)
        return good

    def read_entries(
        self,
        segment: SegmentState,
        indices: npt.NDArray[np.integer],
        lengths: AddressArray,
        addresses: AddressArray,
    ) -> Mask:
        """Copy whole blocks out of one segment, verified; the caller holds a lease on it.

        Blocks that do not hold what their entries say are dropped.
        """
        records = segment.records(indices)
        if segment.needs_verify:
            known = self._state.index(segment.namespace_id).lookup(
                np.ascontiguousarray(records["key"]), segment.handle.device_index
            )
            same = (known["segment"] == records["segment"]) & (
                known["generation"] == records["generation"]
            )
            records["flags"][same] = known["flags"][same]
            records["length"][~self.verified(records)] = 0
        parts = [Part(segment, np.arange(len(records)))]
        starts = records["page"].astype(np.uint64) * np.uint64(PAGE)
        digests = segment.digests(indices)
        statuses = self._transfer(records, parts, starts, lengths, addresses, digests)
        bad = (statuses != 0) & (records["length"] > 0)
        if bad.any():
            self._drop_bad(records[bad], statuses[bad])
        good: Mask = (statuses == 0) & (records["length"] > 0)
        return good

    def verify_again(self, namespace_id: int, keys: KeyArray) -> Mask:
        """Verify blocks that did not hold for a client, known or not; drop bad ones."""
        lease = self.lease(namespace_id, keys, verify=False, phase=Phase.BACKGROUND)
        try:
            lease.records["flags"] &= ~np.uint16(VERIFIED)
            return self.verified(lease.records)
        finally:
            self.release(lease)

    def touch(self, events: EventArray, namespaces: set[int]) -> None:
        """Note accesses that a client reports, by their phases.

        What names nothing of its namespaces is passed over; a phase that is none is UNKNOWN.
        """
        now_ns = self._state.clock.monotonic_ns()
        places = events["device"].astype(np.uint64) << np.uint64(32) | events["segment"]
        order = np.argsort(places, kind="stable")
        events, places = events[order], places[order]
        starts = np.flatnonzero(np.append(True, places[1:] != places[:-1])).tolist()
        stops = [*starts[1:], len(places)]
        for start, stop, place in zip(starts, stops, places[starts].tolist(), strict=True):
            segment = self._state.segment_at(place >> 32, place & 0xFFFFFFFF)
            if segment is not None and segment.namespace_id in namespaces:
                self._stamp(segment, events[start:stop], now_ns)

    def verified(self, records: RecordArray) -> Mask:
        """Verify the payloads that were not verified yet; drop bad ones. Misses are False.

        A lease must hold the segments, or the records be fresh.
        """
        good = records["length"] > 0
        unknown = good & ~is_verified(records)
        if not self._state.options.verify_reads:
            unknown &= self._needing_medium(records, self._parts(records))
        todo = np.flatnonzero(unknown)
        for part in self._parts(records[todo]) if len(todo) else ():
            chosen = todo[part.positions]
            subset = np.ascontiguousarray(records[chosen])
            statuses = self._verify_part(part.segment, subset)
            good[chosen] = statuses == 0
            self._settle(subset, statuses)
        return good

    # --- internals

    def _hold(self, lease: Lease) -> None:
        lease.parts = self._parts(lease.records)
        for part in lease.parts:
            part.segment.leases += 1
            lease.segments.append(part.segment)

    def _verify_held(self, lease: Lease, namespace_id: int, keys: KeyArray) -> None:
        """Verify leased copies; in place of a bad one, lease the next copy of its block."""
        records = lease.records
        bad = np.flatnonzero((records["length"] > 0) & ~self.verified(records))
        for _ in range(_ATTEMPTS - 1):
            if not len(bad):
                return
            with self._state.lock:
                others = self._state.index(namespace_id).lookup(np.ascontiguousarray(keys[bad]))
                for part in self._parts(others):
                    part.segment.leases += 1
                    lease.segments.append(part.segment)
                    lease.parts.append(Part(part.segment, bad[part.positions]))
            good = self.verified(others)
            records[bad] = others
            bad = bad[(others["length"] > 0) & ~good]
        records[bad] = np.zeros(1, RECORD)[0]

    def _touch(self, lease: Lease, phase: Phase) -> None:
        """Note that the blocks were accessed; for eviction, too, unless in the background."""
        if not lease.parts:
            return
        count = sum(len(part.positions) for part in lease.parts)
        self._state.counters[lease.parts[0].segment.namespace_id].accesses[phase] += count
        if phase is Phase.BACKGROUND:
            return
        now_ns = self._state.clock.monotonic_ns()
        for part in lease.parts:
            part.segment.last_access_ns = now_ns
            part.segment.accessed_ns[lease.records["entry"][part.positions]] = now_ns

    def _stamp(self, segment: SegmentState, events: EventArray, now_ns: int) -> None:
        """Note accesses to a segment that a client reports."""
        with self._state.lock:
            events = events[events["entry"] < segment.entry_count]
            phases = np.where(events["phase"] < len(Phase), events["phase"], Phase.UNKNOWN)
            accesses = self._state.counters[segment.namespace_id].accesses
            for phase in np.unique(phases).tolist():
                entries = events["entry"][phases == phase]
                accesses[phase] += len(entries)
                if phase != Phase.BACKGROUND:
                    segment.last_access_ns = now_ns
                    segment.accessed_ns[entries] = now_ns

    def _parts(self, records: RecordArray) -> list[Part]:
        parts = []
        for device, slot, generation, positions in group_by_segment(records):
            segment = self._state.segment_of(device, slot, generation)
            if segment is None:
                records["length"][positions] = 0  # gone since the lookup
            else:
                parts.append(Part(segment, positions))
        return parts

    def _needing_medium(self, records: RecordArray, parts: list[Part]) -> Mask:
        """Which records lie in segments whose payloads no seal header vouches for."""
        mask = np.zeros(len(records), np.bool_)
        for part in parts:
            mask[part.positions] = part.segment.needs_verify
        return mask

    def _require_medium(self, lease: Lease) -> None:
        """Verify from the medium what must be, before a copy that verifies only what it copies."""
        records = lease.records
        risky = self._needing_medium(records, lease.parts) & ~is_verified(records)
        if risky.any():
            chosen = np.flatnonzero(risky)
            good = self.verified(np.ascontiguousarray(records[chosen]))
            records["length"][chosen[~good]] = 0

    def _copy(self, lease: Lease, addresses: AddressArray) -> Mask:
        records = lease.records
        starts = records["page"].astype(np.uint64) * np.uint64(PAGE)
        digests = np.zeros((len(records), 16), np.uint8)
        for part in lease.parts:
            entries = records["entry"][part.positions]
            digests[part.positions] = part.segment.digests(entries)
        lengths = records["length"].astype(np.uint64)
        statuses = self._transfer(records, lease.parts, starts, lengths, addresses, digests)
        self._settle(records, statuses)
        if lease.parts:
            tally = self._state.counters[lease.parts[0].segment.namespace_id]
            _native.tally(records, None, statuses, tally.read)
        good: Mask = (statuses == 0) & (records["length"] > 0)
        return good

    def _count_misses(self, namespace_id: int, missed: int, there: Mask, usable: Mask) -> None:
        """Count blocks that were not copied, by what the first look had found."""
        tally = self._state.counters[namespace_id]
        absent = int(np.count_nonzero(~there))
        short = int(np.count_nonzero(there & ~usable))
        tally.misses_absent += absent
        tally.misses_room += short
        tally.misses_unreadable += max(0, missed - absent - short)  # one may have come meanwhile

    def _transfer(
        self,
        records: RecordArray,
        parts: list[Part],
        starts: AddressArray,
        lengths: AddressArray,
        addresses: AddressArray,
        digests: npt.NDArray[np.uint8] | None,
    ) -> npt.NDArray[np.int32]:
        """Copy: all that is mapped in one native call, the rest as a batch for each device."""
        sources = np.zeros(len(records), np.uint64)
        owners = np.full(len(records), -1, np.int64)  # of what is not mapped: its part
        by_device: dict[int, list[int]] = {}
        for number, part in enumerate(parts):
            handle = part.segment.handle
            if handle.address:
                sources[part.positions] = np.uint64(handle.address) + starts[part.positions]
            else:
                owners[part.positions] = number
                by_device.setdefault(handle.device_index, []).append(number)
        misses = records["length"] == 0
        sources[misses], owners[misses] = 0, -1
        statuses = np.zeros(len(records), np.int32)

        def transfer(chosen: npt.NDArray[np.intp], numbers: list[int]) -> None:
            if not len(chosen):
                return
            whole = len(chosen) == len(records)
            pick = (lambda a: a) if whole else (lambda a: np.ascontiguousarray(a[chosen]))
            result = np.zeros(len(chosen), np.int32)
            wanted = None if digests is None else pick(digests)
            if not numbers:
                _native.copy_verify(pick(addresses), pick(sources), pick(lengths), wanted, result)
            else:
                self._read(
                    [parts[number].segment for number in numbers],
                    np.searchsorted(numbers, owners[chosen]),
                    pick(starts), pick(lengths), pick(addresses), wanted, result,
                )  # fmt: skip
            statuses[chosen] = result

        transfer(np.flatnonzero(sources), [])
        for part in parts:
            self._meter(part.segment, lengths[part.positions])
        for numbers in by_device.values():
            transfer(np.flatnonzero(np.isin(owners, numbers)), numbers)
        return statuses

    def _read(
        self,
        segments: list[SegmentState],
        which: npt.NDArray[np.intp],
        starts: AddressArray,
        lengths: AddressArray,
        targets: AddressArray,
        digests: npt.NDArray[np.uint8] | None,
        statuses: npt.NDArray[np.int32],
        *,
        uncached: bool = False,
    ) -> None:
        """Read from segments of one device; an error is the status of every block."""
        device = self._state.device(segments[0].handle.device_index).device
        try:
            device.read_payloads(
                [segment.handle for segment in segments], which, starts, lengths, targets,
                digests, statuses, uncached=uncached,
            )  # fmt: skip
        except OSError as error:
            statuses[:] = -(error.errno or errno.EIO)

    def _meter(self, segment: SegmentState, lengths: AddressArray) -> None:
        """Tell a device that wants to know of bytes read past it, where they are mapped."""
        meter = self._state.device(segment.handle.device_index).device.meter
        if meter is not None and segment.handle.address:
            meter.note_read(int(lengths.sum()))

    def _verify_part(self, segment: SegmentState, records: RecordArray) -> npt.NDArray[np.int32]:
        """Verify records of one segment, from the medium if it needs that."""
        statuses = np.zeros(len(records), np.int32)
        starts = records["page"].astype(np.uint64) * np.uint64(PAGE)
        lengths = records["length"].astype(np.uint64)
        digests = segment.digests(records["entry"])
        if segment.handle.address and not segment.needs_verify:
            sources = np.uint64(segment.handle.address) + starts
            _native.verify(sources, lengths, digests, statuses)
            self._meter(segment, lengths)
        else:
            self._verify_read(segment, starts, lengths, digests, statuses)
        return statuses

    def _verify_read(
        self,
        segment: SegmentState,
        starts: AddressArray,
        lengths: AddressArray,
        digests: npt.NDArray[np.uint8],
        statuses: npt.NDArray[np.int32],
    ) -> None:
        """Verify by reading into scratch memory, some megabytes at a time."""
        size = max(_SCRATCH_BYTES, int(lengths.max()))
        scratch = np.empty(size, np.uint8)
        base = scratch.ctypes.data
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + size, side="right")))
            part = slice(first, last)
            targets = np.uint64(base) + ends[part] - lengths[part] - np.uint64(before)
            self._read(
                [segment], np.zeros(last - first, np.intp), starts[part], lengths[part], targets,
                digests[part], statuses[part], uncached=segment.needs_verify,
            )  # fmt: skip
            first = last

    def _settle(self, records: RecordArray, statuses: npt.NDArray[np.int32]) -> None:
        """Mark good records verified, drop bad ones. All lie in one namespace."""
        hits = records["length"] > 0
        good = hits & (statuses == 0)
        fresh = good & ~is_verified(records)
        if fresh.any():
            chosen = records[fresh]
            with self._state.lock:
                self._state.index(_namespace_of(chosen)).mark_verified(chosen)
            tally = self._state.counters[_namespace_of(chosen)]
            tally.blocks_verified += len(chosen)
        bad = hits & (statuses != 0)
        if bad.any():
            self._drop_bad(records[bad], statuses[bad])

    def _drop_bad(self, records: RecordArray, statuses: npt.NDArray[np.int32]) -> None:
        namespace_id = _namespace_of(records)
        tally = self._state.counters[namespace_id]
        for device, status in zip(records["device"].tolist(), statuses.tolist(), strict=True):
            (tally.bad_checksums if status == 1 else tally.bad_reads)[device] += 1
        is_gone = ~np.isin(statuses, _TRANSIENT)
        records, statuses = records[is_gone], statuses[is_gone]
        if not len(records):
            return
        self._state.note_faults(records[statuses == _FAULT])
        self._state.forget(namespace_id, np.ascontiguousarray(records))
        self._state.count_broken_pins(namespace_id, np.ascontiguousarray(records["key"]))


def _namespace_of(records: RecordArray) -> int:
    return int.from_bytes(records["key"][0][:8].tobytes(), "little")
