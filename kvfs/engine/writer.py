"""The writing side: put, group commit, sealing, adoption.

Layer: L3.

- A payload is written and hashed in one pass, its entry after it, then both are published; readers
  of this process see the block at once, a crash may take it until the next persist.
- `sync` blocks are persisted before `put` returns; `async` ones by `flush`, which the pool calls
  within its bounded delay.
- A full segment is set aside and sealed by `flush`; nothing waits for a seal.
- After a failed write the batch is tried once more on a fresh segment; what the failed segment
  held unpersisted is dropped.
- `sync` looks at the segments that it wrote to or found blocks in, also at those that were freed
  meanwhile: a poisoned one may have lost them.

Locks: the log's lock, then its persist lock, then the state's lock.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import Staging
from kvfs.durability import Durability, PutResult
from kvfs.engine import format as fmt
from kvfs.engine.device_state import DeviceState, NamespaceSpec
from kvfs.engine.index import RecordArray
from kvfs.engine.log import Batch, SegmentLog, file_sidecar
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.engine.state import EngineState
from kvfs.errors import (
    DeviceError,
    KvfsError,
    NoSpaceError,
    PoisonedError,
    UnavailableError,
    UsageError,
)
from kvfs.units import PAGE, align_up

_ROOM_ATTEMPTS = 16


Run = tuple[SegmentState, npt.NDArray[np.int64]]  # a segment and entries in it
Settle = Callable[[SegmentState, npt.NDArray[np.int64]], object]


class Writer:
    """Appends to the logs of a pool."""

    def __init__(self, state: EngineState, make_room: Callable[[DeviceState, int], bool]) -> None:
        """Bind to a pool.

        Args:
            state: The pool.
            make_room: Evicts on a device until about that many bytes are free; False if nothing
                can go.
        """
        self._state = state
        self._make_room = make_room

    def put(
        self,
        namespace: NamespaceSpec,
        batch: Batch,
        durability: Durability,
        trusted: Callable[[RecordArray], npt.NDArray[np.bool_]],
    ) -> PutResult:
        """Store the blocks of a batch that are not there yet.

        Args:
            namespace: Where.
            batch: The blocks; keys may repeat.
            durability: See Durability.
            trusted: Says which records hold verified payloads; the others are dropped by it.
        """
        firsts = np.empty(len(batch), np.int64)
        distinct = _native.distinct_keys(batch.keys, firsts)
        wanted = batch if distinct == len(batch) else batch.take(firsts[:distinct])
        try:
            homes = self._homes(durability)
            runs, fresh = self._missing(namespace, wanted, homes, trusted)
            missing = wanted if len(fresh) == len(wanted) else wanted.take(fresh)
            if len(missing):
                runs += self._store(namespace, missing, homes)
                self._store_extra(namespace, missing, homes)
        except (NoSpaceError, UnavailableError, PoisonedError) as error:
            self._count_refusal(namespace, error)
            raise
        if durability is Durability.SYNC:
            self.persist_holding(runs)
        return self._account(namespace, batch, missing)

    def _homes(self, durability: Durability) -> list[DeviceState]:
        """Return the devices whose copy is enough, in the order in which they are tried."""
        state = self._state
        if durability is Durability.NONE:
            homes = [*state.tiers(persistent=False), *state.tiers(persistent=True)]
        else:
            homes = state.lasting_tiers()
            if durability is Durability.SYNC and homes and not homes[0].info.is_persistent:
                raise UsageError("durability 'sync' needs a persistent device; this pool has none")
        if not homes:
            raise UnavailableError(
                f"no device in service takes blocks with durability {durability.value!r}; "
                "see 'pool status'"
            )
        return homes

    def append(
        self,
        device: DeviceState,
        namespace: NamespaceSpec,
        batch: Batch,
        *,
        keep_reserve: bool = True,
        is_evicting: bool = True,
        settle: Settle | None = None,
    ) -> list[Run]:
        """Append blocks to the device's log of a namespace; return where they are.

        Args:
            device: Where.
            namespace: Whose.
            batch: The blocks.
            keep_reserve: Leave a segment free for relocation.
            is_evicting: Make room by eviction; else it ends where there is none, and what it
                returns has the leading blocks that found some.
            settle: What to do with each run of entries, under the engine's lock; publishes them
                when missing.

        Durability: flush.

        Raises:
            NoSpaceError: Nothing more can be evicted.
            DeviceError: Writes failed on two segments in a row.
        """
        settle, state = settle or self._publish, self._state
        made: list[Run] = []
        done = failures = 0
        while done < len(batch):
            log = self._log_with_room(
                device, namespace, batch.lengths[done:], keep_reserve, is_evicting=is_evicting
            )
            if log is None:
                break
            with log.lock:
                fits = log.fitting(batch.lengths[done:])
                if not fits or log.state.status is not SegmentStatus.OPEN:
                    continue
                part = batch if fits == len(batch) else batch.take(slice(done, done + fits))
                with self._state.lock:  # growing replaces arrays that others change under the lock
                    log.state.reserve(log.state.entry_count + fits)
                start = log.state.payload_end
                try:
                    indices = log.append(part)
                    with self._state.lock:
                        log.require_writable()  # a persist may have failed meanwhile
                        settle(log.state, indices)
                        tally = state.counters[namespace.namespace_id]
                        tally.written[device.info.index] += log.state.payload_end - start
                    made.append((log.state, indices))
                except (DeviceError, PoisonedError):
                    self._retire_poisoned(device, log)
                    failures += 1
                    if failures > 1:
                        raise
                    continue
            done += fits
        return made

    def append_to_some(
        self,
        devices: list[DeviceState],
        namespace: NamespaceSpec,
        batch: Batch,
        *,
        settle: Settle | None = None,
    ) -> list[Run]:
        """Append to the first devices that have room; only when all are full, evict on one.

        That is where half of the segments were not used for longest, so that devices as lasting as
        each other are one cache. Arguments, durability and errors are those of `append`; errors
        are raised when no device takes the blocks.
        """
        made: list[Run] = []
        failure: KvfsError | None = None
        able = list(devices)
        for device in devices if len(devices) > 1 else []:
            try:
                runs = self.append(device, namespace, batch, is_evicting=False, settle=settle)
            except (NoSpaceError, UnavailableError, PoisonedError) as error:
                failure = error
                able.remove(device)
                continue
            made += runs
            done = sum(len(entries) for _, entries in runs)
            if done == len(batch):
                return made
            batch = batch.take(slice(done, len(batch)))
        with self._state.lock:
            able.sort(key=DeviceState.usual_use_ns)
        for device in able:
            try:
                return made + self.append(device, namespace, batch, settle=settle)
            except (NoSpaceError, UnavailableError, PoisonedError) as error:
                failure = error
        assert failure is not None, "there is a device, or it was refused before"
        raise failure

    def _publish(self, segment: SegmentState, indices: npt.NDArray[np.int64]) -> RecordArray:
        return self._state.publish(segment, indices, verified=True)

    def flush(self) -> None:
        """Persist all that was appended, and seal full segments. Durability: persist.

        Raises:
            DeviceError: A persist failed on some device; the others were flushed.
        """
        failure: DeviceError | PoisonedError | None = None
        for device in self._state.devices:
            with self._state.lock:
                full, logs = list(device.full), list(device.unsynced_logs())
            for log in logs:
                failure = self._guarded(device, log, log.persist) or failure
            for log in full:
                with log.lock:
                    failure = self._guarded(device, log, log.seal) or failure
                with self._state.lock:
                    if log in device.full:
                        device.full.remove(log)
        if failure is not None:
            raise failure

    def adopt(
        self,
        device: DeviceState,
        namespace: NamespaceSpec,
        staging: Staging,
        entries: fmt.EntryArray,
        is_vouched: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Turn a staging file into a file segment with these entries. Durability: persist.

        The names are persisted too: on return the blocks survive a crash, and are reaped by the
        next owner unless the catalog names them. Blocks that are not vouched for are verified when
        they are first read.
        """
        state = self._state
        nbytes = staging.nbytes
        slot = -1
        try:
            with device.open_lock:
                device.require_online()
                device.register(namespace)
                with state.lock:
                    slot, generation = device.claim()
            header = device.header_for(namespace, state.pool_uuid, slot, generation, nbytes,
                                       fmt.SegmentKind.FILE)  # fmt: skip
            sidecar = file_sidecar(header, entries)
            handle = device.device.adopt(staging, slot, generation, sidecar)
            try:
                device.device.persist_names()
            except OSError:
                with contextlib.suppress(OSError):
                    device.device.free(handle)
                raise
            segment = SegmentState(
                handle, namespace.namespace_id, SegmentStatus.SEALED, state.clock.monotonic_ns()
            )
            segment.load(np.arange(len(entries), dtype=np.uint32), entries, len(entries))
            segment.persisted_count = len(entries)
            with state.lock:
                device.segments[slot] = segment
                if is_vouched is None:
                    is_vouched = np.ones(len(entries), np.bool_)
                for verified in (True, False):
                    chosen = np.flatnonzero(is_vouched == verified)
                    state.publish(segment, chosen, verified=verified)
                tally = state.counters[namespace.namespace_id]
                tally.blocks_put += len(entries)
                tally.bytes_put += nbytes
                tally.written[device.info.index] += nbytes
        except OSError as error:
            self._count_failure(device)
            raise DeviceError(f"adoption failed: {device.info.name}: {error}") from error
        finally:
            device.claimed.discard(slot)

    # --- internals

    def _missing(
        self,
        namespace: NamespaceSpec,
        batch: Batch,
        homes: list[DeviceState],
        trusted: Callable[[RecordArray], npt.NDArray[np.bool_]],
    ) -> tuple[list[Run], npt.NDArray[np.intp]]:
        """Look for verified copies on the homes; return where, and which blocks have none."""
        index = self._state.index(namespace.namespace_id)
        found = index.lookup(batch.keys)
        missing, runs = np.arange(len(batch)), list[Run]()
        if not found["length"].any():
            return runs, missing
        _require_same_lengths(batch, found)
        for device in homes:
            records = index.lookup(np.ascontiguousarray(batch.keys[missing]), device.info.index)
            if records["length"].any():
                held = self._state.hold(records)
                try:
                    missing = missing[~trusted(records)]
                finally:
                    for segment, _ in held:
                        self._state.release(segment)
                runs += held
        return runs, missing

    def _store(self, namespace: NamespaceSpec, batch: Batch, homes: list[DeviceState]) -> list[Run]:
        """Append to the first homes that take the batch: memory before what lasts, if both may."""
        failure: KvfsError | None = None
        for is_persistent in (False, True):
            group = [device for device in homes if device.info.is_persistent == is_persistent]
            if not group:
                continue
            try:
                return self.append_to_some(group, namespace, batch)
            except (NoSpaceError, UnavailableError, PoisonedError) as error:
                failure = error
        assert failure is not None, "there is a home, or it was refused before"
        raise failure

    def _count_refusal(self, namespace: NamespaceSpec, error: KvfsError) -> None:
        with self._state.lock:
            tally = self._state.counters[namespace.namespace_id]
            if isinstance(error, NoSpaceError):
                tally.refused_no_space += 1
            else:
                tally.refused_no_device += 1

    def _store_extra(
        self, namespace: NamespaceSpec, batch: Batch, homes: list[DeviceState]
    ) -> None:
        """Add a copy on a volatile tier; a full or failing one is no reason to fail."""
        if not (self._state.options.copy_to_dram and homes[0].info.is_persistent):
            return
        memory = self._state.tiers(persistent=False)
        index = self._state.index(namespace.namespace_id)
        is_there = np.zeros(len(batch), np.bool_)
        for device in memory:
            is_there |= index.lookup(batch.keys, device.info.index)["length"] > 0
        if not memory or is_there.all():
            return
        with contextlib.suppress(NoSpaceError, UnavailableError, PoisonedError):
            self.append_to_some(memory, namespace, batch.take(np.flatnonzero(~is_there)))

    def _log_with_room(
        self,
        device: DeviceState,
        namespace: NamespaceSpec,
        lengths: npt.NDArray[np.uint64],
        keep_reserve: bool,
        *,
        is_evicting: bool,
    ) -> SegmentLog | None:
        """Return the open log if the first payload fits, else a new one.

        None if there is no room and none is to be made.
        """
        state = self._state
        if align_up(int(lengths[0]), PAGE) > device.info.segment_bytes // 2:
            raise UsageError(
                f"block of {int(lengths[0])} bytes on {device.info.name} with segments of "
                f"{device.info.segment_bytes}: a segment must hold at least two blocks"
            )
        for _ in range(_ROOM_ATTEMPTS):
            with device.open_lock:
                with state.lock:
                    device.require_online()
                    log = device.logs.get(namespace.namespace_id)
                    if log is not None and not log.state.is_poisoned and log.fitting(lengths[:1]):
                        return log
                    if log is not None:
                        device.full.append(device.logs.pop(namespace.namespace_id))
                    has_room = device.has_room_for_segment(keep_reserve=keep_reserve)
                log = self._open_log(device, namespace) if has_room else None
            if log is not None:
                return log
            if not is_evicting:
                return None
            if not self._make_room(device, device.info.segment_bytes):
                break
        raise NoSpaceError(
            f"nothing can be evicted: {device.info.name}: "
            f"{device.device.used_bytes} of {device.info.capacity_bytes} bytes used; "
            "close or unpin contexts, or add a device"
        )

    def _open_log(self, device: DeviceState, namespace: NamespaceSpec) -> SegmentLog | None:
        """Open a segment; None if the device turned out to be full. REQUIRES: `open_lock` only."""
        state = self._state
        slot = -1
        try:
            with state.lock:
                slot, generation = device.claim()
            log = device.open_segment(namespace, state.pool_uuid, slot, generation)
            with state.lock:
                device.segments[slot] = log.state
                device.logs[namespace.namespace_id] = log
        except NoSpaceError:
            return None
        except (DeviceError, OSError) as error:
            self._count_failure(device)
            raise DeviceError(f"no segment could be opened: {device.info.name}: {error}") from error
        finally:
            device.claimed.discard(slot)
        return log

    def persist_holding(self, runs: list[Run]) -> None:
        """Persist the open segments among these; the others must have been persisted.

        Raises:
            DeviceError: A persist failed; what it covered is dropped.
            PoisonedError: One failed in another thread.
        """
        for segment, entries in runs:
            device = self._state.device(segment.handle.device_index)
            if not device.info.is_persistent or not len(entries):
                continue
            wanted = int(entries.max()) + 1
            with self._state.lock:
                log = next((log for log in [*device.full, *device.logs.values()]
                            if log.state is segment), None)  # fmt: skip
            if log is not None:
                failure = self._guarded(device, log, partial(log.persist, wanted=wanted))
                if failure is not None:
                    raise failure
            elif segment.persisted_count < wanted:
                raise PoisonedError(
                    f"a persist failed meanwhile: {device.info.name} segment "
                    f"{segment.handle.slot}; the blocks it would have covered are dropped"
                )

    def _guarded(
        self, device: DeviceState, log: SegmentLog, operation: Callable[[], None]
    ) -> DeviceError | PoisonedError | None:
        """Run a persist or seal; on failure drop what is not persisted and return the error."""
        try:
            operation()
        except (DeviceError, PoisonedError) as error:
            self._retire_poisoned(device, log)
            return error
        return None

    def _retire_poisoned(self, device: DeviceState, log: SegmentLog) -> None:
        """Take a poisoned segment out of use: no more writes, nothing unpersisted in the index.

        A persist under way is waited for: what it covers is kept.
        """
        state = self._state
        segment = log.state
        with log.persist_lock, state.lock:
            if segment.status is not SegmentStatus.OPEN:
                return
            if device.logs.get(segment.namespace_id) is log:
                del device.logs[segment.namespace_id]
            if log in device.full:
                device.full.remove(log)
            lost = np.arange(segment.persisted_count, segment.entry_count)
            lost = lost[segment.live[lost]]
            self._drop_lost(segment, lost)
            # As a place: full, evictable, never written again.
            segment.status = SegmentStatus.SEALED
            segment.needs_verify = True
            state.counters.segments_poisoned += 1
            self._unverify(segment)
            self._count_failure(device)

    def _drop_lost(self, segment: SegmentState, lost: npt.NDArray[np.intp]) -> None:
        """Drop blocks that a failed persist would have covered, on every device.

        A copy left on a volatile tier would let names and callers believe that they are safe.
        REQUIRES: the state's lock.
        """
        state = self._state
        state.counters.blocks_lost += len(lost)
        state.counters[segment.namespace_id].blocks_lost += len(lost)
        keys = segment.keys(lost)
        state.forget(segment.namespace_id, segment.records(lost))
        if state.device(segment.handle.device_index).info.is_persistent:
            index = state.index(segment.namespace_id)
            for device in state.devices:
                if not device.info.is_persistent:
                    state.forget(segment.namespace_id, index.lookup(keys, device.info.index))
        state.count_broken_pins(segment.namespace_id, keys)

    def _unverify(self, segment: SegmentState) -> None:
        """Make readers verify again, from the medium. REQUIRES: the state's lock."""
        records = segment.records(segment.live_indices())
        if len(records):
            self._state.index(segment.namespace_id).insert(records)

    def _count_failure(self, device: DeviceState) -> None:
        with self._state.lock:
            self._state.counters.write_errors += 1
            device.note_failure()

    def _account(self, namespace: NamespaceSpec, batch: Batch, missing: Batch) -> PutResult:
        stored = int(missing.lengths.sum())
        offered = stored if missing is batch else int(batch.lengths.sum())
        result = PutResult(len(missing), len(batch) - len(missing), stored, offered - stored)
        with self._state.lock:
            tally = self._state.counters[namespace.namespace_id]
            tally.blocks_put += result.blocks_stored
            tally.bytes_put += stored
            tally.blocks_deduplicated += result.blocks_deduplicated
            tally.bytes_deduplicated += result.bytes_deduplicated
        return result


def _require_same_lengths(batch: Batch, found: RecordArray) -> None:
    """Raise UsageError if a block that is there has another length."""
    differs = (found["length"] > 0) & (found["length"] != batch.lengths)
    if differs.any():
        first = int(np.flatnonzero(differs)[0])
        raise UsageError(
            f"block is there with another length: {batch.keys[first].tobytes().hex()}: "
            f"{int(found['length'][first])} bytes, {int(batch.lengths[first])} given; "
            "give other content another key"
        )
