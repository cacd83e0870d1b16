"""Eviction: giving segments back, least recently used first.

Layer: L3.

One round, for the segments that the policy chose:

1. Split their live blocks: survivors (pinned, named in a durable namespace, or more recently of
   use than half of the device; all that can still serve a prefix where that is little) and dropped
   ones.
2. A dropped block that has no other copy takes its resident descendants with it, on every device:
   a block without its prefix serves nobody.
3. Files that lose a block lose their name, then all their blocks: files are whole or absent.
4. Survivors are copied to the open log and persisted; only then are the old copies forgotten and
   the segments freed.

A crash in between leaves at most two copies of a survivor, and dropped blocks that come back as
cache: both harmless.

Concurrency: one round at a time (`_round_lock`, taken before every other lock of the engine).
"""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.engine.ancestry import Standing, survey
from kvfs.engine.device_state import DeviceState
from kvfs.engine.index import RecordArray
from kvfs.engine.log import Batch
from kvfs.engine.policy import Candidate, choose_victims, spare, weighted_median
from kvfs.engine.reader import Reader
from kvfs.engine.segment_table import SegmentState, SegmentStatus, group_by_segment
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import DeviceError, NoSpaceError, PoisonedError
from kvfs.keys import KeyArray, file_contexts

_ROUND_SHARE = (
    64  # a round frees at least 1/64 of the device, so that its O(n) closure is amortised
)
_NEVER_NS = 1 << 62
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Victim:
    """A segment that may go: live entries, which of them survive, what the policy weighs."""

    segment: SegmentState
    indices: npt.NDArray[np.intp]
    survives: Mask
    recency_ns: int
    kept_bytes: int
    reachable_bytes: int

    def candidate(self, position: int) -> Candidate:
        """Show it to the policy."""
        return Candidate(
            position=position,
            nbytes=self.segment.handle.nbytes,
            recency_ns=self.recency_ns,
            written_ns=self.segment.last_access_ns,
            kept_bytes=self.kept_bytes,
            reachable_bytes=self.reachable_bytes,
            is_leased=self.segment.leases > 0,
        )


