"""A device made of a directory: one file for each segment.

Layer: L1.

    kvfs.superblock                       replaced by temp, fsync, rename, fsync of the directory
    segments/SSSSSSSS-GGGGGGGG.seg        log segment, exactly `segment_bytes`, space reserved
    segments/SSSSSSSS-GGGGGGGG.file .sum  file segment: one file's bytes, and its sidecar
    staging/NAME raw/NNNNNNNNNNNNNNNN     files that may be written, see `directory_files`
    (S slot, G generation, eight hexadecimal digits each)

- A name is never reused: whoever still maps a freed segment reads its bytes, or zeros, where it was
  shared with a client. Clients are told; nobody keeps space of the medium by a descriptor.
- A sidecar is written and persisted before its payload gets its name: a `.file` whose name has
  survived has a `.sum` unless the crash took that name alone; then no header holds and the engine
  frees it. A `.sum` alone is reaped.
- The capacity counts sizes, not blocks: sparse files and unwritten reservations at their full size.
  The superblock is not counted.
- `write_atomic_bytes` is 512. Filesystems write whole 4 KiB pages, but the block layer promises no
  more than one logical sector across a power cut; NVMe drives that promise 4 KiB (AWUPF) are many,
  not all. The format needs no more than a sector: an entry (128 B) never straddles two, and a torn
  header page fails its checksum before anything depends on it.
- Everything done to the medium goes through FileSystem; reads of cached payloads use descriptors.

Concurrency: the ledger has its own lock, `_lock` guards the set of open handles and the counter; no
lock is held during I/O.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import UUID

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
from kvfs.devices.directory_files import DirectoryFiles, OpenFile, stem_of
from kvfs.devices.filesystem import (
    RAW,
    SEGMENT_FILE,
    SEGMENTS,
    STAGING,
    SUPERBLOCK,
    SUPERBLOCK_NEW,
    File,
    FileSystem,
    pread_all,
)
from kvfs.devices.ledger import Ledger
from kvfs.devices.reflink import Extent

WRITE_ATOMIC_BYTES: Final = 512
_log = logging.getLogger("kvfs.devices")


class DirectoryDevice(DirectoryFiles):
    """One directory below a FileSystem, which it owns and closes."""

    def __init__(
        self,
        files: FileSystem,
        *,
        index: int,
        uuid: UUID,
        capacity_bytes: int,
        segment_bytes: int,
        name: str,
        tier: int = 2,
        url: str = "dir:",
    ) -> None:
        """Make the directories that are missing and count what is there."""
        self.info = DeviceInfo(
            index=index,
            uuid=uuid,
            name=name,
            url=url,
            kind="dir",
            tier=tier,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            slot_count=slot_count_of(capacity_bytes, segment_bytes),
            is_persistent=True,
            write_atomic_bytes=WRITE_ATOMIC_BYTES,
            cloning=files.cloning(),
        )
        self._freed: list[File] = []  # without a name, to be cleared once that is persisted
        super().__init__(files, Ledger(name, capacity_bytes))

    # --- superblock
    def read_superblock(self) -> bytes | None:
        """Return the newest superblock, or None on a device never formatted."""
        self._check_open()
        return self._files.read(SUPERBLOCK)

    def write_superblock(self, raw: bytes) -> None:
        """Replace the superblock atomically. Durability: persist."""
        self._check_open()
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(SUPERBLOCK_NEW)  # left by a crash
        self._write_new(SUPERBLOCK_NEW, raw)
        self._files.rename(SUPERBLOCK_NEW, SUPERBLOCK)
        self._files.sync_directory(".")

    # --- segments
    def segments(self) -> list[SegmentName]:
        """List the segments on the medium; unreadable names are left out."""
        self._check_open()
        found = []
        for path, nbytes in self._scan(SEGMENTS):
            match = SEGMENT_FILE.match(path.rpartition("/")[2])
            assert match is not None
            slot, generation, kind = int(match[1], 16), int(match[2], 16), match[3]
            if kind != "sum" and slot < self.info.slot_count:
                found.append(SegmentName(slot, generation, kind == "file", nbytes))
        return found

    def create(self, slot: int, generation: int, tag: bytes) -> Segment:
        """Make a log segment, zeroed and with its space reserved; a failure leaves nothing."""
        self._check_open()
        assert 0 <= slot < self.info.slot_count
        del tag  # a directory never hands out bytes of a former life
        path = f"{stem_of(slot, generation)}.seg"
        file = self._create(path, self.info.segment_bytes)
        return self._handle(slot, generation, self._opened(OpenFile(file, path)))

    def attach(self, name: SegmentName) -> Segment:
        """Open an existing segment; a log segment for writing too."""
        self._check_open()
        stem = stem_of(name.slot, name.generation)
        if name.is_file:
            state = OpenFile(self._files.open(f"{stem}.file"), f"{stem}.file", f"{stem}.sum")
        else:
            state = OpenFile(self._files.open(f"{stem}.seg", writable=True), f"{stem}.seg")
        found = self._handle(name.slot, name.generation, self._opened(state))
        found.keeps_bytes = True  # views of clients outlive an owner, and his successor is no party
        return found

    def write_payloads(
        self, segment: Segment, offsets: AddressArray, sources: AddressArray,
        lengths: AddressArray, digests: DigestArray, statuses: StatusArray,
    ) -> int:  # fmt: skip
        """Write n payloads and hash them in one pass; zero-fill each up to the next 4 KiB."""
        state = self._state(segment)
        check_payloads(segment, offsets, lengths)
        failed = state.file.write_hashed(offsets, sources, lengths, digests, statuses)
        self._count_written(padded_bytes(lengths, statuses))
        return failed

    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Write summary bytes, from `distance` bytes before the end of segment or sidecar."""
        state = self._state(segment)
        assert len(data) <= distance, "summary bytes end beyond the segment"
        if segment.is_file:
            with self._sidecar(state, writable=True) as (file, nbytes):
                assert distance <= nbytes, "summary bytes start before the sidecar"
                state.is_sidecar_dirty = True
                file.write(nbytes - distance, data)
        else:
            assert distance <= segment.nbytes, "summary bytes start before the segment"
            state.file.write(segment.nbytes - distance, data)
        self._count_written(len(data))

    def read_tail(self, segment: Segment, nbytes: int) -> bytes:
        """Read the last `nbytes` of the summary; fewer if it is shorter, none without a sidecar."""
        state = self._state(segment)
        if not segment.is_file:
            return _pread_tail(segment.fd, segment.nbytes, nbytes)
        try:
            with self._sidecar(state) as (file, size):
                return _pread_tail(file.fd, size, nbytes)
        except FileNotFoundError:
            return b""

    def next_data(self, segment: Segment, offset: int) -> int:
        """Return the first offset at or after `offset` that may hold data, or `nbytes`."""
        self._state(segment)
        try:
            return min(os.lseek(segment.fd, offset, os.SEEK_DATA), segment.nbytes)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole from here on
                return segment.nbytes
            raise

    def persist(self, segment: Segment) -> None:
        """Make all written to the segment survive a power cut. Durability: persist."""
        state = self._state(segment)
        state.file.sync()
        if state.is_sidecar_dirty:
            with self._sidecar(state, writable=True) as (file, _):
                file.sync()
            state.is_sidecar_dirty = False

    def persist_names(self) -> None:
        """Make all names created, adopted or freed survive a power cut. Durability: persist.

        An adopted name leaves one directory for another: the target is persisted first, so that
        the file is never in neither.
        """
        self._check_open()
        with self._lock:
            freed, self._freed = self._freed, []
        try:
            self._sync_names()
        except BaseException:
            with self._lock:
                self._freed += freed
            raise
        for file in freed:
            self._clear(file)

    def clear_freed(self) -> None:
        """Persist names, if there is anything to clear."""
        if self._freed:
            self.persist_names()

    def _sync_names(self) -> None:
        if self._is_raw_changed:
            self._is_raw_changed = False
            try:
                self._files.sync_directory(RAW)
            except BaseException:
                self._is_raw_changed = True
                raise
        for folder in (SEGMENTS, STAGING):
            self._files.sync_directory(folder)

    def free(self, segment: Segment) -> None:
        """Unlink the segment and close the handle; what is shared is cleared later.

        The payload goes first: a sidecar alone is reaped at the next open.
        """
        self._check_open()
        state: OpenFile = segment.state
        if segment.is_shared and not segment.keeps_bytes:
            self._unlink_to_clear(state.path)
        else:
            self._unlink(state.path)
        if state.sidecar_path:
            self._unlink(state.sidecar_path)
        self.release(segment)

    def release(self, segment: Segment) -> None:
        """Close the handle's descriptors; the segment stays. Idempotent; fine after `free`."""
        self._done(segment.state)
        segment.fd = -1

    def read(self, segment: Segment, offset: int, nbytes: int, *, uncached: bool = False) -> bytes:
        """Read payload bytes, fewer at the end; uncached ones from the medium itself."""
        state = self._state(segment)
        if uncached:
            return self._files.read_uncached(state.path, offset, nbytes)
        return pread_all(segment.fd, offset, nbytes)

    def assemble(self, extents: Sequence[Extent], nbytes: int) -> int:
        """Share them by reflink; see `kvfs.devices.reflink`."""
        self._check_open()
        return self._files.assemble(extents, nbytes)

    # --- the rest
    @property
    def used_bytes(self) -> int:
        """What counts against the capacity; sizes rounded up to 4 KiB."""
        return self._ledger.used_bytes

    @property
    def bytes_written(self) -> int:
        """Payload, staging and summary bytes handed to the filesystem since open."""
        return self._bytes_written

    def location(self) -> int:
        """Return what tells this directory from a copy of it."""
        self._check_open()
        return self._files.location()

    def destroy(self) -> None:
        """Delete everything kvfs made in the directory, the superblock first, and close.

        A crash half-way leaves a directory that is not formatted, never half a device.
        """
        self._check_open()
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(SUPERBLOCK)
        self._files.sync_directory(".")
        self._close_handles()
        try:
            self._files.remove_tree()
        finally:
            self._files.close()

    def close(self) -> None:
        """Close all descriptors and the filesystem; idempotent."""
        if not self._is_closed:
            with contextlib.suppress(OSError):  # then whoever has them open keeps their space
                self.clear_freed()
            self._close_handles()
            self._files.close()

    # --- inside
    @contextlib.contextmanager
    def _sidecar(self, state: OpenFile, *, writable: bool = False) -> Iterator[tuple[File, int]]:
        """Open the sidecar for one operation; kept open they would double the descriptors."""
        file = self._files.open(state.sidecar_path, writable=writable)
        try:
            yield file, os.fstat(file.fd).st_size
        finally:
            file.close()

    def _unlink_to_clear(self, path: str) -> None:
        """Unlink what is shared; a failure leaves it as it was. Nothing if it is gone already."""
        try:
            file = self._files.open(path, writable=True)
        except FileNotFoundError:
            return
        try:
            self._unlink(path)
        except BaseException:
            file.close()
            raise
        with self._lock:
            self._freed.append(file)

    def _clear(self, file: File) -> None:
        try:
            file.clear()
        except OSError as error:
            _log.warning(
                "%s: a freed segment takes space as long as a client has it open; end such clients "
                "to get it back: %s", self.info.name, error,
            )  # fmt: skip
        finally:
            file.close()


def _pread_tail(fd: int, size: int, nbytes: int) -> bytes:
    start = max(0, size - nbytes)
    return pread_all(fd, start, size - start)
