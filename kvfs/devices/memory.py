"""A device made of memory: an arena of memfds, populated once.

Layer: L1.

- The arena is a set of *frames*, each one sealed memfd of `segment_bytes`, mapped and populated
  when it is made (a fresh memfd page costs twelve times a warm one). A log segment borrows a frame
  from `create` to `free`; which slot it was created for does not matter.
- A frame is recycled within one tag. For another tag it is destroyed and a fresh, zeroed one made,
  so that bytes of a former life cannot reach another tenant through a shared descriptor.
- File segments, staging and raw files are memfds of their own size (see `memory_files`). They count
  against the capacity, and free frames are given up for them: frames and files together never
  exceed the capacity.
- All of it, superblock and sidecars included, lies in memfds that a keeper holds, too (see
  `memory_kept`). Opened with a keeper that has them from an earlier owner, the device is what it
  was when that one ended, wherever it ended; without one it is empty, and ends with the process.
- Frames of an earlier owner are read, freed and never written: nobody can.

Concurrency: `_lock` guards frames, ledger and the tables of segments and staging files. A frame is
made (and populated) outside the lock.
"""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from kvfs import _native
from kvfs.devices.base import (
    AddressArray,
    DeviceInfo,
    DigestArray,
    Segment,
    SegmentName,
    StatusArray,
    check_payloads,
    padded_bytes,
    slot_count_of,
)
from kvfs.devices.filesystem import RAW, OSFile, pread_all
from kvfs.devices.keeper import Keeper
from kvfs.devices.ledger import Ledger
from kvfs.devices.memory_files import Frame, MemoryFiles, OpenMemory, key_of, sidecar_key
from kvfs.devices.memory_kept import KeptMemory
from kvfs.errors import NoSpaceError
from kvfs.units import PAGE, format_bytes

Progress = Callable[[int, int], None]

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


