"""The block store: one door to writer, reader, evictor and recovery.

Layer: L3.

- Blocks go in whole and come out whole or not at all; a miss is never an error.
- Everything here is synchronous and thread-safe; payload bytes move without the GIL and without
  the engine's lock.
- Nothing here knows names: contexts and files are the pool's. Growing files: `store_files`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt

from kvfs.buffers import Addresses
from kvfs.devices.reflink import Extent
from kvfs.durability import Durability, PutResult
from kvfs.engine.device_state import DeviceState
from kvfs.engine.evictor import Evictor
from kvfs.engine.format import EntryFlag
from kvfs.engine.index import RecordArray
from kvfs.engine.log import Batch
from kvfs.engine.reader import Lease, Mask, Reader
from kvfs.engine.recovery import RecoveryReport, load_devices
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.engine.state import EngineState
from kvfs.engine.store_files import StoreFiles
from kvfs.engine.writer import Writer
from kvfs.errors import BusyError, DeviceError, NoSpaceError, UsageError
from kvfs.keys import KEY_BYTES, KeyArray
from kvfs.phase import Phase
from kvfs.statistics import DeviceStatistics

_CLOSE_TIMEOUT_S = 30.0


class Store(StoreFiles):
    """The blocks of one pool."""

    def __init__(self, state: EngineState) -> None:
        reader = Reader(state)
        evictor = Evictor(state, reader)
        super().__init__(state, evictor, Writer(state, evictor.make_room))
        evictor.bind(self._writer)
        self.reader = reader
        self._is_closed = False

    def load(self) -> RecoveryReport:
        """Read what is on the devices.

        REQUIRES: all namespaces were added; called once, before anything else.
        """
        return load_devices(self.state)

    # --- blocks

    def put(
        self,
        namespace_id: int,
        keys: KeyArray,
        addresses: Addresses,
        lengths: Addresses,
        *,
        parents: KeyArray | None = None,
        tokens: Sequence[int] | npt.NDArray[np.uint32] | None = None,
        durability: Durability = Durability.ASYNC,
    ) -> PutResult:
        """Store blocks that are not there yet; see Namespace.put for the contract.

        Args:
            namespace_id: Where.
            keys: (n, 32) uint8, in log order.
            addresses: Where the payloads lie; read until return.
            lengths: Bytes per payload; less than the layout's block_bytes marks a partial block.
            parents: (n, 32) uint8, zeros for none.
            tokens: Tokens per block; the layout's when missing and the block is full.
            durability: See Durability.
        """
        namespace = self._namespace(namespace_id)
        count = len(keys)
        if parents is None:
            parents = np.zeros((count, KEY_BYTES), np.uint8)
        if len(parents) != count or len(addresses) != count or len(lengths) != count:
            raise UsageError(f"{count} keys need as many parents and buffers")
        if count and (int(lengths.max()) > namespace.stride or int(lengths.min()) < 1):
            raise UsageError(
                f"block size out of range: namespace {namespace.name}: expected 1 to "
                f"{namespace.stride} bytes, found {int(lengths.min())} to {int(lengths.max())}"
            )
        partial = lengths < namespace.block_bytes
        batch = Batch(
            keys=keys,
            parents=parents,
            addresses=addresses,
            lengths=lengths,
            tokens=np.asarray(tokens if tokens is not None else np.zeros(count), np.uint32),
            flags=np.where(partial, EntryFlag.PARTIAL, 0).astype(np.uint8),
        )
        times = self.state.counters[namespace_id].times
        with self.state.activity.during(namespace_id, times["put"]):
            return self._writer.put(namespace, batch, durability, self.reader.verified)

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return the fastest copy of each block; length 0 for a miss."""
        times = self.state.counters[namespace_id].times
        with self.state.activity.during(namespace_id, times["lookup"]):
            return self.reader.lookup(namespace_id, keys)

    def match_prefix(self, namespace_id: int, keys: KeyArray) -> int:
        """Return how many leading keys are resident."""
        tally = self.state.counters[namespace_id]
        with self.state.activity.during(namespace_id, tally.prefix_times):
            return self.state.index(namespace_id).match_prefix(keys, tally.prefix)

    def removals(self, namespace_id: int) -> int:
        """Return a number; while it stays the same, what was resident before still is."""
        with self.state.activity.during(namespace_id):
            return self.state.index(namespace_id).removals

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: Addresses, lengths: Addresses,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verified; returns which were."""
        times = self.state.counters[namespace_id].times
        with self.state.activity.during(namespace_id, times["read_into"]):
            return self.reader.read_into(namespace_id, keys, addresses, lengths, phase)

    def lease(
        self, namespace_id: int, keys: KeyArray, *, verify: bool = True, device: int | None = None,
        phase: Phase = Phase.UNKNOWN,
    ) -> Lease:  # fmt: skip
        """Hold blocks for reading in place; give back with `release`. See Reader.lease."""
        times = self.state.counters[namespace_id].times
        with self.state.activity.during(namespace_id, times["lease"]):
            return self.reader.lease(namespace_id, keys, verify=verify, device=device, phase=phase)

    def touch(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> int:
        """Note an access to blocks, as reading them would; return how many are resident."""
        with self.state.activity.during(namespace_id):
            lease = self.reader.lease(namespace_id, keys, verify=False, phase=phase)
            self.reader.release(lease)
            return int(np.count_nonzero(lease.records["length"]))

    def verified(self, records: RecordArray) -> Mask:
        """Verify leased records that were not verified yet; bad ones are dropped. One namespace."""
        with self.state.activity.during():
            return self.reader.verified(records)

    def read_ranges(
        self,
        lease: Lease,
        positions: npt.NDArray[np.integer],
        offsets: Addresses,
        lengths: Addresses,
        addresses: Addresses,
    ) -> Mask:
        """Copy parts of leased, verified blocks; see Reader.read_ranges."""
        with self.state.activity.during():
            return self.reader.read_ranges(lease, positions, offsets, lengths, addresses)

    def hold(self, segment: SegmentState) -> Lease:
        """Hold a segment that a lease of the caller's holds, for longer than that lease."""
        return self.reader.hold(segment)

    def share(self, lease: Lease) -> Lease:
        """Hold what a lease of the caller's holds, for longer than that lease."""
        return self.reader.share(lease)

    def assemble(self, device_index: int, extents: Sequence[Extent], nbytes: int) -> int:
        """Make a file that shares extents of leased segments; see Device.assemble."""
        with self.state.activity.during():
            return self.state.device(device_index).device.assemble(extents, nbytes)

    def release(self, lease: Lease) -> None:
        """End a lease; idempotent."""
        self.reader.release(lease)

    def pin(self, namespace_id: int, keys: KeyArray) -> int:
        """Forbid the eviction of blocks until `unpin`; return their bytes, for `unpin`.

        Blocks that are pinned several times count once.

        Raises:
            BusyError: The namespace would pin more than its share of the persistent tiers.
        """
        namespace = self._namespace(namespace_id)
        nbytes = namespace.stride * len(keys)
        tiers = self.state.tiers(persistent=True) or self.state.tiers(persistent=False)
        limit = self.state.options.pinned_share * sum(t.info.capacity_bytes for t in tiers)
        with self.state.lock:
            pins = self.state.pins
            more = sum(key.tobytes() not in pins for key in keys) * namespace.stride
            if more and self.state.pinned_bytes.get(namespace_id, 0) + more > limit:
                raise BusyError(
                    f"too much is pinned: namespace {namespace.name}: at most {int(limit)} bytes "
                    "may be held open; close some contexts"
                )
            self.state.pin(namespace_id, keys, nbytes)
        return nbytes

    def unpin(self, namespace_id: int, keys: KeyArray, nbytes: int) -> None:
        """Undo one `pin` of these keys."""
        self.state.unpin(namespace_id, keys, nbytes)

    def drop(self, namespace_id: int, keys: KeyArray) -> int:
        """Drop blocks on all devices; return the copies dropped. Leaves no tombstone."""
        with self.state.activity.during(namespace_id):
            return self._evictor.drop(namespace_id, keys)

    def flush(self) -> None:
        """Persist everything put so far. Durability: persist.

        Raises:
            DeviceError: A persist failed; what it would have covered is dropped.
        """
        with self.state.activity.during():
            self._writer.flush()

    @contextmanager
    def being_named(self, namespace_id: int, keys: KeyArray) -> Iterator[None]:
        """Keep blocks of a durable namespace that are put now and named before the block ends.

        Between its put and its naming a block has no name that would keep it.

        Raises:
            BusyError: The namespace has too much pinned already.
        """
        if not self._namespace(namespace_id).is_durable:
            yield
            return
        nbytes = self.pin(namespace_id, keys)
        try:
            yield
        finally:
            self.unpin(namespace_id, keys, nbytes)

    @contextmanager
    def hold_at_once(self) -> Iterator[bool]:
        """Hold the engine's lock if it is free at once; yield whether it is held.

        For callers that must not wait: what they call inside finds the lock taken already.
        """
        is_held = self.state.lock.acquire(blocking=False)
        try:
            yield is_held
        finally:
            if is_held:
                self.state.lock.release()

    def is_kept(self, namespace_id: int, keys: KeyArray) -> bool:
        """Say whether all blocks have a copy that survives this process, if the pool can."""
        persistent = [d for d in self.state.devices if d.info.is_persistent]
        with self.state.activity.during(namespace_id):
            index = self.state.index(namespace_id)
            if not persistent:
                return index.match_prefix(keys) == len(keys)
            found = np.zeros(len(keys), np.bool_)
            for device in persistent:
                found |= index.lookup(keys, device.info.index)["length"] > 0
            return bool(found.all())

    @property
    def has_unsynced(self) -> bool:
        """Whether a flush would have something to do."""
        with self.state.lock:
            return any(
                device.full or any(True for _ in device.unsynced_logs())
                for device in self.state.devices
            )

    # --- the rest

    def destroy_namespace(self, namespace_id: int) -> None:
        """Free all segments of a namespace. The catalog forgot it before, durably.

        Operations on it that are under way end first; new ones are refused.

        Raises:
            DeviceError: Of several failures the first. The namespace is gone all the same; the next
                open frees what is left of it.
        """
        state = self.state
        state.activity.end(namespace_id)
        failure: Exception | None = None
        state.index(namespace_id).retire()  # clients find nothing more, before a segment goes
        with self._evictor.paused():
            for device in state.devices:
                self._discard_namespace(device, namespace_id)
                try:
                    with device.open_lock:
                        device.unregister(namespace_id)
                except (OSError, NoSpaceError) as error:
                    device.note_failure()
                    failure = failure or error
                with state.lock:
                    if any(segment.namespace_id == namespace_id and not state.holds.is_held(segment)
                           for segment in device.waiting()):  # fmt: skip
                        failure = failure or OSError(f"{device.info.name} cannot free segments")
            with state.lock:
                state.namespaces.pop(namespace_id, None)
                state.counters.retire(namespace_id)
                # Not closed: readers in flight may hold it; the last one releases the table.
                state.indexes.pop(namespace_id, None)
        if failure is not None:
            raise DeviceError(f"namespace is gone, but not all it left: {failure}") from failure

    def _discard_namespace(self, device: DeviceState, namespace_id: int) -> None:
        """Give back all segments of a namespace on a device."""
        state = self.state
        with state.lock:
            logs = [log for log in [*device.full, *device.logs.values()]
                    if log.state.namespace_id == namespace_id]  # fmt: skip
        for log in logs:
            with log.lock, log.persist_lock, state.lock:  # no flush is at work on it
                device.discard(log.state)
        with state.lock:
            device.logs.pop(namespace_id, None)
            device.full = [log for log in device.full if log not in logs]
            for segment in list(device.segments.values()):
                is_draining = segment.status is SegmentStatus.DRAINING
                if segment.namespace_id == namespace_id and not is_draining:
                    device.discard(segment)

    def device_statistics(self) -> list[DeviceStatistics]:
        """Return a snapshot of every device."""
        with self.state.lock:
            return [_device_statistics(device) for device in self.state.devices]

    def close(self) -> None:
        """Flush, note the clean end in the superblocks, close the devices; idempotent.

        Memory is sealed, so that another owner that finds it need not verify it.

        Raises:
            DeviceError: The flush or a superblock failed; everything was closed all the same. Of
                several failures, of any kind, the first is raised.
            BusyError: Operations did not end in time; the devices stay open.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.state.activity.close(_CLOSE_TIMEOUT_S)
        failure: Exception | None = None
        try:
            self._writer.flush()
            self._seal_memory()
        except Exception as error:  # noqa: BLE001 - raised again when the devices are closed
            failure = error
        for device in self.state.devices:
            for step in (partial(device.update_superblock, owner_pid=0), device.device.close):
                try:
                    step()
                except (OSError, NoSpaceError) as error:
                    failure = failure or DeviceError(f"close failed: {device.info.name}: {error}")
                except Exception as error:  # noqa: BLE001 - raised again when all are closed
                    failure = failure or error
        for index in self.state.indexes.values():
            index.close()
        if failure is not None:
            raise failure

    def _seal_memory(self) -> None:
        for device in self.state.devices:
            logs = () if device.info.is_persistent else tuple(device.logs.values())
            for log in logs:
                if not log.state.is_poisoned:
                    with log.lock:
                        log.seal()


def _device_statistics(device: DeviceState) -> DeviceStatistics:
    info = device.info
    segments = list(device.segments.values())
    states = {SegmentStatus.OPEN, SegmentStatus.SEALED}
    poisoned = any(segment.is_poisoned for segment in segments)
    return DeviceStatistics(
        index=info.index,
        name=info.name,
        kind=info.kind,
        tier=info.tier,
        url=info.url,
        is_persistent=info.is_persistent,
        state="offline" if device.is_offline else "degraded" if poisoned else "online",
        capacity_bytes=info.capacity_bytes,
        used_bytes=device.device.used_bytes,
        live_bytes=sum(segment.live_bytes for segment in segments),
        segment_bytes=info.segment_bytes,
        segment_count=sum(segment.status in states for segment in segments),
        block_count=sum(segment.live_count for segment in segments),
        bytes_written=device.device.bytes_written,
        failures=device.failures,
        persistence=info.persistence,
        bad_bytes=device.device.bad_bytes,
    )
