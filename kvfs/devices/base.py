"""What the engine asks of a backing store.

Layer: L1.

- A device holds *segments*, each named by (slot, generation). A slot is a small number that indexes
  tables; a generation is never used twice for the same slot, across crashes too, so a name is never
  reused.
- A device does what it is told and keeps no policy: the engine decides what to create, persist and
  free, and when.
- The engine calls a device from several threads; a device serialises its own book-keeping. Two
  threads never write the same segment, or the same staging file, at the same time.
- Verbs: `write` hands bytes to the device, `persist` makes them survive power loss. `create`,
  `adopt`, `keep_raw` and `free` change names; a changed name survives only after `persist_names`.
- After an OSError nothing is assumed of the bytes concerned (see "fsync failure", Rebello et al.,
  ATC'20).
- After `close` every method but `release` and `close` raises ClosedError.
"""

import errno
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.reflink import NOTHING, Cloning, Extent
from kvfs.emulation import UNKNOWN, LinkFigures
from kvfs.units import PAGE

SHORT_READ: Final = 2  # a status of native batches
SLOTS_SPARE: Final = 64
SLOT_COUNT_MAX: Final = 1 << 24

AddressArray = npt.NDArray[np.uint64]
DigestArray = npt.NDArray[np.uint8]
StatusArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a device is. Constant while it is open.

    Attributes:
        index: Number of the device in its pool, at most 255; never reused within a pool.
        kind: URL scheme.
        capacity_bytes: Hard bound for `used_bytes`.
        slot_count: Slots are 0 .. slot_count - 1; see `slot_count_of`.
        is_persistent: Persisted bytes survive a crash of process and machine (as far as the medium
            below does: a directory on tmpfs survives the process only).
        write_atomic_bytes: Largest aligned write that a power cut never tears.
        cloning: Which parts of its segments `assemble` can share.
        takes_files: Whether it takes staging, file segments and raw files; else those methods
            raise OSError with EOPNOTSUPP.
        persistence: Of mapped media, what holds stored bytes when the power fails: "cpu_cache" (a
            store is enough), "memory_controller" (once its line is written back), "page" (after
            fdatasync), "none"; "" elsewhere.
        figures: How fast it is, as far as the kernel, or an emulation, tells.
        filesystem: That of a directory, "" elsewhere.
        cache: How payloads of a directory pass the page cache: "page", "dontcache", "direct".
        io: What moves them past it: "io_uring" or "threads".
    """

    index: int
    uuid: uuid.UUID
    name: str
    url: str
    kind: str
    tier: int
    capacity_bytes: int
    segment_bytes: int
    slot_count: int
    is_persistent: bool
    write_atomic_bytes: int
    cloning: Cloning = NOTHING
    takes_files: bool = True
    persistence: str = ""
    figures: LinkFigures = UNKNOWN
    filesystem: str = ""
    cache: str = ""
    io: str = ""


def slot_count_of(capacity_bytes: int, segment_bytes: int) -> int:
    """Return how many slots a device has: enough that its capacity runs out first.

    A file smaller than a quarter of a segment goes into the log, so that no more than four segments
    share the space of one; 64 are spare for segments on their way in or out. At most 2**24.
    """
    return min(SLOT_COUNT_MAX, 4 * -(-capacity_bytes // segment_bytes) + SLOTS_SPARE)


@dataclass(frozen=True, slots=True)
class SegmentName:
    """A segment found on the medium. `payload_bytes` is the payload file's size."""

    slot: int
    generation: int
    is_file: bool
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Backing:
    """Where this process can map a payload from.

    Attributes:
        fd: A descriptor that others may share.
        offset: Where in it the payload starts, in bytes.
        granularity: Maps start and end at multiples of it, in the file and in memory; bytes.
    """

    fd: int
    offset: int = 0
    granularity: int = PAGE