def available_bytes() -> int:
    """Return how much memory a new arena may take: MemAvailable, or the control group's limit."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        available = min(available, int(_CGROUP_LIMIT.read_text()))
    return available


def require_available(name: str, wanted_bytes: int, available_bytes: int) -> None:
    """Raise NoSpaceError if there is less memory than a device wants; both in bytes."""
    if wanted_bytes > available_bytes:
        raise NoSpaceError(
            f"not enough memory: {name}: {format_bytes(wanted_bytes)} asked for, "
            f"{format_bytes(available_bytes)} available; give the device a smaller size"
        )


class MemoryDevice(MemoryFiles):
    """Volatile memory; the memfds can be handed to others."""

    def __init__(
        self,
        *,
        index: int,
        uuid: UUID,
        capacity_bytes: int,
        segment_bytes: int,
        name: str,
        tier: int = 0,
        url: str = "dram:",
        progress: Progress | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """Take the memory, all of it, now.

        Args:
            index: See DeviceInfo, as for the rest.
            uuid: Identity.
            capacity_bytes: Bound of frames, files and sidecars together.
            segment_bytes: Size of a frame.
            name: Name for messages.
            tier: Tier.
            url: Where it came from.
            progress: Called with (frames done, frames in all) after each frame.
            keeper: Holds the memory, and has what an earlier owner left in it; stays open. When
                missing, the device's own, which ends with it.

        Raises:
            NoSpaceError: The machine has not that much memory; the message says how much it has.
        """
        self.info = DeviceInfo(
            index=index,
            uuid=uuid,
            name=name,
            url=url,
            kind="dram",
            tier=tier,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            slot_count=slot_count_of(capacity_bytes, segment_bytes),
            is_persistent=False,
            write_atomic_bytes=PAGE,
        )
        self._own_keeper = Keeper() if keeper is None else None
        kept = KeptMemory(
            keeper or self._own_keeper or Keeper(), uuid, name, self.info.slot_count, segment_bytes
        )
        super().__init__(Ledger(name, capacity_bytes), kept)
        try:
            self._inherit()
            wanted = self.info.capacity_bytes - self._ledger.used_bytes
            require_available(name, wanted, available_bytes())
        except BaseException:
            self.close()
            raise
        self._populate(progress)

    def _inherit(self) -> None:
        """Take over what an earlier owner has left with the keeper."""
        kept, nbytes = self._kept, self.info.segment_bytes
        for number, (slot, generation), file in kept.found_frames():
            arena = _native.Arena(file.fd, nbytes, writable=False)
            frame = Frame(file, arena, number, is_fixed=True)
            if self._found(slot, generation, OpenMemory(file, "", frame=frame), nbytes, 0) is None:
                self._end_frame(frame)
        for (slot, generation), file, sidecar in kept.found_files():
            state = OpenMemory(file, "", sidecar=bytearray(sidecar), is_sealed=True)
            size = os.fstat(file.fd).st_size
            if self._found(slot, generation, state, size, len(sidecar)) is None:
                kept.drop_file(slot, generation)
                file.close()
        for number, file in kept.found_raw():
            state = OpenMemory(file, f"{RAW}/{number:016x}")
            self._ledger.put(state.key, os.fstat(file.fd).st_size)
            self._raw[number] = state

    def _found(
        self, slot: int, generation: int, state: OpenMemory, nbytes: int, sidecar_bytes: int
    ) -> OpenMemory | None:
        """Enter a segment of an earlier owner; None if it cannot be one."""
        if slot >= self.info.slot_count or (slot, generation) in self._segments:
            return None
        state.key = key_of(slot, generation)
        try:
            self._ledger.add(state.key, nbytes)
        except NoSpaceError:
            return None
        self._ledger.put(sidecar_key(state.key), sidecar_bytes)
        self._segments[slot, generation] = state
        return state

    def _populate(self, progress: Progress | None) -> None:
        free_bytes = max(0, self.info.capacity_bytes - self._ledger.used_bytes)
        total = free_bytes // self.info.segment_bytes
        try:
            for done in range(total):
                self._free_frames.append(self._make_frame())
                if progress is not None:
                    progress(done + 1, total)
        except BaseException:
            self.close()
            raise

    def _make_frame(self) -> Frame:
        """Make a zeroed, populated frame.

        Raises:
            NoSpaceError: The kernel has no memory left for it.
        """
        nbytes = self.info.segment_bytes
        file = OSFile(-1)
        try:
            file.fd = _native.memfd(f"kvfs-{self.info.name}", nbytes, is_final=False)
            arena = _native.Arena(file.fd, nbytes, populate=True)
            _native.seal_memfd(file.fd)  # from here on only this map can be written to
            return Frame(file, arena, self._kept.keep_frame(file.fd))
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOMEM, errno.ENOSPC, errno.EFAULT):
                raise
            raise NoSpaceError(
                f"memory could not be populated: {self.info.name}: {error.strerror}; "
                "give the device a smaller size"
            ) from error

    # --- superblock
    def read_superblock(self) -> bytes | None:
        """Return the newest superblock, or None on a device never formatted."""
        self._check_open()
        return self._kept.label.superblock

    def write_superblock(self, raw: bytes) -> None:
        """Replace the superblock, in memory."""
        self._check_open()
        self._kept.label.write_superblock(bytes(raw))

    # --- segments
    def segments(self) -> list[SegmentName]:
        """List the segments."""
        self._check_open()
        with self._lock:
            return [
                SegmentName(slot, generation, state.frame is None, os.fstat(state.file.fd).st_size)
                for (slot, generation), state in sorted(self._segments.items(), key=lambda i: i[0])
            ]

    def create(self, slot: int, generation: int, tag: bytes) -> Segment:
        """Make a log segment in a frame that is zero, or held bytes of the same tag."""
        self._check_open()
        assert 0 <= slot < self.info.slot_count
        key = key_of(slot, generation)
        with self._lock:
            self._ledger.add(key, self.info.segment_bytes)
            frame = self._borrow_frame(tag)
        if frame is None:
            try:
                frame = self._make_frame()
            except BaseException:
                self._ledger.drop(key)
                raise
        frame.tag = tag
        state = OpenMemory(frame.file, key, frame=frame)
        with self._lock:
            if self._is_closed:
                self._end_frame(frame)
                self._check_open()
            self._segments[slot, generation] = state
        return self._handle(slot, generation, state)

    def attach(self, name: SegmentName) -> Segment:
        """Return another handle of a segment."""
        self._check_open()
        with self._lock:
            state = self._segments.get((name.slot, name.generation))
        if state is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key_of(*_pair(name)))
        return self._handle(name.slot, name.generation, state)

    def write_payloads(
        self, segment: Segment, offsets: AddressArray, sources: AddressArray,
        lengths: AddressArray, digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Copy n payloads with non-temporal stores and hash them in one pass."""
        self._require_writable(self._state(segment))
        check_payloads(segment, offsets, lengths)
        targets = offsets + np.uint64(segment.address)
        failed = _native.copy_hash(targets, sources, lengths, digests, statuses, PAGE)
        self._count_written(padded_bytes(lengths, statuses))
        return failed

    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Write summary bytes, from `distance` bytes before the end of segment or sidecar."""
        state = self._state(segment)
        self._require_writable(state)
        assert len(data) <= distance, "summary bytes end beyond the segment"
        size = segment.nbytes if state.sidecar is None else len(state.sidecar)
        assert distance <= size, "summary bytes start before the segment"
        if state.frame is not None:
            self._kept.label.set_tail(state.frame.number, distance)
            with memoryview(state.frame.arena) as memory:  # the descriptor is sealed against writes
                memory[size - distance : size - distance + len(data)] = data
        else:
            assert state.sidecar is not None, "a segment has a frame or a sidecar"
            state.sidecar[size - distance : size - distance + len(data)] = data
        self._count_written(len(data))

    def read_tail(self, segment: Segment, nbytes: int) -> bytes:
        """Read the last `nbytes` of the summary; fewer if it is shorter."""
        state = self._state(segment)
        if state.sidecar is not None:
            return bytes(state.sidecar[max(0, len(state.sidecar) - nbytes) :])
        nbytes = min(nbytes, segment.nbytes)
        known = min(nbytes, self._tail_bytes(state))
        return bytes(nbytes - known) + pread_all(segment.fd, segment.nbytes - known, known)

    def next_data(self, segment: Segment, offset: int) -> int:
        """Return `offset`, or in a frame that stays as it is where its summary begins, if later."""
        state = self._state(segment)
        if state.frame is None or not state.frame.is_fixed:
            return min(offset, segment.nbytes)
        return min(max(offset, segment.nbytes - self._tail_bytes(state)), segment.nbytes)

    def _tail_bytes(self, state: OpenMemory) -> int:
        assert state.frame is not None
        return self._kept.label.tail_bytes(state.frame.number)

    def persist(self, segment: Segment) -> None:
        """Note that the segment is there, for the next owner; its bytes are in memory already."""
        frame = self._state(segment).frame
        if frame is not None:
            self._kept.note_frame(frame.number, segment.slot, segment.generation)

    def persist_names(self) -> None:
        """Do nothing."""
        self._check_open()

    def free(self, segment: Segment) -> None:
        """Give the frame back for its tag, or delete the file; no lease may be left."""
        self._check_open()
        with self._lock:
            state = self._segments.pop(_pair(segment), None)
            if state is not None:
                self._ledger.drop(state.key)
                self._ledger.drop(sidecar_key(state.key))
                if state.frame is None:
                    self._kept.drop_file(*_pair(segment))
                    state.file.close()
                elif state.frame.is_fixed:
                    self._end_frame(state.frame)
                else:
                    self._kept.clear_frame(state.frame.number)
                    self._free_frames.append(state.frame)
        self.release(segment)

    def release(self, segment: Segment) -> None:
        """Forget the handle; the segment and its memory stay. Idempotent; fine after `free`."""
        segment.fd = -1
        segment.address = 0

    def read(self, segment: Segment, offset: int, nbytes: int, *, uncached: bool = False) -> bytes:
        """Read payload bytes, fewer at the end; `uncached` makes no difference to memory."""
        self._state(segment)
        del uncached
        return pread_all(segment.fd, offset, nbytes)

    # --- the rest
    @property
    def used_bytes(self) -> int:
        """What counts against the capacity: frames in use, files and sidecars; not free frames."""
        return self._ledger.used_bytes

    @property
    def bytes_written(self) -> int:
        """Payload, staging and summary bytes copied since open."""
        return self._bytes_written

    def destroy(self) -> None:
        """Give all memory back and close."""
        self._check_open()
        self._kept.drop_all()
        self.close()

    def close(self) -> None:
        """Give back the memory that holds nothing, and leave the rest to the keeper; idempotent.

        Maps made elsewhere stay valid.
        """
        with self._lock:
            self._is_closed = True
            for state in (*self._staging, *self._raw.values(), *self._segments.values()):
                if state.frame is not None:
                    state.frame.close()
                else:
                    state.file.close()
            for frame in self._free_frames:
                self._end_frame(frame)
            self._free_frames, self._segments, self._staging = [], {}, set()
            self._raw = {}
            self._kept.label.close()
            if self._own_keeper is not None:
                self._own_keeper.close()

    # --- inside
    def _borrow_frame(self, tag: bytes) -> Frame | None:
        """Return a free frame of this tag or a zero one, or None: make one. REQUIRES: `_lock`.

        Frames of other tags are destroyed only when there is nothing else, the oldest first.
        """
        for wanted in (tag, None):
            for index in reversed(range(len(self._free_frames))):
                if self._free_frames[index].tag == wanted:
                    return self._free_frames.pop(index)
        if self._free_frames:
            self._end_frame(self._free_frames.pop(0))
        return None

    def _require_writable(self, state: OpenMemory) -> None:
        if state.frame is not None and state.frame.is_fixed:
            raise OSError(errno.EROFS, "memory of an earlier owner", state.key)


def _pair(segment: Segment | SegmentName) -> tuple[int, int]:
    return segment.slot, segment.generation
