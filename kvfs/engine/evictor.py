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
from kvfs.engine.held import HeldKeys, among
from kvfs.engine.holds import place_of
from kvfs.engine.log import Batch
from kvfs.engine.policy import Candidate, choose_victims, spare, weighted_median
from kvfs.engine.reader import Reader
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import DeviceError, NoSpaceError, PoisonedError, UnavailableError
from kvfs.keys import KEY_BYTES, KeyArray, file_contexts

_ROUND_SHARE = (
    64  # a round frees at least 1/64 of the device, so that its O(n) closure is amortised
)
_NEVER_NS = 1 << 62
_DRAIN_POLL_S = 0.005
_DRAIN_POLLS = 20
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
    is_held: bool

    def candidate(self, position: int) -> Candidate:
        """Show it to the policy."""
        return Candidate(
            position=position,
            nbytes=self.segment.handle.nbytes,
            recency_ns=self.recency_ns,
            written_ns=self.segment.last_access_ns,
            kept_bytes=self.kept_bytes,
            reachable_bytes=self.reachable_bytes,
            is_leased=self.segment.leases > 0 or self.is_held,
        )


class Move:
    """Copies of a victim's blocks, not published before they are persisted."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._runs: list[tuple[SegmentState, npt.NDArray[np.int64]]] = []

    def hold(self, segment: SegmentState, indices: npt.NDArray[np.int64]) -> None:
        """Take note of copies, and a lease on where they are. REQUIRES: the engine's lock."""
        segment.leases += 1
        self._runs.append((segment, indices))

    def replace(self, victim: SegmentState, sources: npt.NDArray[np.intp]) -> None:
        """Publish the copies of those blocks that are still the victim's.

        They stay as old as what they were made from: moving a block is no use of it.
        """
        state = self._state
        done = 0
        with state.lock:
            for segment, indices in self._runs:
                origin = sources[done : done + len(indices)]
                done += len(indices)
                if segment.is_poisoned or segment.status is SegmentStatus.DRAINING:
                    raise PoisonedError("the copies' segment was given up")
                current = victim.live[origin]
                if current.any():
                    accessed_ns, last_ns = victim.accessed_ns[origin], segment.last_access_ns
                    state.publish(segment, indices[current], verified=True)
                    segment.accessed_ns[indices] = accessed_ns
                    segment.last_access_ns = last_ns
                    if segment.handle.device_index == victim.handle.device_index:
                        lengths = segment.entries["stored_bytes"][indices[current]]
                        tally = state.counters[victim.namespace_id]
                        tally.blocks_relocated += len(lengths)
                        tally.relocated[segment.handle.device_index] += int(lengths.sum())

    def release(self) -> None:
        """Give the leases back."""
        for segment, _ in self._runs:
            self._state.release(segment)
        self._runs.clear()


