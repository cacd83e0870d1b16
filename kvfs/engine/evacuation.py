"""Emptying a device that is out of service for writes, and forgetting it.

Layer: L3.

- What lies on the device is copied, persisted, published, and only then forgotten here: a crash
  leaves two copies, never none.
- What another device in service has already, verified and as lasting as this one, is not copied.
- What could not be read for want of time or descriptors stays, for another step.
- One step moves some segments; who wants all of it asks again. Nothing of it is remembered, so that
  it goes on after a crash where it was.

Concurrency: any thread; the segment at hand is leased, as in a round of eviction.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs.engine.device_state import DeviceState
from kvfs.engine.evictor import Evictor, Move
from kvfs.engine.log import Batch
from kvfs.engine.reader import Reader
from kvfs.engine.segment_table import SegmentState, SegmentStatus, is_verified
from kvfs.engine.state import EngineState
from kvfs.engine.writer import Writer
from kvfs.errors import (
    BusyError,
    DeviceError,
    NoSpaceError,
    PoisonedError,
    RefusedError,
    UnavailableError,
)


@dataclass(frozen=True, slots=True)
class Evacuated:
    """What one step moved, and what is left: `held_segments` wait for their readers."""

    moved_blocks: int
    moved_bytes: int
    left_segments: int
    left_bytes: int
    held_segments: int


class Evacuation:
    """Moves blocks from one device to the others."""

    def __init__(
        self, state: EngineState, reader: Reader, writer: Writer, evictor: Evictor
    ) -> None:
        self._state = state
        self._reader = reader
        self._writer = writer
        self._evictor = evictor

    def step(self, device: DeviceState, nbytes: int) -> Evacuated:
        """Move segments until about so many bytes were copied. Durability: persist.

        REQUIRES: the device is out of service.

        Raises:
            RefusedError: No other device in service could take what lies here.
            NoSpaceError: They are full.
            DeviceError: Writes to the others failed.
        """
        assert device.is_offline, "what is emptied takes no writes"
        state = self._state
        self._close_logs(device)
        blocks = moved = 0
        for segment in self._sealed(device):
            with state.lock:
                if segment.status is not SegmentStatus.SEALED:
                    continue
                segment.leases += 1  # nobody else frees it meanwhile
            try:
                done = self._move(device, segment)
                if device.info.is_persistent:
                    self._writer.flush()  # copies that others made, too
                self._forget_moved(device, segment)
                blocks, moved = blocks + done[0], moved + done[1]
            finally:
                state.release(segment)
            if moved >= nbytes:
                break
        if not moved and state.on_pressure is not None:
            state.on_pressure()
        state.free_drained()
        with state.lock:
            left = list(device.segments.values())
            held = sum(s.leases > 0 or device.is_held(s) for s in left)
            return Evacuated(blocks, moved, len(left), sum(s.live_bytes for s in left), held)

    def forget(self, device: DeviceState) -> int:
        """Forget all that lies on a device, names of files that need it too; return lost blocks.

        REQUIRES: the device is out of service. Durability: flush.
        """
        state, lost_count = self._state, 0
        self._close_logs(device)
        for segment in self._sealed(device):
            namespace_id = segment.namespace_id
            with state.lock:
                indices = segment.live_indices()
                indices = indices[~self._is_elsewhere(device, segment, indices, is_any=True)]
                lost = segment.keys(indices)
            if len(lost):
                whole = state.names.forget_files(lost)
                lost = np.ascontiguousarray(np.concatenate([lost, *whole]))
                lost_count += len(indices)
                self._evictor.drop(namespace_id, lost)
            with state.lock:
                state.forget(namespace_id, segment.records(segment.live_indices()))
        with state.lock:
            for segment in list(device.segments.values()):
                if segment.status is SegmentStatus.SEALED:
                    device.discard(segment)
        return lost_count

    def would_lose(self, device: DeviceState) -> int:
        """Return how many blocks have no copy on another device that is as lasting."""
        lost = 0
        with self._state.lock:
            for segment in device.segments.values():
                if segment.status is SegmentStatus.DRAINING:
                    continue  # its blocks have left the index, perhaps with their namespace
                indices = segment.live_indices()
                there = self._is_elsewhere(device, segment, indices, is_any=True)
                lost += int(np.count_nonzero(~there))
        return lost

    def detach(self, device: DeviceState) -> None:
        """Take an empty device out of the pool; the caller destroys or closes it.

        Raises:
            BusyError: Somebody still reads what lay there.
        """
        state = self._state
        with state.lock:
            held = [segment for segment in device.segments.values()
                    if segment.leases or device.is_held(segment)]  # fmt: skip
            if held:
                raise BusyError(
                    f"device is being read: {device.info.name}: {len(held)} segments are held; "
                    "close what reads them, and try again"
                )
            device.segments.clear()  # what could not be freed goes with the device
            state.devices = [other for other in state.devices if other is not device]

    # --- internals

    def _close_logs(self, device: DeviceState) -> None:
        """Seal open segments; what cannot be sealed is verified as it is read."""
        with self._state.lock:
            device.full.extend(device.logs.values())
            device.logs.clear()
        with contextlib.suppress(DeviceError, PoisonedError):
            self._writer.flush()

    def _sealed(self, device: DeviceState) -> list[SegmentState]:
        with self._state.lock:
            return [segment for segment in device.segments.values()
                    if segment.status is SegmentStatus.SEALED]  # fmt: skip

    def _is_elsewhere(
        self, device: DeviceState, segment: SegmentState, indices: npt.NDArray[np.intp],
        *, is_any: bool = False,
    ) -> npt.NDArray[np.bool_]:  # fmt: skip
        """Which blocks another device has that is as lasting. REQUIRES: `lock`.

        Verified, and in service; with `is_any` neither need be.
        """
        found = np.zeros(len(indices), np.bool_)
        if not len(indices):
            return found
        keys = np.ascontiguousarray(segment.keys(indices))
        index = self._state.index(segment.namespace_id)
        for other in self._state.devices:
            is_enough = other.info.is_persistent or not device.info.is_persistent
            if other is device or not is_enough or (other.is_offline and not is_any):
                continue
            records = index.lookup(keys, other.info.index)
            found |= (records["length"] > 0) & (is_any | is_verified(records))
        return found

    def _move(self, device: DeviceState, segment: SegmentState) -> tuple[int, int]:
        """Copy what only this segment has; return blocks and bytes."""
        state = self._state
        namespace = state.namespaces.get(segment.namespace_id)
        with state.lock:
            if namespace is None or segment.status is not SegmentStatus.SEALED:
                return 0, 0
            indices = segment.live_indices()
            indices = indices[~self._is_elsewhere(device, segment, indices)]
        if not len(indices):
            return 0, 0
        lengths = segment.entries["stored_bytes"][indices].astype(np.uint64)
        scratch = np.empty(int(lengths.sum()), np.uint8)
        addresses = np.uint64(scratch.ctypes.data) + np.cumsum(lengths) - lengths
        good = self._reader.read_entries(segment, indices, lengths, addresses)
        chosen = indices[good]
        batch = Batch.of_entries(segment.entries[chosen], addresses[good], lengths[good])
        failure: Exception | None = None
        for target in self._targets(device):
            move = Move(state)
            try:
                runs = self._writer.append(target, namespace, batch, settle=move.hold)
                self._writer.persist_holding(runs)
                move.replace(segment, chosen)
                return len(chosen), int(lengths[good].sum())
            except (NoSpaceError, UnavailableError, PoisonedError) as error:
                failure = error
            finally:
                move.release()
        if failure is not None:
            raise failure
        raise RefusedError(
            f"no other device could take what lies on {device.info.name}: none in service is "
            f"{'persistent' if device.info.is_persistent else 'there'}; 'kvfs-admin device add' one"
        )

    def _forget_moved(self, device: DeviceState, segment: SegmentState) -> None:
        """Forget what others have by now."""
        state = self._state
        with state.lock:
            if segment.status is not SegmentStatus.SEALED:
                return  # its namespace was destroyed meanwhile
            indices = segment.live_indices()
            indices = indices[self._is_elsewhere(device, segment, indices)]
            state.forget(segment.namespace_id, segment.records(indices))

    def _targets(self, device: DeviceState) -> list[DeviceState]:
        """Return the devices in service that are as lasting, fastest tier first."""
        lasting = self._state.tiers(persistent=True)
        if device.info.is_persistent:
            return lasting
        return [*self._state.tiers(persistent=False), *lasting]
