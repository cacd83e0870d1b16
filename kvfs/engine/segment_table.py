"""What the owner knows of every segment, in memory.

Layer: L2, pure.

- One `SegmentState` per segment on a device; it keeps the segment's entries (128 bytes per block),
  so that checksums and parents are at hand without touching the medium.
- Invariant: `live[i]` is set exactly if the index has a record that names entry i of this segment
  and generation; `live_bytes` is the sum of the stored bytes of live entries, each rounded up to 4
  KiB.
- State changes under the store's lock. `entries` grows under the log's lock; readers use only [0,
  entry_count).
"""

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.devices.base import SLOT_COUNT_MAX, Segment
from kvfs.engine.format import ENTRY, EntryArray
from kvfs.engine.index import RECORD, VERIFIED, RecordArray
from kvfs.keys import KeyArray
from kvfs.units import PAGE

_ENTRIES_MIN: Final = 64


class SegmentStatus(Enum):
    """Where a segment is in its life. FREE segments have no state object."""

    OPEN = "open"
    SEALED = "sealed"
    DRAINING = "draining"  # its blocks are gone from the index; leases are not


@dataclass(slots=True, eq=False)
class SegmentState:
    """One segment.

    Attributes:
        payload_end: Where the next payload goes.
        persisted_count: Entries known to have survived a persist by this owner.
        needs_verify: No seal header covers it: payloads are verified from the medium before they
            are served.
        is_poisoned: A write or persist failed: never sealed, never written again.
        leases: Views and readers that hold its bytes.
        accessed_ns: Per entry, when it was last written or read (monotonic clock).
    """

    handle: Segment
    namespace_id: int
    status: SegmentStatus
    last_access_ns: int
    payload_end: int = 0
    entry_count: int = 0
    persisted_count: int = 0
    needs_verify: bool = False
    is_poisoned: bool = False
    leases: int = 0
    live_bytes: int = 0
    live_count: int = 0
    entries: EntryArray = field(default_factory=lambda: np.zeros(_ENTRIES_MIN, ENTRY))
    live: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(_ENTRIES_MIN, np.bool_))
    accessed_ns: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(_ENTRIES_MIN, np.int64)
    )

    def reserve(self, count: int) -> None:
        """Make room for `count` entries in all."""
        have = len(self.entries)
        if count <= have:
            return
        size = max(count, 2 * have)
        grown = np.zeros(size, ENTRY)
        entry_words(grown)[:have] = entry_words(self.entries)
        self.entries = grown
        self._reserve_marks(size)

    def _reserve_marks(self, size: int) -> None:
        for name in ("live", "accessed_ns"):
            old = getattr(self, name)
            if len(old) >= size:
                continue
            grown = np.zeros(size, old.dtype)
            grown[: len(old)] = old
            setattr(self, name, grown)

    def load(self, indices: npt.NDArray[np.uint32], entries: EntryArray, count: int) -> None:
        """Take over entries read from the medium; positions without a valid entry stay zero.

        A whole set, [0, count), is kept as it is, even if it cannot be written to: appending makes
        room, and so a copy, first.
        """
        if len(entries) == count:
            self.entries = entries
            self._reserve_marks(count)
        else:
            self.reserve(count)
            entry_words(self.entries)[indices] = entry_words(entries)
        self.entry_count = count
        if len(entries):
            ends = entries["offset"] + page_round(entries["stored_bytes"])
            self.payload_end = int(ends.max())

    def records(self, indices: npt.NDArray[np.integer], *, flags: int = 0) -> RecordArray:
        """Build index records of some entries."""
        made = np.empty(len(indices), RECORD)
        handle = self.handle
        _native.entry_records(
            self.entries, np.ascontiguousarray(indices, np.int64),
            handle.device_index, handle.slot, handle.generation, flags, made,
        )  # fmt: skip
        return made

    def digests(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        """Return the XXH3-128 of some entries' payloads, (n, 16)."""
        return self._bytes("payload_xxh3", indices)

    def keys(self, indices: npt.NDArray[np.integer]) -> KeyArray:
        """Return some entries' keys, (n, 32)."""
        return self._bytes("key", indices)

    def parents(self, indices: npt.NDArray[np.integer]) -> KeyArray:
        """Return some entries' parents, (n, 32)."""
        return self._bytes("parent", indices)

    def _bytes(self, name: str, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.uint8]:
        words: npt.NDArray[np.uint64] = self.entries[name].view("<u8")[indices]
        return words.view(np.uint8)

    def mark_live(self, indices: npt.NDArray[np.integer], now_ns: int) -> None:
        """Count entries as live, and as accessed now. REQUIRES: they were not, and ascend."""
        rows = _as_run(indices)
        assert not self.live[rows].any()
        self.live[rows] = True
        self.accessed_ns[rows] = self.last_access_ns = now_ns
        self.live_count += len(indices)
        self.live_bytes += int(page_round(self.entries["stored_bytes"][rows]).sum())

    def mark_dead(self, indices: npt.NDArray[np.integer]) -> None:
        """Count entries as dead; those that are dead already are left alone."""
        dying = np.zeros(self.entry_count, np.bool_)
        dying[indices] = True
        indices = np.flatnonzero(dying & self.live[: self.entry_count])
        self.live[indices] = False
        self.live_count -= len(indices)
        self.live_bytes -= int(page_round(self.entries["stored_bytes"][indices]).sum())
        assert self.live_bytes >= 0

    def live_indices(self) -> npt.NDArray[np.intp]:
        """Return the live entries in log order."""
        return np.flatnonzero(self.live[: self.entry_count])


def _as_run(indices: npt.NDArray[np.integer]) -> slice | npt.NDArray[np.integer]:
    """Return ascending indices as a slice if none is missing in between: five times as fast."""
    if len(indices) and int(indices[-1]) - int(indices[0]) == len(indices) - 1:
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return indices


def entry_words(entries: EntryArray) -> npt.NDArray[np.uint64]:
    """Return contiguous entries as rows of 64-bit words, for copies.

    Numpy copies structured items one by one, at a tenth of the speed.
    """
    return entries.view("<u8").reshape(-1, ENTRY.itemsize // 8)


def page_round(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Round lengths up to 4 KiB, elementwise."""
    return (lengths.astype(np.int64) + (PAGE - 1)) & -PAGE


def group_by_segment(
    records: RecordArray,
) -> list[tuple[int, int, int, npt.NDArray[np.intp]]]:
    """Group hits by segment: (device, slot, generation, positions in `records`).

    Misses are skipped.
    """
    hits = records["length"].nonzero()[0]
    if not len(hits):
        return []
    # One number per place: a device has 8 bits, a slot 24, a generation 32.
    tags = (
        (records["device"][hits].astype(np.uint64) << np.uint64(56))
        | (records["segment"][hits].astype(np.uint64) << np.uint64(32))
        | records["generation"][hits]
    )
    if (tags == tags[0]).all():  # the common case, at a tenth of the cost of a sort
        return [(*_place(int(tags[0])), hits)]
    order = np.argsort(tags, kind="stable")
    ordered = tags[order]
    cuts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), len(order)]
    positions = hits[order]
    return [(*_place(int(ordered[start])), positions[start:end]) for start, end in pairwise(cuts)]


def _place(tag: int) -> tuple[int, int, int]:
    """Return device, slot and generation of a place's number."""
    return tag >> 56, (tag >> 32) & (SLOT_COUNT_MAX - 1), tag & 0xFFFFFFFF


def is_verified(records: RecordArray) -> npt.NDArray[np.bool_]:
    """Return which records carry the VERIFIED flag."""
    flagged: npt.NDArray[np.bool_] = (records["flags"] & VERIFIED) != 0
    return flagged
