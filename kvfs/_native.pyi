"""Types and contracts of the native core (`native/`, C11, abi3).

Layer: L1. All batch calls release the GIL. Address arrays are C-contiguous little-endian uint64
buffers (numpy arrays in practice); the caller keeps the memory behind them alive until return.
A length-n batch with mismatching array lengths raises ValueError before anything is touched.

Status values (int32 per item): 0 done; 1 checksum mismatch; 2 short read (end of file);
3 memory fault (SIGBUS/poison) while reading or writing the item; negative: -errno.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, final

import numpy.typing as npt

class _SupportsBuffer(Protocol):
    def __buffer__(self, flags: int, /) -> memoryview: ...

Buffer: TypeAlias = _SupportsBuffer | bytes | bytearray | memoryview | npt.NDArray[Any]

RECORD_BYTES: int  # 64, see Index
ENTRY_BYTES: int  # 128, see kvfs.engine.format.ENTRY
ABI_VERSION: int

# --- hashing -------------------------------------------------------------------------------
def xxh3_64(data: Buffer, seed: int = 0) -> int: ...
def xxh3_128(data: Buffer) -> bytes:
    """XXH3-128 (unseeded), 16 bytes: low 64 bits little-endian, then high 64 bits little-endian."""

def buffer_address(obj: Buffer, writable: bool = False) -> tuple[int, int]:
    """(address, nbytes) of a C-contiguous buffer. The caller keeps `obj` alive."""

# --- copying (GIL released, SIGBUS-guarded) ------------------------------------------------
def copy_hash(
    targets: Buffer,
    sources: Buffer,
    lengths: Buffer,
    digests: Buffer,
    statuses: Buffer,
    pad_to: int = 1,
) -> int:
    """Copy n memory ranges with non-temporal stores and XXH3-128 in one pass over the source.

    Each item is copied in steps of 1 KiB: a step is hashed and stored while it is in cache. After the item,
    zero bytes are written up to the next multiple of `pad_to`. An sfence ends the batch. digests: n x 16.
    Returns the number of items whose status is not 0.
    """

def copy_verify(
    targets: Buffer,
    sources: Buffer,
    lengths: Buffer,
    digests: Buffer | None,
    statuses: Buffer,
) -> int:
    """Copy n memory ranges; when digests is given compare XXH3-128 in the same pass (status 1)."""

def verify(sources: Buffer, lengths: Buffer, digests: Buffer, statuses: Buffer) -> int:
    """Compare XXH3-128 of n memory ranges with `digests` (n x 16)."""

def pwrite_hash(
    fd: int,
    offsets: Buffer,
    sources: Buffer,
    lengths: Buffer,
    digests: Buffer,
    statuses: Buffer,
    pad_to: int = 1,
) -> int:
    """Write n memory ranges to a file and hash them in one pass (steps of 256 KiB: hash, then pwrite).

    Retries EINTR and short writes. After each item zero bytes are written up to the next multiple
    of `pad_to` of the item's length. A failed item does not stop the others.
    """

def pread_verify(
    fds: Buffer,
    offsets: Buffer,
    lengths: Buffer,
    targets: Buffer,
    digests: Buffer | None,
    statuses: Buffer,
) -> int:
    """Read n ranges (fds: int32[n]) into memory and verify XXH3-128 in the same pass."""

def absent(addresses: Buffer, lengths: Buffer, statuses: Buffer) -> int:
    """Say of n mapped ranges of memory files which are not wholly in memory: statuses 0, 1 or -errno.

    What is not there is a hole or swapped out; reading a hole would fill it, to ask does not. Of files that this
    process may not write the kernel says that all is there. Returns how many statuses are not 0.
    """

# --- summaries -----------------------------------------------------------------------------
def sign_entries(entries: Buffer, seed: int) -> None:
    """Fill the checksum (bytes 120..127) of each 128-byte entry in place: xxh3_64(bytes 0..119, seed)."""

def place_payloads(
    lengths: Buffer, payload_end: int, entry_count: int, limit: int, offsets: Buffer
) -> tuple[int, int]:
    """Lay out payloads behind `payload_end`, each padded to 4 KiB, as long as they fit with their entries.

    `limit` is where entry 0 ends; the entries of a segment take whole pages. Fills `offsets` (uint64[n]) of those that
    fit. Returns (how many leading ones fit, where the last of them ends, padded).
    """

def fill_entries(
    entries: Buffer,
    seed: int,
    keys: Buffer,
    parents: Buffer,
    offsets: Buffer,
    lengths: Buffer,
    tokens: Buffer,
    flags: Buffer,
    digests: Buffer,
) -> None:
    """Write n whole entries in place, signed.

    keys, parents: n x 32; offsets, lengths (stored and logical bytes): uint64[n]; tokens: uint32[n]; flags: uint8[n];
    digests: n x 16.
    """

def entry_records(
    entries: Buffer,
    indices: Buffer,
    device: int,
    segment: int,
    generation: int,
    flags: int,
    records: Buffer,
) -> None:
    """Make the index records (see Index) of the entries at `indices` (int64[n]); records: n x 64."""

def pack_summary(entries: Buffer) -> bytes:
    """The summary pages that hold these entries: the first one last, zeros in front up to a whole page."""

def scan_entries(
    summary: Buffer,
    seed: int,
    entry_count: int,
    payload_limit: int,
) -> tuple[bytes, bytes, int]:
    """Collect the valid entries of a summary.

    `summary` ends where entry 0 ends: entry i lies at len(summary) - (i + 1) * 128. `payload_limit` is the
    payload offset (bytes from the segment's start) at which `summary` begins (0 for a sidecar).
    entry_count >= 0: scan exactly that many. entry_count < 0 (no seal): scan until the position of
    entry i, expressed as a segment offset, would fall below the high-water mark
    (max offset + stored length rounded up to 4096) of the valid entries found so far.
    Never stops at the first bad entry. All-zero and bad entries are skipped.
    Returns (valid entries, n x 128 bytes in index order; their indices, uint32[n]; highest valid index + 1).
    SIGBUS-guarded: an unreadable page counts as bad entries.
    """

def distinct_keys(keys: Buffer, firsts: Buffer) -> int:
    """Fill `firsts` (int64[n]) with where each of n keys, (n, 32) uint8, stands first, in order.

    Returns how many distinct keys there are; what follows in `firsts` is left alone. O(n).
    """

def find_keys(keys: Buffer, among: Buffer, positions: Buffer) -> int:
    """Find each of n keys in a list; both (n, 32) uint8. positions: int64[n], the first place or -1.

    Returns how many were found. O(n).
    """

def closure(keys: Buffer, parents: Buffer, dropped: Buffer) -> int:
    """Close a set over descendants. keys, parents: (n, 32) uint8; dropped: uint8[n], in and out.

    Sets dropped[j] for every j whose parent key (not all-zero) equals keys[i] of a dropped i,
    transitively. Several rows may have the same key. Returns how many rows are dropped in the end. O(n).
    """

def tally(records: Buffer, lengths: Buffer | None, statuses: Buffer | None, counts: Buffer) -> int:
    """Count records (n x 64, see Index) by device: counts[d, 0] += how many, counts[d, 1] += their bytes.

    Records of length 0 and those whose status (int32[n]) is not 0 are left out. lengths (uint64[n]): bytes to count
    in place of the records' own. counts: uint64[devices, 2], at most 256 devices. Returns how many were counted.
    ValueError, and nothing counted, if a device's number has no row. Keeps the GIL, so that threads may share counts.
    """

# --- index ---------------------------------------------------------------------------------
@final
class Index:
    """Open-addressing hash table of 64-byte records in a memfd; single writer, lock-free readers.

    Record (little-endian, kvfs.engine.index.RECORD): key u8[32] | device u16 | flags u16 | segment u32 |
    generation u32 | page u32 (payload offset / 4096) | length u32 (stored bytes) | tokens u32 |
    entry u32 (index in the segment's summary) | sequence u32 (per-bucket seqlock; 0 in results).
    One record per (key, device). Linear probing, tombstones, no shifting: a reader that sees an odd or changed
    sequence tries again, waits up to about 10 ms per batch, then reports a miss. Lookup prefers the copy whose
    device has the lowest rank (`set_ranks`), then the lowest number, and batches prefetch ahead.
    Length 0 means no record: lookup's misses have it, insert refuses it (ValueError).
    Writing raises ValueError on an attached table, in a forked child, and once superseded.
    The writer's methods are serialised by an internal mutex; readers need none.
    """
    def __init__(self, capacity: int, seed: int = 0) -> None:
        """Make a table for at least `capacity` records (load factor <= 0.5) in a fresh sealed memfd."""
    @staticmethod
    def attach(fd: int) -> Index:
        """Map another process's table read-only; the descriptor is duplicated.

        Validates seals (F_SEAL_SHRINK), magic, version, geometry, size (ValueError).
        """
    @property
    def fd(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def is_superseded(self) -> bool: ...
    @property
    def is_writable(self) -> bool: ...
    def set_ranks(self, ranks: Buffer) -> None:
        """uint8 per device number (at most 256); lower is preferred by lookup; the rest get 255.

        The writer's ranks hold for all readers; on an attached table, for this object only.
        """
    def insert(self, records: Buffer, replaced: Buffer | None = None) -> int:
        """Insert or replace n records; returns how many were done (less than n: table full, grow).

        Tombstones count: grow(capacity) to the same capacity gets rid of them.

        `replaced` (n x 64 bytes) receives the record that each insertion replaced, zeroes if none.
        """
    def lookup(self, keys: Buffer, out: Buffer) -> int:
        """Fill n records (all-zero = miss); returns the number of hits."""
    def lookup_device(self, keys: Buffer, device: int, out: Buffer) -> int:
        """Like lookup, only copies on one device."""
    def match_prefix(self, keys: Buffer, sums: Buffer | None = None) -> int:
        """How many leading keys are present.

        `sums`: two uint64; the number of keys and of those present are added.
        """
    def remove(self, records: Buffer) -> int:
        """Remove n records that match exactly in key, device, segment and generation; returns how many."""
    def set_flags(self, records: Buffer, flags: int) -> int:
        """OR flags into matching records (key, device, segment, generation)."""
    def snapshot(self) -> bytes:
        """All records, in table order, as n x 64 bytes."""
    def grow(self, capacity: int) -> Index:
        """Copy into a larger table and mark this one superseded (readers re-attach).

        Takes over seed and ranks. ValueError if capacity is less than the count.
        """
    def retire(self) -> None:
        """Mark it superseded, without a successor: what it says is no longer true."""
    def close(self) -> None:
        """Refuse new calls (ValueError); running ones end first. Idempotent."""

@final
class Histogram:
    """How long something took, in 64 buckets: `counts[b]` is of times whose number of bits is b.

    Those are at least 2**(b-1) ns, and less than 2**b. No lock is needed. Of operations that take less
    than 16 us one in 16 is timed, and counted for those since the last one: `count` is exact, and so is
    their sum, as far as calls resemble each other.
    """
    def __init__(self) -> None: ...
    def note(self, nanoseconds: int) -> None:
        """Count one that took so long."""
    def add(self, other: Histogram) -> None:
        """Count what another has counted."""
    @property
    def counts(self) -> list[int]: ...
    @property
    def count(self) -> int: ...
    @property
    def sum_ns(self) -> int: ...

@final
class Operation:
    """One operation under way, from `__enter__` to `__exit__`; made by `Gate.during`."""
    def __enter__(self) -> None: ...
    def __exit__(self, kind: object, error: object, trace: object) -> Literal[False]: ...

@final
class Gate:
    """Counts operations under way, by namespace; no lock is needed."""
    def __init__(
        self,
        now: Callable[[], int] | None,
        refuse: Callable[[int], None],
        wake: Callable[[], None],
    ) -> None:
        """`now`: a clock; None for CLOCK_MONOTONIC. `refuse` raises why a namespace is refused; `wake` is
        called when the last operation on a namespace has ended while somebody waits."""
    def during(self, namespace_id: int, histogram: Histogram | None = None, /) -> Operation: ...
    def require(self, namespace_id: int, /) -> None:
        """Raise what entering an operation would raise."""
    def running(self, namespace_id: int = ..., /) -> int:
        """How many operations are under way, on one namespace or all."""
    def end(self, namespace_id: int, /) -> None:
        """Refuse operations on a namespace from now on."""
    def close(self) -> None:
        """Refuse all."""
    def wait(self, by: int, /) -> None:
        """Change how many wait by so many."""
    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that made it."""

@final
class AccessRing:
    """Single-producer single-consumer ring of 16-byte access events in a memfd.

    Event: device u16 | phase u8 | flags u8 | segment u32 | entry u32 | tag u32; flags are the low
    byte of the record's. When full, new events are counted as lost, never waited for.
    """
    def __init__(self, capacity: int) -> None: ...
    @staticmethod
    def attach(fd: int) -> AccessRing:
        """Map another process's ring, to drain it; the descriptor is duplicated.

        Validates seals, magic, version, size (ValueError).
        """
    @property
    def fd(self) -> int: ...
    @property
    def lost(self) -> int: ...
    def push(self, records: Buffer, phase: int = 0, tag: int = 0) -> None:
        """Note the access of n index records (64 bytes each; misses are skipped)."""
    def drain(self, limit: int = 65536) -> bytes: ...
    def close(self) -> None: ...

@final
class LeasePage:
    """What one client process holds, in two memfds: places it publishes, and whether they were revoked.

    A place means one life of one segment: device u8 << 56 | slot u24 << 32 | generation u32, never 0.
    native/lease_page.h says how the two sides use it. `hold` and `release` are serialised by an inner mutex.
    OSError EROFS where a method belongs to the other side.
    """
    def __init__(self, slots: int) -> None:
        """As the owner: make it, for at most so many places (up to 65536)."""
    @staticmethod
    def attach(fd: int, notice_fd: int) -> LeasePage:
        """As the client: map it; the descriptors are duplicated.

        Validates seals, magic, version, size (ValueError).
        """
    @property
    def fd(self) -> int: ...
    @property
    def notice_fd(self) -> int:
        """Sealed: whoever gets it can only read."""
    @property
    def heartbeat_ns(self) -> int:
        """When the client's heart last beat (CLOCK_MONOTONIC), by its own word; 0: it never did."""
    @property
    def segments_freed(self) -> int:
        """How many segments that the client may have mapped are gone, by the owner's count."""
    def note_freed(self) -> None:
        """Owner: count one more."""
    @property
    def is_revoked(self) -> bool:
        """Whether the owner has taken all places away. Ordered after all reads of this thread before."""
    def hold(self, records: Buffer) -> bytes:
        """Client: hold the places of n index records (misses are skipped); a full fence ends it.

        Returns the places for `release`, n x 8 bytes at most. OSError ENOSPC: too many places; none is held.
        """
    def release(self, places: bytes) -> None:
        """Client: undo a `hold`."""
    def beat(self, interval_ms: int) -> None:
        """Client: start a native thread that beats until `close`; a stopped or hung process does not."""
    def is_held(self, place: int) -> bool:
        """Owner: whether the client holds a place. After a full fence; False once revoked."""
    def places(self) -> bytes:
        """Owner: all places held, n x 8 bytes."""
    def revoke(self) -> None:
        """Owner: take all places away."""
    def close(self) -> None:
        """Refuse new calls (ValueError); running ones end first. Idempotent."""

# --- views ---------------------------------------------------------------------------------
@final
class Mapping:
    """A reserved address range into which extents are mapped read-only, one after the other.

    Exposes the buffer protocol (read-only, C-contiguous bytes). A SIGBUS inside the range maps an anonymous zero page
    there, sets `has_failed`, and lets the reader go on. What is not mapped reads as zeroes.
    A SIGBUS within a batch copy is the status of that item and no fault of the mapping.
    """
    def __init__(self, nbytes: int, align: int = 4096) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def has_failed(self) -> bool: ...
    @property
    def faults(self) -> list[int]:
        """Page offsets (bytes from the start) that faulted, at most 64 remembered."""
    def map(self, positions: Buffer, fds: Buffer, offsets: Buffer, lengths: Buffer) -> None:
        """mmap(MAP_SHARED|MAP_FIXED, PROT_READ) n extents: positions, offsets multiples of 4096;
        lengths rounded up to 4096. fds: int32[n]. Neighbours contiguous in file and range are merged.
        Nothing is mapped if any argument is wrong (ValueError).
        Raises OSError (ENOMEM when out of VMAs); extents before the failed one stay mapped, the
        rest of the range reads as zeroes."""
    def map_anonymous(self, position: int, nbytes: int) -> int:
        """Back a part by private writable memory (copy fall-back); returns its address."""
    def protect(self) -> None:
        """Make the whole range read-only."""
    def close(self) -> None:
        """Unmap. BufferError while exports exist."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Arena:
    """A shared mapping of one file descriptor (a memfd slot or a segment file)."""
    def __init__(self, fd: int, nbytes: int, populate: bool = False, writable: bool = True) -> None:
        """MAP_SHARED; populate uses MADV_POPULATE_WRITE, or _READ (OSError when it fails).

        ValueError if a regular file is shorter than nbytes (a device has no size to check)."""
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def close(self) -> None:
        """Unmap. BufferError while exports exist."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

def memfd(name: str, nbytes: int, is_final: bool = True) -> int:
    """A memfd of mode 0600, close-on-exec, of fixed size (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL).

    Without `is_final` it is not sealed yet; see `seal_memfd`.
    """

def seal_memfd(fd: int) -> None:
    """Fix the size of a memfd and forbid new writers (F_SEAL_FUTURE_WRITE): maps made before go on writing."""

def poison(address: int, nbytes: int) -> None:
    """Test aid: make pages of a private anonymous or memfd mapping raise SIGBUS (UFFDIO_POISON); OSError if unsupported."""

def store(address: int, data: Buffer, way: str | None = None) -> int:
    """Copy to mapped memory, write the lines back and fence, on this thread: after it the bytes are
    in the persistence domain of a DAX mapping. `way`: fence, clflush, clflushopt or clwb, the best
    this CPU has when missing; ValueError if it has not. Returns a status, 0 or 3 (see above)."""

def touch(address: int, nbytes: int) -> int:
    """Make each page of a range of mapped memory dirty again, without changing a byte. Returns a
    status, 0 or 3 (see above): after a page that cannot be touched no other is."""

def write_back() -> str:
    """The best way to write lines back that this CPU has."""

def cpu_features() -> Sequence[str]:
    """The instruction set in use (base, avx2, avx512; KVFS_ISA lowers it), then "cpu:..." flags."""
