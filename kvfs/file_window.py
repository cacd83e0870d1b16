"""The window of an open file: where the bytes of a run of its blocks lie, resolved once.

Layer: L4.

- Reads of a file come in small pieces. Looking blocks up, leasing and verifying them for each piece
  costs ten times what copying the piece does, so an open file keeps a lease on the blocks around
  its last read.
- A lease keeps segments from being given back, so a window is let go when it has not been used for
  a while (`FileContents.release_idle`); the file's pins keep the blocks themselves.
- A block is verified before its first byte is served.
"""

import os
from typing import TYPE_CHECKING

import numpy as np

from kvfs import _native
from kvfs.engine.segment_table import group_by_segment, is_verified
from kvfs.engine.store import Store
from kvfs.keys import KeyArray
from kvfs.units import PAGE

if TYPE_CHECKING:
    from kvfs.devices.base import Meter

WINDOW_BLOCKS = 1024


class LostBlockError(Exception):
    """Raised if a block cannot be read from where it was; another copy may be elsewhere."""


class Window:
    """Leased places of blocks [first, last) of a file. Not thread-safe but for reading.

    Attributes:
        users: Reads at work in it.
        used_ns: When the last one began.
    """

    def __init__(
        self, store: Store, namespace_id: int, keys: KeyArray, stride: int, at: int
    ) -> None:
        """Lease the blocks around one."""
        self.first = at // WINDOW_BLOCKS * WINDOW_BLOCKS
        self.last = min(len(keys), self.first + WINDOW_BLOCKS)
        self.users = 0
        self.used_ns = 0
        self.is_retired = False
        self._store = store
        self._namespace_id = namespace_id
        self._stride = stride
        self._lease = store.lease(namespace_id, keys[self.first : self.last], verify=False)
        records = self._lease.records
        fds = np.full(len(records), -1, np.int64)
        addresses = np.zeros(len(records), np.uint64)
        vouched = is_verified(records)
        in_memory = np.zeros(len(records), np.bool_)
        self._meters: dict[int, Meter] = {}  # of devices that want to know
        for device, slot, generation, positions in group_by_segment(records):
            segment = store.state.segment_of(device, slot, generation)
            assert segment is not None, "a leased segment is there"
            fds[positions] = -1 if segment.handle.address else segment.handle.fd
            addresses[positions] = segment.handle.address
            # A memory file never makes its reader wait, and does not know RWF_NOWAIT.
            below = store.state.device(device).device
            in_memory[positions] = not below.info.is_persistent
            if below.meter is not None:
                self._meters[device] = below.meter
            if not store.state.options.verify_reads and not segment.needs_verify:
                vouched[positions] = True
        self._offsets: list[int] = (records["page"].astype(np.int64) * PAGE).tolist()
        self._lengths: list[int] = records["length"].tolist()
        self._fds: list[int] = fds.tolist()
        self._addresses: list[int] = addresses.tolist()
        self._is_vouched: list[bool] = vouched.tolist()
        self._in_memory: list[bool] = in_memory.tolist()
        self._devices: list[int] = records["device"].tolist()
        self._file_bytes = store.state.counters[namespace_id].file_bytes

    def covers(self, first: int, last: int) -> bool:
        """Say whether blocks [first, last) lie inside."""
        return self.first <= first and last <= self.last

    def is_vouched(self, first: int, last: int) -> bool:
        """Say whether blocks [first, last) were verified."""
        return all(self._is_vouched[first - self.first : last - self.first])

    def vouch(self, first: int, last: int) -> None:
        """Verify blocks [first, last) where that was not done.

        Raises:
            LostBlockError: One is missing or bad; the bad ones were dropped.
        """
        low, high = first - self.first, last - self.first
        todo = [i for i in range(low, high) if not self._is_vouched[i]]
        if not todo:
            return
        good = self._store.verified(np.ascontiguousarray(self._lease.records[todo]))
        for i, is_good in zip(todo, good.tolist(), strict=True):
            self._is_vouched[i] = is_good
        if not good.all():
            raise LostBlockError(f"verification failed: {len(good)} blocks from {first}")

    def copy(self, offset: int, target: memoryview, *, wait: bool = True) -> bool:
        """Fill the target with the file's bytes from `offset` on; all must lie inside.

        REQUIRES: the blocks are vouched for.

        Returns:
            False without `wait`, if the bytes are not in memory.

        Raises:
            LostBlockError: A block cannot be read.
        """
        position, end = offset, offset + target.nbytes
        while position < end:
            block, inner = divmod(position, self._stride)
            i = block - self.first
            stop = min(end, (block + 1) * self._stride)
            have = max(0, min(self._lengths[i] - inner, stop - position))
            if not self._lengths[i]:
                raise LostBlockError(f"block {block} is missing")
            low, meter = position - offset, self._meters.get(self._devices[i])
            if meter is not None and not wait:
                return False  # it may take its time
            if have and not self._copy_part(i, inner, target[low : low + have], wait=wait):
                return False
            self._file_bytes[self._devices[i]] += have
            if meter is not None:
                meter.note_read(have)
            if have < stop - position:
                target[low + have : stop - offset] = bytes(stop - position - have)
            position = stop
        return True

    def release(self) -> None:
        """Let go of the lease. REQUIRES: no users."""
        self._store.release(self._lease)

    def _copy_part(self, i: int, inner: int, part: memoryview, *, wait: bool) -> bool:
        start = self._offsets[i] + inner
        if self._addresses[i]:
            statuses = np.zeros(1, np.int32)
            target, nbytes = _native.buffer_address(part, True)
            _native.copy_verify(
                np.array([target], np.uint64),
                np.array([self._addresses[i] + start], np.uint64),
                np.array([nbytes], np.uint64),
                None,
                statuses,
            )
            if statuses[0]:
                self._drop(i)
                raise LostBlockError(f"memory fault: block {i + self.first}")
            return True
        done = 0
        flags = 0 if wait or self._in_memory[i] else os.RWF_NOWAIT
        while done < part.nbytes:
            try:
                count = os.preadv(self._fds[i], [part[done:]], start + done, flags)
            except OSError as error:
                if not wait:
                    return False
                self._drop(i)
                raise LostBlockError(f"read failed: block {i + self.first}: {error}") from error
            if count == 0:
                self._drop(i)
                raise LostBlockError(f"segment is too short: block {i + self.first}")
            done += count
        return True

    def _drop(self, i: int) -> None:
        """Forget a copy that could not be read."""
        record = np.ascontiguousarray(self._lease.records[i : i + 1])
        self._store.state.counters[self._namespace_id].bad_reads[self._devices[i]] += 1
        self._store.state.note_faults(record)
        self._store.state.forget(self._namespace_id, record)
        self._store.state.count_broken_pins(self._namespace_id, record["key"])
