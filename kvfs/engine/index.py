"""The block index of one namespace: a wrapper of the native table that grows.

Layer: L2.

- One record per (key, device); lookup prefers the fastest tier.
- Written by the owner only, under the store's lock; readers in any process need no lock.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.keys import KeyArray

RECORD: Final = np.dtype([
    ("key", "u1", 32), ("device", "<u2"), ("flags", "<u2"), ("segment", "<u4"),
    ("generation", "<u4"), ("page", "<u4"), ("length", "<u4"), ("tokens", "<u4"),
    ("entry", "<u4"), ("sequence", "<u4"),
])  # fmt: skip
assert RECORD.itemsize == _native.RECORD_BYTES
RecordArray = npt.NDArray[np.void]

VERIFIED: Final = 1  # record flag: the payload's checksum was verified in this generation's life

_CAPACITY_MIN: Final = 1024


class BlockIndex:
    """Where the blocks of one namespace are."""

    def __init__(self, ranks: Sequence[int], capacity: int = _CAPACITY_MIN) -> None:
        """Make an empty index.

        Args:
            ranks: Tier of each device number; lower is preferred.
            capacity: Records to make room for at once.
        """
        self._ranks = bytes(ranks)
        self._table = _native.Index(max(capacity, _CAPACITY_MIN))
        self._table.set_ranks(self._ranks)
        self.removals = 0
        """Grows after copies were removed; while it stays, what was resident is."""

    def __len__(self) -> int:
        return self._table.count

    @property
    def fd(self) -> int:
        """Descriptor of the shared table; it changes when the table grows."""
        return self._table.fd

    def reserve(self, more: int) -> None:
        """Make room for `more` records now, so that a bulk load grows once."""
        needed = self._table.count + more
        if needed > self._table.capacity:
            self._grow(needed)

    def insert(self, records: RecordArray) -> RecordArray:
        """Insert or replace; return the records replaced (all-zero where there was none)."""
        replaced = np.empty(len(records), RECORD)
        done = 0
        while True:
            done += self._table.insert(records[done:], replaced[done:])
            if done == len(records):
                return replaced
            self._grow(2 * self._table.capacity)

    def lookup(self, keys: KeyArray, device: int | None = None) -> RecordArray:
        """Return one record per key, all-zero (length 0) for a miss."""
        found = np.empty(len(keys), RECORD)
        if device is None:
            self._table.lookup(keys, found)
        else:
            self._table.lookup_device(keys, device, found)
        return found

    def match_prefix(self, keys: KeyArray, sums: npt.NDArray[np.uint64] | None = None) -> int:
        """Return how many leading keys are resident.

        `sums`, if given, grows by the number of keys and of what was found.
        """
        return self._table.match_prefix(keys, sums)

    def remove(self, records: RecordArray) -> int:
        """Remove exactly these copies; one that has been replaced since stays."""
        removed = self._table.remove(np.ascontiguousarray(records))
        self.removals += 1
        return removed

    def mark_verified(self, records: RecordArray) -> None:
        """Note that these copies were verified."""
        self._table.set_flags(np.ascontiguousarray(records), VERIFIED)

    def snapshot(self) -> RecordArray:
        """Return a copy of all records."""
        return np.frombuffer(self._table.snapshot(), RECORD)

    def retire(self) -> None:
        """Tell readers in other processes that what it says is no longer true."""
        self._table.retire()

    def close(self) -> None:
        """Release the table."""
        self._table.close()

    def _grow(self, capacity: int) -> None:
        self._table = self._table.grow(capacity)
        self._table.set_ranks(self._ranks)