@dataclass(slots=True, eq=False)
class Segment:
    """A handle of one segment.

    Attributes:
        is_file: File segment: payload in one file, summary in a sidecar.
        nbytes: Size of the payload file or slot.
        fd: Descriptor of the payload alone, valid until `Device.release` or `free`. -1 if there is
            none: then `address` is set.
        address: Where the payload is mapped in this process, 0 if it is not.
        state: The device's own.
        is_fixed: Nobody can write it any more; it is not to be resumed.
        is_shared: Another process has a descriptor of it, and may keep it for ever.
        keeps_bytes: Who has it open may read it on after `free`: the kernel for a mount, or whoever
            had it of an owner before.
        part: Without `fd`, the part of the device's own descriptor that is the payload; not to be
            handed on.
    """

    device_index: int
    slot: int
    generation: int
    is_file: bool
    nbytes: int
    fd: int
    address: int
    state: Any = None
    is_fixed: bool = False
    is_shared: bool = False
    keeps_bytes: bool = False
    part: Backing | None = None

    @property
    def backing(self) -> Backing:
        """What views map."""
        return self.part or Backing(self.fd)


@dataclass(slots=True, eq=False)
class Staging:
    """A file that may be written: one that is not part of the log yet, or a raw file.

    Attributes:
        fd: Serves reads; `adopt` hands on what it is open on. `seal_staging` replaces it.
        nbytes: Its size; behind the truth while somebody else writes (see `settle_staging`).
        reserved_bytes: Size up to which capacity is taken, for somebody else to write.
    """

    name: str
    fd: int
    nbytes: int
    state: Any = None
    reserved_bytes: int = 0


def check_payloads(segment: Segment, offsets: AddressArray, lengths: AddressArray) -> None:
    """Assert what `Device.write_payloads` requires; a stray offset would overwrite a neighbour."""
    assert not segment.is_file, "file segments are made by adopt and never written"
    assert not (offsets & np.uint64(PAGE - 1)).any(), "payloads start at multiples of 4 KiB"
    limit = np.uint64(segment.nbytes)
    assert (offsets <= limit).all(), "payload starts beyond the segment"
    assert (lengths <= limit - offsets).all(), "payload ends beyond the segment"


def padded_bytes(lengths: AddressArray, statuses: StatusArray) -> int:
    """Return the bytes that a batch handed to the medium: each payload done, with its padding."""
    below = np.uint64(PAGE - 1)
    padded = (lengths + below) & ~below
    return int((padded[statuses == 0] if statuses.any() else padded).sum())


class Meter(Protocol):
    """Who wants to know of reads that go past the device, at `Segment.address` or `Segment.fd`."""

    def note_read(self, nbytes: int) -> None:
        """Take note of them, after they were done; may take its time."""


