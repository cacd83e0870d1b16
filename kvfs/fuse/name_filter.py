"""The name filter: which names may exist, so that kvfs-core can deny the others without asking.

Layer: L5.

    memfd: 64-byte header (magic, u64 slot count, u64 is_complete, u64 seed), then slots of u64:
    hashes of (parent inode, name), 0 for none; linear probing, insert-only

- A name is in the filter before it can exist: the catalog's hook puts it there. A hash once in
  stays until the filter is made anew.
- The kernel is not to remember a denial (timeout 0): a name made through the API must be seen at
  once, and whatever told the kernel of it would come too late.
- It is filled from the catalog in the background, complete before it is installed, and made anew,
  larger, when half full. Meanwhile names go into both.

Locks: `_lock` guards the tables; taken inside the catalog's transaction.
"""

import logging
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.engine.catalog import Catalog
from kvfs.errors import KvfsError, UnavailableError

MAGIC: Final = b"KVFSNAM1"
TIMEOUT_MS: Final = 0
_HEADER: Final = struct.Struct("<8sQQQ")
_HEADER_BYTES: Final = 64
_SLOTS_MIN: Final = 1 << 16
_GROWTH: Final = 4  # slots for each name when it is made; it is made anew at two
_log = logging.getLogger("kvfs.fuse")
Hashes = npt.NDArray[np.uint64]


class NameTable:
    """The filter's memory. Written by one thread at a time, read by the core meanwhile."""

    def __init__(self, name_count: int, seed: int) -> None:
        """Make an empty table with room for some names and as many again."""
        wanted = max(_SLOTS_MIN, _GROWTH * name_count)
        self.slot_count = 1 << (wanted - 1).bit_length()
        self.nbytes = _HEADER_BYTES + 8 * self.slot_count
        self.count = 0
        self.seed = seed
        self.fd = _native.memfd("kvfs-names", self.nbytes)
        self._map = mmap.mmap(self.fd, self.nbytes)
        self._map[: _HEADER.size] = _HEADER.pack(MAGIC, self.slot_count, 0, seed)
        self._slots: Hashes = np.frombuffer(self._map, np.uint64, self.slot_count, _HEADER_BYTES)

    @property
    def is_half_full(self) -> bool:
        """Whether it is time for a larger one."""
        return 2 * self.count >= self.slot_count

    def hash_of(self, parent_inode: int, name: bytes) -> int:
        """Return what stands for a name; never 0."""
        return _native.xxh3_64(parent_inode.to_bytes(8, "little") + name, self.seed) or 1

    def add(self, value: int) -> None:
        """Insert one hash."""
        slots, mask = self._slots, self.slot_count - 1
        position = value & mask
        while True:
            found = int(slots[position])
            if found == value:
                return
            if not found:
                slots[position] = value  # one store: the core sees all of it or none
                self.count += 1
                return
            position = (position + 1) & mask

    def add_all(self, values: Hashes) -> None:
        """Insert many hashes. REQUIRES: room for them."""
        slots, mask = self._slots, np.uint64(self.slot_count - 1)
        values = np.unique(values)
        positions = values & mask
        while len(values):
            free = slots[positions] == 0
            # Of several that want one free slot, the last written gets it.
            slots[positions[free]] = values[free]
            left = slots[positions] != values
            self.count += int((free & ~left).sum())
            values, positions = values[left], (positions[left] + np.uint64(1)) & mask

    def complete(self) -> None:
        """Say that every name is in it."""
        self._map[16:24] = struct.pack("<Q", 1)

    def close(self) -> None:
        """Let go of it; the core has its own map."""
        self._slots = np.zeros(0, np.uint64)
        self._map.close()
        os.close(self.fd)


class NameFilter:
    """Keeps the core's filter true to the catalog. Thread-safe."""

    def __init__(
        self, catalog: Catalog, install: Callable[[NameTable], None], *,
        also: Iterable[tuple[int, bytes]] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        """Begin to fill a filter, in a thread of its own.

        Args:
            catalog: Names.
            install: Gives a complete table to the core; called in that thread.
            also: Names that are not in the catalog.
            seed: Of the hashes.
        """
        self._catalog = catalog
        self._install = install
        self._also = tuple(also)
        self._seed = seed
        self._lock = threading.Lock()
        self._tables: list[NameTable] = []  # the one in use, and the one that is being filled
        self._is_due = threading.Event()
        self._is_closing = False
        self._is_due.set()
        catalog.on_name = self._add
        self._thread = threading.Thread(target=self._main, name="kvfs-names", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; the core must be asked no more."""
        self._catalog.on_name = None
        self._is_closing = True
        self._is_due.set()
        self._thread.join()
        with self._lock:
            for table in self._tables:
                table.close()
            self._tables.clear()

    # --- internals

    def _add(self, parent_id: int, name: bytes) -> None:
        """Put in a name that is about to be made."""
        with self._lock:
            for table in self._tables:
                table.add(table.hash_of(parent_id, name))
            if self._tables and self._tables[-1].is_half_full:
                self._is_due.set()

    def _main(self) -> None:
        while True:
            self._is_due.wait()
            self._is_due.clear()
            if self._is_closing:
                return
            try:
                self._fill()
            except UnavailableError as error:  # the mount ends; who watches the core says more
                _log.info("names are not known to kvfs-core: %s", error)
            except (KvfsError, OSError) as error:
                _log.warning("names are not known to kvfs-core, lookups are slower: %s", error)

    def _fill(self) -> None:
        """Make a table of all names and install it in place of the former."""
        table = NameTable(self._catalog.node_count, self._seed)
        with self._lock:
            self._tables.append(table)
        try:
            for parent_id, name in self._also:
                self._add(parent_id, name)
            for rows in self._catalog.iter_names():
                if self._is_closing:
                    raise KvfsError("unmounting")
                hashes = np.array([table.hash_of(*row) for row in rows], np.uint64)
                with self._lock:
                    if 2 * (table.count + len(hashes)) > table.slot_count:
                        self._is_due.set()
                        raise KvfsError("names came faster than they were read")
                    table.add_all(hashes)
            table.complete()
            self._install(table)
        except BaseException:
            with self._lock:
                self._tables.remove(table)
            table.close()
            if self._is_closing:
                return
            raise
        with self._lock:
            former = self._tables[:-1]
            self._tables = [table]
        for old in former:
            old.close()
