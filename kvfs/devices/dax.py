"""A device made of mapped memory that stays: devdax, or a file in its place.

Layer: L1.

- The whole device is mapped once; `dax_layout` says what lies where. A segment borrows a place
  from `create` to `free`; which slot it was created for does not matter.
- A place is filled with zeros when it is given to a segment, so that no bytes of a former life
  reach another tenant, or are taken for this life's.
- Payloads go past the caches; summary, labels and superblock are stored and written back. A write
  is in the persistence domain when it returns, so that `persist` has nothing left to do on DAX; a
  file's pages are persisted by fdatasync.
- What cannot be read or written any more is noted in the header, and a place with such a range is
  given to nobody again: it counts as used.
- There is one descriptor for all tenants: this process maps views from it, and nobody else does.

Concurrency: `_lock` guards the tables and the header; no lock is held while a place is filled.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterable
from uuid import UUID

import numpy as np

from kvfs.devices import dax_layout as layout
from kvfs.devices.base import (
    AddressArray,
    Backing,
    DeviceInfo,
    DigestArray,
    Segment,
    SegmentName,
    StatusArray,
    check_payloads,
    padded_bytes,
    slot_count_of,
)
from kvfs.devices.dax_copies import SuperblockCopies
from kvfs.devices.dax_layout import Range
from kvfs.devices.dax_memory import DaxMemory
from kvfs.devices.dax_source import DaxSource, require_room
from kvfs.devices.fileless import FilelessDevice
from kvfs.devices.ledger import Ledger
from kvfs.errors import ClosedError, NoSpaceError, UsageError
from kvfs.units import PAGE, align_up, format_bytes

_log = logging.getLogger("kvfs.devices")
_STORE_BYTES = 8  # an aligned store of so many never tears
_SECTOR_BYTES = 512  # neither does a file's sector
_LABELS_PER_PAGE = PAGE // layout.LABEL_BYTES
_BAD_OFFSETS = range(layout.BAD_OFFSET, layout.HEADER_BYTES, layout.BAD_BYTES)


class DaxDevice(FilelessDevice):
    """One DAX device, or a file of a multiple of 2 MiB."""

    def __init__(
        self,
        source: DaxSource,
        *,
        index: int,
        uuid: UUID,
        capacity_bytes: int,
        segment_bytes: int,
        name: str,
        tier: int = 1,
        url: str = "dax:",
    ) -> None:
        """Map it and read its labels; takes the descriptor over, also if that fails.

        Raises:
            UsageError: Too small for header and capacity, or too many segments.
            OSError: It cannot be mapped, or its header cannot be read.
        """
        self.info = DeviceInfo(
            index=index,
            uuid=uuid,
            name=name,
            url=url,
            kind="dax",
            tier=tier,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            slot_count=slot_count_of(capacity_bytes, segment_bytes),
            is_persistent=source.is_persistent,
            write_atomic_bytes=_SECTOR_BYTES if source.is_file else _STORE_BYTES,
            takes_files=False,
            persistence=source.persistence,
        )
        self._source = source
        self._ledger = Ledger(name, capacity_bytes)
        self._lock = threading.Lock()
        self._segments: dict[tuple[int, int], int] = {}  # their places
        self._free: list[int] = []
        self._bad: list[Range] = []
        self._copies: SuperblockCopies | None = None  # of the writer
        self._bytes_written = 0
        self._is_closed = False
        self._memory: DaxMemory | None = None
        try:
            self._open(capacity_bytes // segment_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, places: int) -> None:
        """Map and read the labels."""
        info, source = self.info, self._source
        require_room(info.url, source.nbytes, layout.HEADER_BYTES + places * info.segment_bytes)
        if places > layout.PLACES_MAX:
            raise UsageError(
                f"too many segments: {info.url}: expected at most {layout.PLACES_MAX}, found "
                f"{places}; give a larger segment than {format_bytes(info.segment_bytes)}"
            )
        memory = self._memory = source.map()
        for first in range(0, places, _LABELS_PER_PAGE):
            self._read_labels(memory, first, min(places, first + _LABELS_PER_PAGE))
        self._free.reverse()  # taken from the end: the first place first
        known: list[Range] = []
        for offset in _BAD_OFFSETS:
            with contextlib.suppress(OSError):  # what it would say is found again
                known += layout.decode_bad(memory.read(offset, layout.BAD_BYTES))
        self._bad = layout.merged([*known, *source.bad])
        self._retire()

    def _read_labels(self, memory: DaxMemory, first: int, end: int) -> None:
        """Enter the places [first, end), whose labels lie in one page."""
        info = self.info
        try:
            raw = memory.read(_label_offset(first), (end - first) * layout.LABEL_BYTES)
        except OSError as error:
            for place in range(first, end):
                self._ledger.put(_bad_key(place), info.segment_bytes)
            _log.warning("labels of %s cannot be read, %d places are lost: %s",
                         info.name, end - first, error)  # fmt: skip
            return
        for place in range(first, end):
            start = (place - first) * layout.LABEL_BYTES
            name = layout.decode_label(info.uuid, place, raw[start : start + layout.LABEL_BYTES])
            if name is None or name[0] >= info.slot_count or name in self._segments:
                self._free.append(place)
            else:
                self._segments[name] = place
                self._ledger.add(_key_of(*name), info.segment_bytes)

    # --- superblock
    def read_superblock(self) -> bytes | None:
        """Return the newest superblock, or None on a device never formatted.

        Raises:
            CorruptionError: Fewer copies hold than are needed to be sure which is the newest.
        """
        return SuperblockCopies(self._opened(), self.info.name).read()

    def write_superblock(self, raw: bytes) -> None:
        """Write all copies, one after the other. Durability: persist.

        Raises:
            OSError: Fewer copies were written than must be; or the superblock is too large.
        """
        memory = self._opened()
        with self._lock:
            if self._copies is None:
                self._copies = SuperblockCopies(memory, self.info.name)
            self._copies.write(bytes(raw))
        if self._source.deep_flush is not None:
            self._source.deep_flush()

    # --- segments
    def segments(self) -> list[SegmentName]:
        """List the segments that have a place."""
        self._check_open()
        with self._lock:
            return [SegmentName(*name, False, self.info.segment_bytes)
                    for name in sorted(self._segments)]  # fmt: skip

    def create(self, slot: int, generation: int, tag: bytes) -> Segment:
        """Make a log segment in a free place, filled with zeros. Durability: flush.

        The former life has lost its label for good before its bytes are overwritten, and the place
        has its new one only when they are zero for good: what a label names is whole.
        """
        memory = self._opened()
        assert 0 <= slot < self.info.slot_count
        del tag  # nobody sees bytes of a former life
        nbytes = self.info.segment_bytes
        self._ledger.add(_key_of(slot, generation), nbytes)
        place = -1
        try:
            while True:
                place = self._take_place()
                if memory.faults(_label_offset(place), layout.LABEL_BYTES):
                    self._lose(place)
                    place = -1
                    continue
                memory.persist()
                try:
                    memory.zero(self._start(place), nbytes)
                    break
                except OSError:
                    whole = [(self._start(place), nbytes)]
                    self._note(memory.faults(self._start(place), nbytes) or whole, place)
            memory.persist()
            label = layout.encode_label(self.info.uuid, place, slot, generation)
            memory.store(_label_offset(place), label)
        except BaseException:
            self._ledger.drop(_key_of(slot, generation))
            with self._lock:
                if place >= 0:
                    self._give_back(place)
            raise
        with self._lock:
            self._segments[slot, generation] = place
        return self._handle(slot, generation, place)

    def attach(self, name: SegmentName) -> Segment:
        """Return another handle of a segment."""
        self._check_open()
        with self._lock:
            place = self._segments.get((name.slot, name.generation))
        if place is None or name.is_file:
            key = _key_of(name.slot, name.generation)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
        return self._handle(name.slot, name.generation, place)

    def write_payloads(
        self, segment: Segment, offsets: AddressArray, sources: AddressArray,
        lengths: AddressArray, digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Copy n payloads with non-temporal stores, hash them in one pass, and fence."""
        memory = self._of(segment)
        check_payloads(segment, offsets, lengths)
        targets = offsets + np.uint64(segment.address)
        failed = memory.copy_payloads(targets, sources, lengths, digests, statuses)
        for item in np.flatnonzero(statuses) if failed else ():
            self.note_bad(segment, int(offsets[item]), align_up(int(lengths[item]), PAGE))
        self._count_written(padded_bytes(lengths, statuses))
        return failed

    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Store summary bytes, from `distance` bytes before the end, and write them back."""
        memory = self._of(segment)
        assert len(data) <= distance, "summary bytes end beyond the segment"
        assert distance <= segment.nbytes, "summary bytes start before the segment"
        start = segment.nbytes - distance
        try:
            memory.store(self._start(segment.state) + start, bytes(data))
        except OSError:
            self.note_bad(segment, start, len(data))
            raise
        self._count_written(len(data))

    def read_tail(self, segment: Segment, nbytes: int) -> bytes:
        """Read the last `nbytes`; fewer if the segment is shorter."""
        nbytes = min(nbytes, segment.nbytes)
        return self.read(segment, segment.nbytes - nbytes, nbytes)

    def next_data(self, segment: Segment, offset: int) -> int:
        """Return `offset`: memory has no holes."""
        self._of(segment)
        return min(offset, segment.nbytes)

    def persist(self, segment: Segment) -> None:
        """Persist a file's pages; nothing is left to do on DAX. Durability: persist."""
        self._of(segment).persist()

    def persist_names(self) -> None:
        """Persist the labels of a file; nothing is left to do on DAX. Durability: persist."""
        self._opened().persist()

    def free(self, segment: Segment) -> None:
        """Take the label away and give the place back; no lease may be left.

        Raises:
            OSError: The label cannot be written; the segment stays.
        """
        memory = self._opened()
        name = (segment.slot, segment.generation)
        with self._lock:
            place = self._segments.get(name)
            if place is not None:
                memory.store(_label_offset(place), bytes(layout.LABEL_BYTES))
                del self._segments[name]
                self._ledger.drop(_key_of(*name))
                self._give_back(place)
        self.release(segment)

    def release(self, segment: Segment) -> None:
        """Forget the handle; the segment stays. Idempotent; fine after `free`."""
        segment.state = None
        segment.address = 0
        segment.part = None

    def read(self, segment: Segment, offset: int, nbytes: int, *, uncached: bool = False) -> bytes:
        """Read payload bytes, fewer at the end; `uncached` makes no difference to memory."""
        memory = self._of(segment)
        del uncached
        nbytes = max(0, min(nbytes, segment.nbytes - offset))
        if not nbytes:
            return b""
        try:
            return memory.read(self._start(segment.state) + offset, nbytes)
        except OSError:
            self.note_bad(segment, offset, nbytes)
            raise

    def note_bad(self, segment: Segment, offset: int, nbytes: int) -> None:
        """Try every page of a range, and remember those that fail."""
        if segment.state is not None and not self._is_closed:
            place: int = segment.state
            self._note(self._opened().faults(self._start(place) + offset, nbytes), place)

    # --- the rest
    @property
    def bad_ranges(self) -> list[Range]:
        """What cannot be read or written: offsets on the device and lengths, in bytes."""
        with self._lock:
            return list(self._bad)

    @property
    def used_bytes(self) -> int:
        """What counts against the capacity: segments, and places that went bad."""
        return self._ledger.used_bytes

    @property
    def bytes_written(self) -> int:
        """Payload and summary bytes stored since open; not the zeros of fresh segments."""
        return self._bytes_written

    def location(self) -> int:
        """Return what tells a file from a copy; 0 for a DAX device, which nothing does."""
        self._check_open()
        return self._source.location if self.info.is_persistent else 0

    def destroy(self) -> None:
        """Take superblock and labels away, and close. The bad ranges stay known."""
        memory = self._opened()
        memory.zero(0, layout.LABELS_OFFSET)
        memory.persist()
        memory.zero(layout.LABELS_OFFSET, layout.BAD_OFFSET - layout.LABELS_OFFSET)
        memory.persist()
        self.close()

    def close(self) -> None:
        """Unmap, and let the lock go; idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._memory is not None:
            self._memory.close()
        self._source.close()

    # --- inside
    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"device is closed: {self.info.name}")

    def _opened(self) -> DaxMemory:
        self._check_open()
        assert self._memory is not None, "an open device is mapped"
        return self._memory

    def _of(self, segment: Segment) -> DaxMemory:
        memory = self._opened()
        if segment.state is None:
            raise ClosedError(f"handle is closed: {self.info.name}: {segment}")
        return memory

    def _handle(self, slot: int, generation: int, place: int) -> Segment:
        return Segment(
            device_index=self.info.index,
            slot=slot,
            generation=generation,
            is_file=False,
            nbytes=self.info.segment_bytes,
            fd=-1,
            address=self._opened().address + self._start(place),
            state=place,
            part=Backing(self._source.fd, self._start(place), self._source.granularity),
        )

    def _start(self, place: int) -> int:
        return layout.HEADER_BYTES + place * self.info.segment_bytes

    def _take_place(self) -> int:
        with self._lock:
            if not self._free:
                raise NoSpaceError(f"device is full: {self.info.name}: the places left are bad")
            return self._free.pop()

    def _give_back(self, place: int) -> None:
        """Make a place free, unless it is bad. REQUIRES: `_lock`."""
        if any(self._places_of([one]) & {place} for one in self._bad):
            self._ledger.put(_bad_key(place), self.info.segment_bytes)
        else:
            self._free.append(place)

    def _lose(self, place: int) -> None:
        """Take a place that was free out of use: its label cannot be kept."""
        self._ledger.put(_bad_key(place), self.info.segment_bytes)
        _log.warning("a place of %s is lost: its label cannot be read", self.info.name)

    def _note(self, ranges: list[Range], place: int) -> None:
        """Remember bad ranges of a place that is in use, or taken."""
        if not ranges:
            return
        with self._lock:
            self._bad = layout.merged([*self._bad, *ranges])
            raw = layout.encode_bad(self._bad)
            for offset in _BAD_OFFSETS:
                try:
                    self._opened().store(offset, raw)
                    self._opened().persist()
                except OSError as error:
                    _log.warning("bad ranges of %s are not kept: %s", self.info.name, error)
            if place not in self._segments.values():  # else once it is freed
                self._ledger.put(_bad_key(place), self.info.segment_bytes)
                if place in self._free:
                    self._free.remove(place)
        _log.warning("memory is bad: %s: %s from offset %#x", self.info.name,
                     format_bytes(sum(nbytes for _, nbytes in ranges)), ranges[0][0])  # fmt: skip

    def _retire(self) -> None:
        """Take places with bad ranges out of the free ones."""
        bad = self._places_of(self._bad)
        for place in bad & set(self._free):
            self._ledger.put(_bad_key(place), self.info.segment_bytes)
        self._free = [place for place in self._free if place not in bad]

    def _places_of(self, ranges: Iterable[Range]) -> set[int]:
        nbytes = self.info.segment_bytes
        found: set[int] = set()
        for offset, length in ranges:
            first = (offset - layout.HEADER_BYTES) // nbytes
            last = (offset + length - 1 - layout.HEADER_BYTES) // nbytes
            found.update(range(max(0, first), last + 1))
        return found

    def _count_written(self, nbytes: int) -> None:
        with self._lock:
            self._bytes_written += nbytes


def _key_of(slot: int, generation: int) -> str:
    return f"{slot:08x}-{generation:08x}"


def _bad_key(place: int) -> str:
    return f"bad {place}"


def _label_offset(place: int) -> int:
    return layout.LABELS_OFFSET + place * layout.LABEL_BYTES
