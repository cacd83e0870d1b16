"""Eviction: giving segments back, least recently used first.

Layer: L3.

One round, for the segments that the policy chose:

1. Split their live blocks: survivors (pinned, named in a durable namespace, or read since they were written) and dropped ones.
2. A dropped block that has no other copy takes its resident descendants with it, on every device: a block without its
   prefix serves nobody.
3. Files that lose a block lose their name, then all their blocks: files are whole or absent.
4. Survivors are copied to the open log and persisted; only then are the old copies forgotten and the segments freed.

A crash in between leaves at most two copies of a survivor, and dropped blocks that come back as cache: both harmless.

Concurrency: one round at a time (`_round_lock`, taken before every other lock of the engine).
"""

import threading

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.engine.device_state import DeviceState

from kvfs.engine.log import Batch
from kvfs.engine.policy import Candidate, choose_victims, spare
from kvfs.engine.reader import Reader
from kvfs.engine.segment_table import SegmentState, SegmentStatus, page_round
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import DeviceError, NoSpaceError, PoisonedError
from kvfs.keys import KEY_BYTES, KeyArray, file_contexts

_ROUND_SHARE = 64  # a round frees at least 1/64 of the device, so that its O(n) closure is amortised
_SHOWN_AT_FIRST = 32
Mask = npt.NDArray[np.bool_]


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
        """Drop blocks on all devices, and give back segments left empty; return the copies dropped."""
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
        used = device.device.used_bytes
        by_namespace: dict[int, list[SegmentState]] = {}
        for victim in victims:
            by_namespace.setdefault(victim.namespace_id, []).append(victim)
        for namespace_id, segments in by_namespace.items():
            self._evict(device, namespace_id, segments)
        return device.device.used_bytes < used

    def _flush(self) -> None:
        """Seal what can be sealed; a failing device has been dealt with by the writer."""
        assert self._writer is not None
        try:
            self._writer.flush()
        except (DeviceError, PoisonedError):
            return

    def _choose(self, device: DeviceState, wanted: int) -> list[SegmentState]:
        """Ask the policy, showing it the least recently used segments first."""
        with self._state.lock:
            segments = sorted(
                (s for s in device.segments.values() if s.status is SegmentStatus.SEALED),
                key=lambda s: s.last_access_ns,
            )
            shown = _SHOWN_AT_FIRST
            while True:
                chosen = choose_victims(self._candidates(segments[:shown]), wanted)
                if shown >= len(segments) or sum(segments[i].handle.nbytes for i in chosen) >= wanted:
                    return [segments[i] for i in chosen]
                shown *= 4

    def _candidates(self, segments: list[SegmentState]) -> list[Candidate]:
        return [
            Candidate(
                position=i,
                nbytes=segment.handle.nbytes,
                last_access_ns=segment.last_access_ns,
                held_bytes=self._held_bytes(segment),
                is_leased=segment.leases > 0,
            )
            for i, segment in enumerate(segments)
        ]

    def _close_idle_log(self, device: DeviceState) -> bool:
        """Set the least recently used open log aside, so that its segment can be evicted."""
        with self._state.lock:
            logs = [log for log in device.logs.values() if log.state.entry_count]
            if not logs:
                return False
            oldest = min(logs, key=lambda log: log.state.last_access_ns)
            device.full.append(device.logs.pop(oldest.state.namespace_id))
            return True

    def _held_bytes(self, segment: SegmentState) -> int:
        indices = segment.live_indices()
        held = self._held(segment.namespace_id, segment.entries["key"][indices])
        return int(page_round(segment.entries["stored_bytes"][indices][held]).sum())

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

    def _evict(
        self, device: DeviceState, namespace_id: int, victims: list[SegmentState]
    ) -> None:
        state = self._state
        with state.lock:
            plans = [(victim, *self._split(victim)) for victim in victims]
            doomed = self._close_over_descendants(device, namespace_id, plans)
        lost = self._forget_files(namespace_id, doomed)
        for victim, indices, survives in plans:
            keys = victim.entries["key"][indices]
            keep = survives & ~np.isin(_as_items(keys), _as_items(lost)) if len(lost) else survives
            if not self._relocate(device, victim, indices[keep]):
                continue  # the victim keeps its blocks; the round frees less
            with state.lock:
                leftover = victim.live_indices()
                state.forget(namespace_id, victim.records(leftover))
                state.counters.segments_evicted += 1
                device.discard(victim)
        self._drop_lost(namespace_id, lost)

    def _split(self, victim: SegmentState) -> tuple[npt.NDArray[np.intp], Mask]:
        indices = victim.live_indices()
        lengths = page_round(victim.entries["stored_bytes"][indices])
        held = self._held(victim.namespace_id, victim.entries["key"][indices])
        budget = int(self._state.options.second_chance_share * victim.handle.nbytes)
        return indices, spare(victim.touched[indices], held, lengths, budget)

    def _close_over_descendants(
        self, device: DeviceState, namespace_id: int,
        plans: list[tuple[SegmentState, npt.NDArray[np.intp], Mask]],
    ) -> KeyArray:
        """Return the keys that leave the pool: dropped without another copy, and their descendants."""  # fmt: skip
        seeds = [
            victim.entries["key"][indices[~survives]] for victim, indices, survives in plans
        ]
        dropped = np.concatenate(seeds) if seeds else np.zeros((0, KEY_BYTES), np.uint8)
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
        contexts = file_contexts(doomed)
        if not contexts:
            return doomed
        whole = self._state.names.forget_files(contexts)
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
                lease, np.arange(len(records)), np.zeros(len(records), np.uint64), lengths, addresses
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
        except (NoSpaceError, DeviceError, PoisonedError):
            return False
        finally:
            self._reader.release(lease)
        with state.lock:
            state.counters.blocks_relocated += len(batch)
            state.counters.bytes_relocated += int(batch.lengths.sum())
        return True

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