class Evictor:
    """Frees space on the devices of a pool."""

    def __init__(self, state: EngineState, reader: Reader) -> None:
        self._state = state
        self._reader = reader
        self._writer: Writer | None = None
        self._round_lock = threading.Lock()
        self._owner = 0

    def bind(self, writer: Writer) -> None:
        """Set the writer that relocates survivors (writer and evictor need each other)."""
        self._writer = writer

    def make_room(self, device: DeviceState, nbytes: int) -> bool:
        """Evict until `nbytes` and the reserve are free on the device; False if nothing could go.

        A relocation that runs out of space inside a round does not start another.
        """
        if self._owner == threading.get_ident():
            return False
        before = device.device.used_bytes
        with self._round_lock:
            if device.device.used_bytes < before:
                return True  # another thread's round has made room
            self._owner = threading.get_ident()
            try:
                return self._run(device, nbytes)
            finally:
                self._owner = 0

    def drop(self, namespace_id: int, keys: KeyArray) -> int:
        """Drop blocks on all devices, free segments left empty; return the copies dropped."""
        dropped = 0
        for device in self._state.devices:
            records = self._state.index(namespace_id).lookup(keys, device.info.index)
            dropped += self._state.forget(namespace_id, records)
            self._discard_empty(device)
        return dropped

    # --- internals

    def _run(self, device: DeviceState, nbytes: int) -> bool:
        assert self._writer is not None
        if device.full:
            self._flush()
        wanted = max(nbytes, device.info.capacity_bytes // _ROUND_SHARE)
        victims = self._choose(device, wanted)
        if not victims and self._close_idle_log(device):
            self._flush()
            victims = self._choose(device, wanted)
        freed = 0
        by_namespace: dict[int, list[_Victim]] = {}
        for victim in victims:
            by_namespace.setdefault(victim.segment.namespace_id, []).append(victim)
        for namespace_id, segments in by_namespace.items():
            freed += self._evict(device, namespace_id, segments)
        return freed > 0

    def _flush(self) -> None:
        """Seal what can be sealed; a failing device has been dealt with by the writer."""
        assert self._writer is not None
        try:
            self._writer.flush()
        except (DeviceError, PoisonedError):
            return

    def _choose(self, device: DeviceState, wanted: int) -> list[_Victim]:
        """Ask the policy which sealed segments go, and what survives of each.

        If warm blocks are spread so evenly that no segment is worth evicting, they are not spared.
        """
        with self._state.lock:
            standings = survey(self._state, device)
            warm_ns = weighted_median(
                np.concatenate([standing.recency_ns for standing in standings.values()]),
                np.concatenate([standing.lengths for standing in standings.values()]),
            )
            sealed = [
                segment
                for segment in device.segments.values()
                if segment.status is SegmentStatus.SEALED
            ]
            for limit in (warm_ns, _NEVER_NS):
                plans = [self._plan(s, standings[s.handle.slot], limit) for s in sealed]
                candidates = [plan.candidate(i) for i, plan in enumerate(plans)]
                chosen = choose_victims(candidates, wanted)
                if chosen:
                    return [plans[i] for i in chosen]
        return []

    def _plan(self, segment: SegmentState, standing: Standing, warm_ns: int) -> _Victim:
        lengths = standing.lengths
        survives = spare(
            self._held(segment.namespace_id, segment.entries["key"][standing.indices]),
            standing.reachable,
            standing.recency_ns,
            lengths,
            warm_ns=warm_ns,
            segment_bytes=segment.handle.nbytes,
        )
        total = max(1, int(lengths.sum()))
        return _Victim(
            segment=segment,
            indices=standing.indices,
            survives=survives,
            recency_ns=int((standing.recency_ns * (lengths / total)).sum()),
            kept_bytes=int(lengths[survives].sum()),
            reachable_bytes=int(lengths[standing.reachable].sum()),
        )

    def _close_idle_log(self, device: DeviceState) -> bool:
        """Set the least recently used open log aside, so that its segment can be evicted."""
        with self._state.lock:
            logs = [log for log in device.logs.values() if log.state.entry_count]
            if not logs:
                return False
            oldest = min(logs, key=lambda log: log.state.last_access_ns)
            device.full.append(device.logs.pop(oldest.state.namespace_id))
            return True

    def _held(self, namespace_id: int, keys: KeyArray) -> Mask:
        """Which keys must not be dropped."""
        pins = self._state.pins
        mask = np.zeros(len(keys), np.bool_)
        if pins:
            mask |= np.fromiter((key.tobytes() in pins for key in keys), np.bool_, len(keys))
        namespace = self._state.namespaces.get(namespace_id)
        if namespace is not None and namespace.is_durable and len(keys):
            wanted = _as_items(keys)
            for named in self._state.names.reachable_keys(namespace_id):
                mask |= np.isin(wanted, _as_items(named))
        return mask

    def _evict(self, device: DeviceState, namespace_id: int, victims: list[_Victim]) -> int:
        """Evict segments of one namespace; return how many went."""
        state = self._state
        evicted = 0
        with state.lock:
            doomed = self._close_over_descendants(device, namespace_id, victims)
        lost = self._forget_files(namespace_id, doomed)
        for victim in victims:
            segment, keep = victim.segment, victim.survives
            if len(lost):
                keys = segment.entries["key"][victim.indices]
                keep = keep & ~np.isin(_as_items(keys), _as_items(lost))
            if not self._relocate(device, segment, victim.indices[keep]):
                continue  # the victim keeps its blocks; the round frees less
            with state.lock:
                leftover = segment.live_indices()
                state.forget(namespace_id, segment.records(leftover))
                state.counters.segments_evicted += 1
                device.discard(segment)
                evicted += 1
        self._drop_lost(namespace_id, lost)
        return evicted

    def _close_over_descendants(
        self, device: DeviceState, namespace_id: int, victims: list[_Victim]
    ) -> KeyArray:
        """Return the keys that leave the pool: those with no other copy, and all below them."""
        dropped = np.concatenate(
            [v.segment.entries["key"][v.indices[~v.survives]] for v in victims]
        )
        for other in self._state.devices:
            if other is not device and len(dropped):
                copies = self._state.index(namespace_id).lookup(
                    np.ascontiguousarray(dropped), other.info.index
                )
                dropped = dropped[copies["length"] == 0]
        if not len(dropped):
            return dropped
        keys, parents = self._all_live(namespace_id)
        marks = np.isin(_as_items(keys), _as_items(dropped)).astype(np.uint8)
        _native.closure(keys, parents, marks)
        closed = np.ascontiguousarray(keys[marks.astype(np.bool_)])
        return np.ascontiguousarray(closed[~self._held(namespace_id, closed)])

    def _all_live(self, namespace_id: int) -> tuple[KeyArray, KeyArray]:
        keys, parents = [], []
        for device in self._state.devices:
            for segment in device.segments.values():
                if segment.namespace_id == namespace_id and segment.live_count:
                    indices = segment.live_indices()
                    keys.append(segment.entries["key"][indices])
                    parents.append(segment.entries["parent"][indices])
        return np.concatenate(keys), np.concatenate(parents)

    def _forget_files(self, namespace_id: int, doomed: KeyArray) -> KeyArray:
        """Remove the names of files that lose a block; return all keys that leave the pool."""
        if not file_contexts(doomed):
            return doomed
        whole = self._state.names.forget_files(doomed)
        self._state.counters.files_evicted += len(whole)
        return np.ascontiguousarray(np.concatenate([doomed, *whole]))

    def _relocate(
        self, device: DeviceState, victim: SegmentState, indices: npt.NDArray[np.intp]
    ) -> bool:
        """Copy blocks to the open log and persist them; False if there is no room for them."""
        assert self._writer is not None
        if not len(indices):
            return True
        state = self._state
        namespace = state.namespaces[victim.namespace_id]
        entries = victim.entries[indices]
        lease = self._reader.lease(
            namespace.namespace_id, np.ascontiguousarray(entries["key"]), verify=False
        )
        try:
            records = victim.records(indices)
            good = self._reader.verified(records)
            entries, records = entries[good], records[good]
            lengths = entries["stored_bytes"].astype(np.uint64)
            scratch = np.empty(int(lengths.sum()), np.uint8)
            addresses = np.uint64(scratch.ctypes.data) + np.cumsum(lengths) - lengths
            lease.records = records
            read = self._reader.read_ranges(
                lease,
                np.arange(len(records)),
                np.zeros(len(records), np.uint64),
                lengths,
                addresses,
            )
            batch = Batch(
                keys=np.ascontiguousarray(entries["key"]),
                parents=np.ascontiguousarray(entries["parent"]),
                addresses=addresses,
                lengths=lengths,
                tokens=np.ascontiguousarray(entries["token_count"]),
                flags=np.ascontiguousarray(entries["flags"]),
            ).take(np.flatnonzero(read))
            copies = self._writer.append(device, namespace, batch, keep_reserve=False)
            self._writer.persist_holding(copies)
            self._keep_recency(copies, victim.accessed_ns[indices[good][read]])
        except (NoSpaceError, DeviceError, PoisonedError):
            return False
        finally:
            self._reader.release(lease)
        with state.lock:
            state.counters.blocks_relocated += len(batch)
            state.counters.bytes_relocated += int(batch.lengths.sum())
        return True

    def _keep_recency(self, copies: RecordArray, accessed_ns: npt.NDArray[np.int64]) -> None:
        """Let copies be as old as what they were made from: moving a block is no use of it."""
        for device, slot, generation, positions in group_by_segment(copies):
            segment = self._state.segment_of(device, slot, generation)
            if segment is not None:
                segment.accessed_ns[copies["entry"][positions]] = accessed_ns[positions]

    def _drop_lost(self, namespace_id: int, lost: KeyArray) -> None:
        """Drop every copy of keys that left the pool."""
        if len(lost):
            self.drop(namespace_id, lost)
            self._state.counters.blocks_evicted += len(lost)

    def _discard_empty(self, device: DeviceState) -> None:
        with self._state.lock:
            empty = [
                segment
                for segment in device.segments.values()
                if segment.status is SegmentStatus.SEALED and segment.live_count == 0
            ]
            for segment in empty:
                device.discard(segment)


def _as_items(keys: KeyArray) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(keys).view("V32").ravel()