class Evictor:
    """Frees space on the devices of a pool."""

    def __init__(self, state: EngineState, reader: Reader) -> None:
        self._state = state
        self._reader = reader
        self._writer: Writer | None = None
        self._round_lock = threading.Lock()
        self._pause = threading.Event()  # never set
        self._owner = 0

    def bind(self, writer: Writer) -> None:
        """Set the writer that relocates survivors (writer and evictor need each other)."""
        self._writer = writer

    def make_room(self, device: DeviceState, nbytes: int) -> bool:
        """Evict until `nbytes` and the reserve are free on the device; False if nothing could go.

        A relocation that runs out of space inside a round does not start another.

        Raises:
            DeviceError: The device cannot free a segment; nothing more is evicted for no space.
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
                device.clear_freed()  # whoever waits for room is to find it

    def drop(self, namespace_id: int, keys: KeyArray) -> int:
        """Drop blocks on all devices, free segments left empty; return the copies dropped."""
        dropped = 0
        for device in self._state.devices:
            records = self._state.index(namespace_id).lookup(keys, device.info.index)
            dropped += self._state.forget(namespace_id, records)
            self._discard_empty(device)
        return dropped

    def paused(self) -> threading.Lock:
        """Return the lock that keeps rounds from running while it is held."""
        return self._round_lock

    # --- internals

    def _run(self, device: DeviceState, nbytes: int) -> bool:
        if self._free_stuck(device):
            return True
        if device.full:
            self._flush()
        wanted = max(nbytes, device.info.capacity_bytes // _ROUND_SHARE)
        held, used_bytes = HeldKeys(self._state), device.device.used_bytes
        try:
            freed = self._round(device, wanted, held)
            if not freed:
                before = device.device.used_bytes
                if self._relieve(device) or device.device.used_bytes < before:
                    return True  # what was empty, or about to go, is gone
                freed = self._round(device, wanted, held)
            if not freed and self._close_idle_log(device):
                self._flush()
                freed = self._round(device, wanted, held)
            if not freed or device.device.used_bytes >= used_bytes:
                # There is no room to copy survivors to, after a crash, or they took all that was
                # freed, as each namespace has segments of its own: spare nothing that may go.
                if freed and self._close_idle_log(device):
                    self._flush()
                freed += self._round(device, wanted, held, is_sparing=False)
        finally:
            held.close()
        return freed > 0

    def _relieve(self, device: DeviceState) -> bool:
        """Have leases given back that keep the device from freeing; whether it freed something."""
        state = self._state
        if state.on_pressure is not None:
            state.on_pressure()
        with state.lock:
            state.holds.relieve(
                list(device.segments.values()),
                device.info.capacity_bytes,
                state.clock.monotonic_ns(),
            )
        for _ in range(_DRAIN_POLLS):
            if self._free_stuck(device):
                return True
            with state.lock:
                if not device.waiting():
                    break
            self._pause.wait(_DRAIN_POLL_S)  # a client's copy takes milliseconds
        return False

    def _round(
        self, device: DeviceState, wanted: int, held: HeldKeys, *, is_sparing: bool = True
    ) -> int:
        """Choose victims and evict them; return how many went."""
        victims = self._choose(device, wanted, held, is_sparing=is_sparing)
        leased = [victim.segment for victim in victims]
        freed = 0
        try:
            by_namespace: dict[int, list[_Victim]] = {}
            for victim in victims:
                by_namespace.setdefault(victim.segment.namespace_id, []).append(victim)
            for namespace_id, members in by_namespace.items():
                freed += self._evict(device, namespace_id, members, held, leased)
        finally:
            for segment in leased:
                self._state.release(segment)
        return freed

    def _flush(self) -> None:
        """Seal what can be sealed; a failing device has been dealt with by the writer."""
        assert self._writer is not None
        try:
            self._writer.flush()
        except (DeviceError, PoisonedError):
            return

    def _choose(
        self, device: DeviceState, wanted: int, held: HeldKeys, *, is_sparing: bool
    ) -> list[_Victim]:
        """Ask the policy which sealed segments go, and what survives of each; lease those.

        If warm blocks are spread so evenly that no segment is worth evicting, they are not spared.
        Without `is_sparing`, only segments are asked about that can go without any copying.
        """
        with self._state.lock:
            namespaces = {s.namespace_id for s in device.segments.values()}
        held.prepare(namespaces)  # reads the catalog: not under the lock
        with self._state.lock:
            standings = survey(self._state, device)
            if not standings:
                return []
            warm_ns = weighted_median(
                np.concatenate([standing.recency_ns for standing in standings.values()]),
                np.concatenate([standing.lengths for standing in standings.values()]),
            )
            sealed = [
                segment
                for segment in device.segments.values()
                if segment.status is SegmentStatus.SEALED
            ]
            clients = self._state.holds.snapshot(sealed)
            for limit in (warm_ns, _NEVER_NS) if is_sparing else (None,):
                plans = [self._plan(device, s, standings[s.handle.slot], limit, held, clients)
                         for s in sealed]  # fmt: skip
                if not is_sparing:
                    plans = [plan for plan in plans if not plan.kept_bytes]
                candidates = [plan.candidate(i) for i, plan in enumerate(plans)]
                chosen = [plans[i] for i in choose_victims(candidates, wanted)]
                if chosen:
                    for victim in chosen:
                        victim.segment.leases += 1  # nobody else frees it during the round
                    return chosen
        return []

    def _plan(
        self, device: DeviceState, segment: SegmentState, standing: Standing, warm_ns: int | None,
        held: HeldKeys, clients: set[int],
    ) -> _Victim:  # fmt: skip
        lengths = standing.lengths
        keys = segment.keys(standing.indices)
        survives = held.mask(segment.namespace_id, keys, device.info)
        if warm_ns is not None:
            survives = spare(
                survives,
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
            is_held=place_of(segment) in clients,
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

    def _evict(
        self,
        device: DeviceState,
        namespace_id: int,
        victims: list[_Victim],
        held: HeldKeys,
        leased: list[SegmentState],
    ) -> int:
        """Evict segments of one namespace; return how many went.

        The lease of each is given back once it is done, and taken from `leased`: its space is what
        the survivors of the next one may need.
        """
        state = self._state
        with state.lock:
            doomed = self._close_over_descendants(device, namespace_id, victims, held)
        lost = self._forget_files(namespace_id, doomed)
        evicted = 0
        try:
            for victim in victims:
                segment = victim.segment
                keys = segment.keys(victim.indices)
                keep = victim.survives & ~among(keys, lost)
                is_given_up = self._relocate(
                    device, segment, victim.indices[keep]
                ) and self._give_up(device, segment, held)
                leased.remove(segment)
                if not state.release(segment):
                    raise _unfreed(device)
                # A client may have come to hold it since it was chosen.
                evicted += is_given_up and device.segments.get(segment.handle.slot) is not segment
        finally:
            self._drop_lost(namespace_id, lost, held)
        return evicted

    def _give_up(self, device: DeviceState, segment: SegmentState, held: HeldKeys) -> bool:
        """Forget what is left in a victim and free it, unless something in it is held by now."""
        state = self._state
        with state.lock:
            if segment.status is not SegmentStatus.SEALED:
                return False
            leftover = segment.live_indices()
            if held.mask(segment.namespace_id, segment.keys(leftover), device.info).any():
                return False
            state.forget(segment.namespace_id, segment.records(leftover))
            state.counters[segment.namespace_id].evicted[device.info.index] += 1
            device.discard(segment)
        return True

    def _close_over_descendants(
        self, device: DeviceState, namespace_id: int, victims: list[_Victim], held: HeldKeys
    ) -> KeyArray:
        """Return the keys that leave the pool: those with no other copy, and all below them."""
        dropped = np.concatenate([v.segment.keys(v.indices[~v.survives]) for v in victims])
        for other in self._state.devices:
            if other is not device and len(dropped):
                copies = self._state.index(namespace_id).lookup(
                    np.ascontiguousarray(dropped), other.info.index
                )
                dropped = dropped[copies["length"] == 0]
        if not len(dropped):
            return dropped
        keys, parents = self._all_live(namespace_id)
        marks = among(keys, dropped).astype(np.uint8)
        _native.closure(keys, parents, marks)
        closed = np.ascontiguousarray(keys[marks.astype(np.bool_)])
        return np.ascontiguousarray(closed[~held.mask(namespace_id, closed)])

    def _all_live(self, namespace_id: int) -> tuple[KeyArray, KeyArray]:
        keys = [np.zeros((0, KEY_BYTES), np.uint8)]
        parents = [np.zeros((0, KEY_BYTES), np.uint8)]
        for device in self._state.devices:
            for segment in device.segments.values():
                if segment.namespace_id == namespace_id and segment.live_count:
                    indices = segment.live_indices()
                    keys.append(segment.keys(indices))
                    parents.append(segment.parents(indices))
        return np.concatenate(keys), np.concatenate(parents)

    def _forget_files(self, namespace_id: int, doomed: KeyArray) -> KeyArray:
        """Remove the names of files that lose a block; return all keys that leave the pool."""
        if not file_contexts(doomed):
            return doomed
        whole = self._state.names.forget_files(doomed)
        self._state.counters[namespace_id].files_evicted += len(whole)
        return np.ascontiguousarray(np.concatenate([doomed, *whole]))

    def _relocate(
        self, device: DeviceState, victim: SegmentState, indices: npt.NDArray[np.intp]
    ) -> bool:
        """Copy blocks to the open log, persist the copies, then let them take the place.

        Until then the victim's are the blocks. False if that failed; nothing has changed then.
        """
        namespace = self._state.namespaces.get(victim.namespace_id)
        if not len(indices) or namespace is None:
            return not len(indices)
        lengths = victim.entries["stored_bytes"][indices].astype(np.uint64)
        scratch = np.empty(int(lengths.sum()), np.uint8)
        addresses = np.uint64(scratch.ctypes.data) + np.cumsum(lengths) - lengths
        good = self._reader.read_entries(victim, indices, lengths, addresses)
        chosen = indices[good]
        batch = Batch.of_entries(victim.entries[chosen], addresses[good], lengths[good])
        assert self._writer is not None
        move = Move(self._state)
        try:
            runs = self._writer.append(
                device, namespace, batch, keep_reserve=False, settle=move.hold
            )
            self._writer.persist_holding(runs)
            move.replace(victim, chosen)
        except (NoSpaceError, UnavailableError, PoisonedError):
            return False
        finally:
            move.release()
        return True

    def _drop_lost(self, namespace_id: int, lost: KeyArray, held: HeldKeys) -> None:
        """Drop every copy of keys that left the pool, but those held by now."""
        with self._state.lock:
            lost = np.ascontiguousarray(lost[~held.mask(namespace_id, lost)])
            if len(lost):
                self.drop(namespace_id, lost)
                self._state.counters[namespace_id].blocks_evicted += len(lost)

    def _free_stuck(self, device: DeviceState) -> bool:
        """Free what could not be freed before; whether anything was."""
        with self._state.lock:
            freed = False
            for segment in device.waiting():
                if not device.discard(segment):
                    raise _unfreed(device)
                freed |= segment.handle.slot not in device.segments
            return freed

    def _discard_empty(self, device: DeviceState) -> None:
        with self._state.lock:
            empty = [
                segment
                for segment in device.segments.values()
                if segment.status is SegmentStatus.SEALED
                and segment.live_count == 0
                and segment.leases == 0
            ]
            for segment in empty:
                device.discard(segment)


def _unfreed(device: DeviceState) -> DeviceError:
    return DeviceError(f"no room can be made: {device.info.name} cannot free segments; see the log")
