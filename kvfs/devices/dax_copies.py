"""The copies of a DAX device's superblock; `dax_layout` has the rules.

Layer: L1.

Concurrency: none of its own; the device serialises writes.
"""

import errno
import logging

from kvfs.devices import dax_layout as layout
from kvfs.devices.dax_layout import Copy
from kvfs.devices.dax_memory import DaxMemory
from kvfs.devices.dax_source import open_source
from kvfs.errors import CorruptionError
from kvfs.units import PAGE

_log = logging.getLogger("kvfs.devices")


class SuperblockCopies:
    """Reads the newest, writes them all. `name` is for messages."""

    def __init__(self, memory: DaxMemory, name: str) -> None:
        self._memory = memory
        self._name = name
        self._sequence = -1  # not known

    def read(self) -> bytes | None:
        """Return the newest superblock, or None on a device never formatted.

        Raises:
            CorruptionError: Fewer copies hold than are needed to be sure which is the newest.
        """
        found, spoiled = self._found()
        if len(found) >= layout.READ_QUORUM:
            return max(found, key=lambda copy: copy.sequence).raw
        if len(found) + spoiled < layout.WRITE_QUORUM:
            return None  # at most, a crash ended the first write of all
        raise CorruptionError(
            f"superblock damaged: {self._name}: expected at least {layout.READ_QUORUM} of "
            f"{layout.COPIES} copies that hold, found {len(found)}; to give the device up, "
            "'daxio --zero --len 2M --output' with its path"
        )

    def write(self, raw: bytes) -> None:
        """Write all copies, one after the other. Durability: persist.

        Raises:
            OSError: It does not fit, or fewer copies were written than must be.
        """
        if len(raw) > layout.SUPERBLOCK_BYTES_MAX:
            raise OSError(errno.EFBIG, "too many namespaces for a DAX device", self._name)
        if self._sequence < 0:  # a lower one than what is there would lose to it
            self._sequence = max((copy.sequence for copy in self._found()[0]), default=0)
        self._sequence += 1
        data = layout.encode_copy(Copy(self._sequence, raw))
        written = 0
        for number in range(layout.COPIES):
            try:
                self._memory.store(number * layout.COPY_BYTES, data)
                self._memory.persist()
                written += 1
            except OSError as error:
                _log.warning("superblock copy %d of %s: %s", number, self._name, error)
        if written < layout.WRITE_QUORUM:
            raise OSError(errno.EIO, f"{written} superblock copies written", self._name)

    def _found(self) -> tuple[list[Copy], int]:
        """Return the copies that hold, and how many others there are, damaged or unreadable."""
        found, spoiled = [], 0
        for number in range(layout.COPIES):
            offset = number * layout.COPY_BYTES
            try:
                head = self._memory.read(offset, PAGE)
                raw = self._memory.read(offset + PAGE, layout.copy_bytes(head))
            except OSError:
                spoiled += 1
                continue
            copy = layout.decode_copy(head + raw)
            if copy is not None:
                found.append(copy)
            elif layout.is_copy(head):
                spoiled += 1
        return found, spoiled


def peek_superblock(location: str) -> bytes | None:
    """Return the newest superblock of a DAX device that nobody has open.

    Raises:
        KvfsError, OSError: It cannot be opened, or its superblock is damaged.
    """
    with open_source(location) as source:
        memory = source.map(layout.HEADER_BYTES)
        try:
            return SuperblockCopies(memory, location).read()
        finally:
            memory.close()
