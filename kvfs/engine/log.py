"""Writing and reading segments: the log.

Layer: L2 (does I/O through a device).

- Payloads grow upwards from offset 0, entries downwards from the headers. An entry is written
  after its payload was; one persist covers both.
- A page of entries is only ever rewritten with the same valid entries plus new ones, so a torn
  write cannot lose an entry that was persisted before.
- After any failed write or persist the segment is poisoned: never written again, never sealed.

Concurrency: `SegmentLog.lock` admits one appender; `persist_lock` one persister; lock order is
    lock, then persist_lock. Persisters
that arrive while another runs find their entries covered by the next round (group commit).
"""

import errno
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import AddressArray, Device, Segment, SegmentName
from kvfs.engine import format as fmt
from kvfs.engine.format import (
    ENTRY,
    ENTRY_BYTES,
    HEADER_BYTES,
    HEADERS_BYTES,
    EntryArray,
    SegmentHeader,
)
from kvfs.engine.segment_table import SegmentState, SegmentStatus, page_round
from kvfs.errors import (
    CorruptionError,
    DeviceError,
    FormatVersionError,
    PoisonedError,
    UsageError,
)
from kvfs.units import PAGE, align_up

_ENTRIES_PER_PAGE = PAGE // ENTRY_BYTES
_TAIL_FIRST_READ = 64 << 10
_SCAN_BYTES = 1 << 20
_FAULT = 3  # a status of native batches: memory cannot be read or written


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks to append, n of each.

    Keys and parents are (n, 32) uint8, lengths in bytes; addresses stay readable until return.
    """

    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    addresses: AddressArray
    lengths: AddressArray
    tokens: npt.NDArray[np.uint32]
    flags: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of_entries(
        cls, entries: EntryArray, addresses: AddressArray, lengths: AddressArray
    ) -> "Batch":
        """Return blocks that are to be stored once more, their bytes read to `addresses`."""
        return cls(
            keys=np.ascontiguousarray(entries["key"]),
            parents=np.ascontiguousarray(entries["parent"]),
            addresses=addresses,
            lengths=lengths,
            tokens=np.ascontiguousarray(entries["token_count"]),
            flags=np.ascontiguousarray(entries["flags"]),
        )

    def take(self, selection: slice | npt.NDArray[np.integer]) -> "Batch":
        """Return a part of the batch."""
        return Batch(*(np.ascontiguousarray(getattr(self, name)[selection]) for name in
                       ("keys", "parents", "addresses", "lengths", "tokens", "flags")))  # fmt: skip


class SegmentLog:
    """The writer of one open segment."""

    def __init__(self, device: Device, state: SegmentState, header: SegmentHeader) -> None:
        self.device = device
        self.state = state
        self.lock = threading.Lock()
        self.persist_lock = threading.Lock()
        self._header = header
        self._seed = fmt.entry_seed(header.device_uuid, header.slot, header.generation)

    def start(self) -> None:
        """Write and persist the open header and the segment's name. Durability: persist."""
        with self._poisoning("write"):
            self.device.write_tail(
                self.state.handle, fmt.OPEN_POSITION, fmt.encode_header(self._header)
            )
        with self._poisoning("persist"):
            self.device.persist(self.state.handle)
            self.device.persist_names()

    def fitting(self, lengths: AddressArray) -> int:
        """Return how many leading payloads of these lengths the segment has room for."""
        return self._place(lengths, np.empty(len(lengths), np.uint64))[0]

    def append(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Write payloads and entries; return the entries' indices.

        REQUIRES: `lock`, and that they fit.

        Durability: flush. The entries are valid for this process at once.

        Raises:
            DeviceError: A write failed; the segment is poisoned and none of the batch is in it.
            UsageError: The batch's own memory cannot be read; nothing has happened.
        """
        self.require_writable()
        state = self.state
        offsets = np.empty(len(batch), np.uint64)
        placed, payload_end = self._place(batch.lengths, offsets)
        assert placed == len(batch), "the caller splits a batch by `fitting`"
        digests = np.zeros((len(batch), 16), np.uint8)
        statuses = np.zeros(len(batch), np.int32)
        with self._poisoning("write"):
            failed = self.device.write_payloads(
                state.handle, offsets, batch.addresses, batch.lengths, digests, statuses
            )
        if failed:
            # Bytes beyond the last entry mean nothing: the next batch is written over them. Not so
            # after a deadline: what is under way still may come later than that batch.
            if not (statuses == -errno.ETIMEDOUT).any():
                _require_readable(batch)
            with self._poisoning("write"):
                status = int(statuses[np.flatnonzero(statuses)[0]])
                raise OSError(-status if status < 0 else 5, f"payload write failed ({status})")
        first = state.entry_count
        count = first + len(batch)
        state.reserve(count)
        _native.fill_entries(
            state.entries[first:count],  # nobody looks beyond `entry_count`
            self._seed, batch.keys, batch.parents, offsets, batch.lengths, batch.tokens,
            batch.flags, digests,
        )  # fmt: skip
        with self._poisoning("write"):
            self._write_entries(first, count)
        state.payload_end = payload_end
        state.entry_count = count
        return np.arange(first, count)

    def require_writable(self) -> None:
        """Raise PoisonedError if the segment takes no writes (any more)."""
        if self.state.is_poisoned or self.state.status is not SegmentStatus.OPEN:
            raise PoisonedError(f"segment takes no writes: {self.where}")

    def persist(self, *, wanted: int | None = None) -> None:
        """Make the first `wanted` entries (all so far) survive a crash. Durability: persist.

        Raises:
            DeviceError: The persist failed; the segment is poisoned.
            PoisonedError: It was poisoned before and some of them are not persisted.
        """
        if wanted is None:
            wanted = self.state.entry_count
        with self.persist_lock:
            state = self.state
            if state.persisted_count >= wanted:
                return  # covered already
            if state.is_poisoned:
                raise PoisonedError(f"an earlier write or persist failed: {self.where}")
            if state.status is SegmentStatus.DRAINING:
                return  # on its way out with its namespace
            covered = state.entry_count
            with self._poisoning("persist"):
                self.device.persist(state.handle)
            state.persisted_count = covered

    def seal(self) -> None:
        """Persist all, then write and persist the seal header.

        REQUIRES: `lock`. Durability: persist.

        A segment taken over from an earlier owner gets no seal header: this owner cannot vouch for
        its payloads, so they stay subject to verification.
        """
        self.persist()
        state = self.state
        if state.status is not SegmentStatus.OPEN:
            return
        if state.needs_verify:
            state.status = SegmentStatus.SEALED
            return
        raw = seal_header(self._header, state.entries[: state.entry_count], state.payload_end)
        with self.persist_lock, self._poisoning("seal"):
            self.device.write_tail(state.handle, fmt.SEAL_POSITION, raw)
            self.device.persist(state.handle)
        state.status = SegmentStatus.SEALED

    @property
    def where(self) -> str:
        """Name the segment for messages."""
        return segment_where(self.device, self.state.handle)

    def rewrite_summary(self) -> None:
        """Write the open header and all entries again, and persist them. Durability: persist.

        For a segment of an earlier owner: the page cache may show what never reached the medium,
        and would not write it again by itself after a failed persist.
        """
        with self._poisoning("write"):
            self.device.write_tail(
                self.state.handle, fmt.OPEN_POSITION, fmt.encode_header(self._header)
            )
            if self.state.entry_count:
                self._write_entries(0, self.state.entry_count)
        with self._poisoning("persist"):
            self.device.persist(self.state.handle)

    def _write_entries(self, first: int, count: int) -> None:
        """Write the summary pages that hold entries [first, count), whole."""
        page_first = first // _ENTRIES_PER_PAGE * _ENTRIES_PER_PAGE
        start = align_up(count * ENTRY_BYTES, PAGE)
        raw = _native.pack_summary(self.state.entries[page_first:count])
        self.device.write_tail(self.state.handle, HEADERS_BYTES + start, raw)

    def _place(self, lengths: AddressArray, offsets: AddressArray) -> tuple[int, int]:
        """Lay out what fits behind the last payload; return how many, and where they end."""
        state = self.state
        limit = state.handle.nbytes - HEADERS_BYTES
        return _native.place_payloads(lengths, state.payload_end, state.entry_count, limit, offsets)

    def _poisoning(self, operation: str) -> "_Poisoning":
        return _Poisoning(self, operation)


class _Poisoning:
    """Turns an OSError into DeviceError and marks the segment."""

    def __init__(self, log: SegmentLog, operation: str) -> None:
        self._log = log
        self._operation = operation

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        self._log.state.is_poisoned = True
        if isinstance(error, OSError):
            raise DeviceError(
                f"{self._operation} failed: {self._log.where}: {error.strerror or error}; "
                "the segment is poisoned, its persisted blocks stay readable"
            ) from error


def _require_readable(batch: Batch) -> None:
    """Raise UsageError if memory of the batch cannot be read, such as a truncated file's."""
    statuses = np.full(len(batch), _FAULT, np.int32)
    known = np.flatnonzero(batch.addresses)  # nobody survives a look at address 0
    part, found = batch.take(known), np.zeros(len(known), np.int32)
    _native.verify(part.addresses, part.lengths, np.zeros((len(known), 16), np.uint8), found)
    statuses[known] = found
    bad = np.flatnonzero((statuses < 0) | (statuses == _FAULT))
    if len(bad):
        raise UsageError(
            f"memory of a block cannot be read: block {bad[0]} of {len(batch)}: "
            f"{int(batch.lengths[bad[0]])} bytes at {int(batch.addresses[bad[0]]):#x}"
        )


def seal_header(header: SegmentHeader, entries: EntryArray, payload_end: int) -> bytes:
    """Encode the seal header over these entries."""
    return fmt.encode_header(
        SegmentHeader(
            kind=fmt.HeaderKind.SEAL,
            pool_uuid=header.pool_uuid,
            device_uuid=header.device_uuid,
            slot=header.slot,
            generation=header.generation,
            namespace_id=header.namespace_id,
            layout_digest=header.layout_digest,
            segment_kind=header.segment_kind,
            segment_bytes=header.segment_bytes,
            created_ns=header.created_ns,
            entry_count=len(entries),
            payload_bytes=payload_end,
            entries_xxh3=_native.xxh3_128(np.ascontiguousarray(entries)),
        )
    )


def file_sidecar(header: SegmentHeader, entries: EntryArray) -> bytes:
    """Encode the sidecar of a file segment: entries, seal, open header. `entries` are unsigned."""
    seed = fmt.entry_seed(header.device_uuid, header.slot, header.generation)
    signed = np.ascontiguousarray(entries)
    _native.sign_entries(signed, seed)
    end = int((signed["offset"] + signed["stored_bytes"]).max()) if len(signed) else 0
    seal = seal_header(header, signed, end)
    return _native.pack_summary(signed) + seal + fmt.encode_header(header)


def segment_where(device: Device, segment: Segment | SegmentName) -> str:
    """Name a segment for messages, e.g. 'ssd0 segment 118 generation 7'."""
    return f"{device.info.name} segment {segment.slot} generation {segment.generation}"


@dataclass(frozen=True, slots=True)
class LoadedSegment:
    """A segment as read from the medium.

    Attributes:
        is_sealed: The seal header holds and covers the entries.
        residue: What a crash left in the summary of an unsealed log segment and is neither header
            nor valid entry: (distance from the end, page as it must be) for each such page.
    """

    header: SegmentHeader
    is_sealed: bool
    indices: npt.NDArray[np.uint32]
    entries: EntryArray
    entry_count: int
    residue: tuple[tuple[int, bytes], ...] = ()


def load_segment(device: Device, handle: Segment) -> LoadedSegment:
    """Read headers and entries of a segment.

    With a seal header that holds, exactly its entries are read. Without one, entries are scanned
    down to the payload's high-water mark, never stopping at a bad one.

    Raises:
        CorruptionError: The open header does not hold: the segment never held a persisted payload,
            or is damaged.
        FormatVersionError: Written by another format.
    """
    where = segment_where(device, handle)
    tail = device.read_tail(handle, _TAIL_FIRST_READ)
    header = fmt.decode_header(tail[-fmt.OPEN_POSITION :], fmt.HeaderKind.OPEN, f"{where} open")
    if (header.slot, header.generation) != (handle.slot, handle.generation):
        raise CorruptionError(
            f"segment is somebody else's: {where}: header says "
            f"segment {header.slot} generation {header.generation}"
        )
    seed = fmt.entry_seed(device.info.uuid, handle.slot, handle.generation)
    sealed = _load_sealed(device, handle, header, tail)
    return sealed or _scan_unsealed(device, handle, header, tail, seed)


def is_unborn(device: Device, handle: Segment) -> bool:
    """Say whether a crash left the segment before its first payload: a torn header, if that.

    For segments whose open header does not hold.
    """
    if handle.is_file:  # a sidecar is persisted before its payload gets a name
        return not any(device.read_tail(handle, _TAIL_FIRST_READ))
    start = device.next_data(handle, 0)
    if start >= handle.nbytes - HEADER_BYTES:
        return True
    # Where the filesystem shows no holes, look: an unborn segment is zero below its header.
    rest = device.read_tail(handle, _TAIL_FIRST_READ)[:-HEADER_BYTES]
    return not any(rest) and not any(device.read(handle, 0, PAGE))


def _load_sealed(
    device: Device, handle: Segment, header: SegmentHeader, tail: bytes
) -> LoadedSegment | None:
    where = f"{segment_where(device, handle)} seal"
    page = tail[-fmt.SEAL_POSITION : -fmt.OPEN_POSITION]
    try:
        seal = fmt.decode_header(page, fmt.HeaderKind.SEAL, where)
    except FormatVersionError:
        raise
    except CorruptionError:
        return None
    if (seal.slot, seal.generation) != (header.slot, header.generation):
        return None
    needed = HEADERS_BYTES + seal.entry_count * ENTRY_BYTES
    if len(tail) < needed:
        tail = device.read_tail(handle, needed)
    if len(tail) < needed:
        return None
    # The seal's checksum covers all entries, so that none is checked on its own.
    count = seal.entry_count
    words = np.frombuffer(tail, "<u8", count * ENTRY_BYTES // 8, len(tail) - needed)
    ordered = np.ascontiguousarray(words.reshape(count, -1)[::-1])
    if _native.xxh3_128(ordered) != seal.entries_xxh3:
        return None
    indices = np.arange(count, dtype=np.uint32)
    return LoadedSegment(header, True, indices, ordered.view(ENTRY).ravel(), count)


def _scan_unsealed(
    device: Device, handle: Segment, header: SegmentHeader, tail: bytes, seed: int
) -> LoadedSegment:
    """Scan entries in growing tails, as long as a tail is used down to its first page.

    What holds data between the last tail and the payloads is scanned in pieces: payloads without
    entries, as a crash leaves them, or entries below a page that was lost.
    """
    limit = 0 if handle.is_file else handle.nbytes
    while True:
        start = max(0, limit - len(tail))
        raw, found, _ = _native.scan_entries(tail[:-HEADERS_BYTES], seed, -1, start)
        entries, indices = np.frombuffer(raw, ENTRY), np.frombuffer(found, np.uint32)
        ends = entries["offset"] + page_round(entries["stored_bytes"]).astype(np.uint64)
        high_water = int(ends.max()) if len(entries) else 0
        if start <= high_water or tail[:PAGE] == bytes(PAGE):
            break
        tail = device.read_tail(handle, min(limit, 4 * len(tail)))
    residue: tuple[tuple[int, bytes], ...] = ()
    if not handle.is_file:
        residue = _residue(tail, indices, entries, high_water - start)
        below = _entries_between(device, handle, seed, high_water, start)
        indices = np.concatenate([indices, *(part for part, _ in below)])
        entries = np.concatenate([entries, *(part for _, part in below)])
    count = int(indices.max()) + 1 if len(indices) else 0
    return LoadedSegment(header, False, indices, entries, count, residue)


def _residue(
    tail: bytes, indices: npt.NDArray[np.uint32], entries: EntryArray, payload_end: int
) -> tuple[tuple[int, bytes], ...]:
    """Compare the pages of a summary with what its valid entries make of them.

    `payload_end` is the high-water mark, as an offset in `tail`.
    """
    found = np.frombuffer(tail, np.uint8)
    wanted = np.zeros(len(tail) - HEADERS_BYTES, np.uint8)
    wanted.view(ENTRY)[::-1][indices] = entries
    wanted = np.concatenate([wanted, np.zeros(HEADER_BYTES, np.uint8), found[-HEADER_BYTES:]])
    pages = wanted.reshape(-1, PAGE)
    differs = (found.reshape(-1, PAGE) != pages).any(axis=1)
    differs[: max(0, payload_end) // PAGE] = False
    return tuple(
        ((len(pages) - number) * PAGE, pages[number].tobytes())
        for number in np.flatnonzero(differs).tolist()
    )


def _entries_between(
    device: Device, handle: Segment, seed: int, low: int, high: int
) -> list[tuple[npt.NDArray[np.uint32], EntryArray]]:
    """Find valid entries in the segment from `low` to `high`; return parts with their indices."""
    parts = []
    end = high
    while device.next_data(handle, low) < end:
        start = max(low, end - _SCAN_BYTES)
        if device.next_data(handle, start) < end:
            chunk = device.read(handle, start, end - start)
            raw, found, _ = _native.scan_entries(chunk, seed, len(chunk) // ENTRY_BYTES, 0)
            above = (handle.nbytes - HEADERS_BYTES - end) // ENTRY_BYTES
            indices = np.frombuffer(found, np.uint32) + np.uint32(above)
            parts.append((indices, np.frombuffer(raw, ENTRY)))
        end = start
    return parts