class Device(ABC):
    """One backing store. Every method may raise OSError; the engine turns it into DeviceError."""

    info: DeviceInfo
    meter: "Meter | None" = None

    # --- superblock
    @abstractmethod
    def read_superblock(self) -> bytes | None:
        """Return the newest superblock, or None on a device never formatted."""

    @abstractmethod
    def write_superblock(self, raw: bytes) -> None:
        """Replace the superblock atomically. Durability: persist."""

    # --- segments
    @abstractmethod
    def segments(self) -> list[SegmentName]:
        """List the segments on the medium; unreadable names are left out."""

    @abstractmethod
    def create(self, slot: int, generation: int, tag: bytes) -> Segment:
        """Make a log segment with its space reserved; a failure leaves nothing.

        Its contents read as zeros, or, on an arena, as an earlier life of the same tag.

        Args:
            slot: A free slot.
            generation: Never used with this slot before.
            tag: Tenant. An arena hands bytes of a former life only to the same tag.

        Raises:
            NoSpaceError: The device is full, by its capacity or for real.
            FileExistsError: The name is in use.
        """

    @abstractmethod
    def attach(self, name: SegmentName) -> Segment:
        """Open an existing segment; a log segment for writing too, it may be resumed."""

    @abstractmethod
    def write_payloads(
        self,
        segment: Segment,
        offsets: AddressArray,
        sources: AddressArray,
        lengths: AddressArray,
        digests: DigestArray,
        statuses: StatusArray,
    ) -> int:
        """Write n payloads and hash them in one pass; zero-fill each up to the next 4 KiB.

        REQUIRES: a log segment; offsets are multiples of 4 KiB; each padded payload ends inside.
        Returns how many failed; see kvfs._native for statuses. Durability: flush.
        """  # fmt: skip

    @abstractmethod
    def write_tail(self, segment: Segment, distance: int, data: bytes) -> None:
        """Write summary bytes, from `distance` bytes before the end of segment or sidecar.

        REQUIRES: the bytes end at or before that end. Durability: flush.
        """

    @abstractmethod
    def read_tail(self, segment: Segment, nbytes: int) -> bytes:
        """Read the last `nbytes` of the summary; fewer if it is shorter (sidecar)."""

    @abstractmethod
    def next_data(self, segment: Segment, offset: int) -> int:
        """Return the first offset at or after `offset` that may hold data, or `nbytes`."""

    @abstractmethod
    def persist(self, segment: Segment) -> None:
        """Make all written to the segment survive a power cut. Durability: persist."""

    @abstractmethod
    def persist_names(self) -> None:
        """Make all names created, adopted or freed survive a power cut. Durability: persist."""

    @abstractmethod
    def free(self, segment: Segment) -> None:
        """Give the segment back and close the handle; a half-made or half-freed one is fine.

        A directory unlinks it, and takes the bytes of a shared one (see `clear_freed`). An arena
        may reuse the memory. So the engine calls this only when no lease is left.
        """

    def clear_freed(self) -> None:  # noqa: B027 - most devices have nothing to do
        """Take the bytes of freed segments that others have open still; they read as zeros.

        Of those that are `is_shared` without `keeps_bytes`, so that nobody keeps space that counts
        as free. Their names are persisted first: one that a crash brings back must not name zeros.
        Does nothing where there are none. May wait for the medium.
        """

    @abstractmethod
    def release(self, segment: Segment) -> None:
        """Close the handle's descriptors; the segment stays. Idempotent; fine after `free`."""

    @abstractmethod
    def read(self, segment: Segment, offset: int, nbytes: int, *, uncached: bool = False) -> bytes:
        """Read payload bytes, fewer at the end of the payload.

        With `uncached` past the page cache, from the medium itself.
        """

    def read_payloads(
        self,
        segments: Sequence[Segment],
        which: npt.NDArray[np.intp],
        offsets: AddressArray,
        lengths: AddressArray,
        targets: AddressArray,
        digests: DigestArray | None,
        statuses: StatusArray,
        *,
        uncached: bool = False,
    ) -> int:
        """Read n ranges of payloads into memory, and compare their checksums in the same pass.

        Range i lies in `segments[which[i]]`. A range that ends beyond the payload has the status of
        a short read. With `uncached` past the page cache, from the medium itself.

        Returns how many failed; see kvfs._native for statuses. An OSError means: all did.
        """
        del uncached
        bases = np.array([segment.address for segment in segments], np.uint64)[which]
        fds = np.array([segment.fd for segment in segments], np.int32)[which]
        sizes = np.array([segment.nbytes for segment in segments], np.uint64)[which]
        short = offsets + lengths > sizes
        statuses[short] = SHORT_READ
        for chosen, is_mapped in (
            (np.flatnonzero(~short & (bases > 0)), True),
            (np.flatnonzero(~short & (bases == 0)), False),
        ):
            if not len(chosen):
                continue
            part = np.zeros(len(chosen), np.int32)
            wanted = None if digests is None else np.ascontiguousarray(digests[chosen])
            if is_mapped:
                _native.copy_verify(
                    targets[chosen], bases[chosen] + offsets[chosen], lengths[chosen], wanted, part
                )
            else:
                _native.pread_verify(
                    fds[chosen], offsets[chosen], lengths[chosen], targets[chosen], wanted, part
                )
            statuses[chosen] = part
        return int(np.count_nonzero(statuses))

    def assemble(self, extents: Sequence[Extent], nbytes: int) -> int:
        """Make a file that shares extents of segments; return a descriptor that only reads.

        It has no name and counts against no capacity: it takes no space while the segments are
        there, so its owner holds them as long as it holds the file. What no extent covers reads as
        zeros. Durability: none; it ends with its last descriptor.

        REQUIRES: offsets, targets and lengths are multiples of the granularity of `info.cloning`,
        but the last length; what is cloned is persisted, and never written again.

        Raises:
            OSError: EOPNOTSUPP: the device cannot. ENOSPC: there is no space for the metadata.
        """
        del extents, nbytes
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    # --- staging
    @abstractmethod
    def create_staging(self, name: str) -> Staging:
        """Make an empty staging file.

        Raises:
            UsageError: The name is not letters, digits, '.', '-', '_'.
            FileExistsError: The name is in use.
        """

    @abstractmethod
    def write_staging(self, staging: Staging, offset: int, data: bytes | memoryview) -> None:
        """Write; grows `staging.nbytes`. Durability: flush.

        Raises:
            NoSpaceError: The device is full.
        """

    @abstractmethod
    def resize_staging(self, staging: Staging, nbytes: int) -> None:
        """Cut or extend with zeros.

        Raises:
            NoSpaceError: The device is full.
        """

    @abstractmethod
    def persist_staging(self, staging: Staging) -> None:
        """Make its bytes survive a power cut; its name may be reaped at the next open."""

    @abstractmethod
    def reserve_staging(self, staging: Staging, nbytes: int) -> None:
        """Take the capacity of a size, so that somebody else may write up to there.

        Raises:
            NoSpaceError: The device is full.
        """

    @abstractmethod
    def settle_staging(self, staging: Staging, reserved_bytes: int = 0) -> None:
        """Take the size from the file, keep the capacity of `reserved_bytes`, give back the rest.

        What somebody else wrote counts as written by how much the file grew.
        """

    @abstractmethod
    def seal_staging(self, staging: Staging, *, is_shared: bool) -> bool:
        """Give up all descriptors of ours that can write; return whether nobody can write now.

        With `is_shared` a descriptor that can write was handed out: then a medium that cannot tell
        counts as one where somebody can. A later write or change of size takes the seal off.
        """

    @abstractmethod
    def adopt(self, staging: Staging, slot: int, generation: int, sidecar: bytes) -> Segment:
        """Turn a staging file into a file segment with this sidecar; consumes the staging handle.

        It is sealed first if it was not. Payload and sidecar are persisted on return, the names
        only by `persist_names`. A failure leaves the staging file as it was. `staging.fd` becomes
        the segment's.

        Raises:
            NoSpaceError: There is no room for the sidecar.
            OSError: EBUSY: somebody can still write to it; it must be copied.
        """

    @abstractmethod
    def drop_staging(self, staging: Staging) -> None:
        """Delete it, raw or not. Idempotent; nothing after `adopt` and `release_raw`."""

    @abstractmethod
    def reap_staging(self) -> int:
        """Delete staging files and sidecars without a payload; return how many.

        They were left by an earlier owner: called at open, before anything is staged. A payload
        without a sidecar stays listed by `segments`, for the engine to free.
        """

    # --- raw files
    @abstractmethod
    def keep_raw(self, staging: Staging, number: int) -> None:
        """Turn a staging file into a raw file, which stays; the handle stays, too.

        Its bytes are persisted on return, its name only by `persist_names`. From here on they
        survive as the medium's own files do: what `persist_staging` covered.

        Args:
            staging: A staging file.
            number: 64 bits, never used before.

        Raises:
            FileExistsError: The number is in use.
        """

    @abstractmethod
    def raw_files(self) -> list[tuple[int, int]]:
        """List numbers and sizes of the raw files, by number."""

    @abstractmethod
    def open_raw(self, number: int) -> Staging:
        """Open a raw file for reading and writing; every method of staging files takes it.

        Raises:
            FileNotFoundError: There is none of this number.
        """

    @abstractmethod
    def release_raw(self, staging: Staging) -> None:
        """Close a handle of a raw file; the file stays. Idempotent."""

    # --- the rest
    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """What counts against the capacity.

        Log segments at full size; file segments, sidecars, staging and raw files each rounded up to
        4 KiB, with what is reserved for them.
        """

    @property
    @abstractmethod
    def bytes_written(self) -> int:
        """Payload (with its padding), staging and summary bytes handed to the medium since open."""

    def note_bad(self, segment: Segment, offset: int, nbytes: int) -> None:
        """Look which bytes of a payload cannot be read any more; they are never handed out again.

        For who reads at `Segment.address` and met a fault. Does nothing where the medium below
        keeps account of that itself.
        """
        del segment, offset, nbytes

    @property
    def bad_ranges(self) -> list[tuple[int, int]]:
        """Where they are: offsets on the medium and lengths, in bytes."""
        return []

    @property
    def energy_joules(self) -> float:
        """What the bytes moved since open would have taken, on a device that is emulated."""
        return 0.0

    @property
    def bad_bytes(self) -> int:
        """Bytes of the medium that are known to be bad and handed out no more."""
        return sum(nbytes for _, nbytes in self.bad_ranges)

    def location(self) -> int:
        """Return a number that a copy of the device would not have; 0 if there is none."""
        return 0

    @abstractmethod
    def destroy(self) -> None:
        """Delete everything kvfs made on the device. The device is closed afterwards."""

    @abstractmethod
    def close(self) -> None:
        """Release every resource; idempotent."""
