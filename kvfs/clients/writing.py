"""The writing side of a client: blocks go to the owner as ranges of shared memory.

Layer: L4.

- What lies in memory that the caller has shared is not copied here; the rest is copied into staging
  memory, a message's worth at a time. So is what the owner refuses to map.
- A put is a message per 64 MiB or 65,536 blocks, each answered when it is done.
"""

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.clients.link import STAGING_BYTES, Line
from kvfs.durability import PutResult
from kvfs.errors import RefusedError, UsageError
from kvfs.keys import KeyArray

_log = logging.getLogger("kvfs.client")
_REFUSED = 0  # no number of the owner's
_ALIGNMENT = 64  # of blocks in staging memory: what the owner's copies like best


@dataclass(frozen=True, slots=True)
class Shared:
    """Memory of this process that the owner may map. `fd` is ours."""

    number: int
    fd: int
    address: int
    nbytes: int


class SharedMemory:
    """What the caller has shared. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: tuple[Shared, ...] = ()
        self._next = 1

    def add(self, fd: int, address: int, nbytes: int) -> int:
        """Note that a range of memory is a map of the start of a file; return its number."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._shared = (*self._shared, Shared(number, os.dup(fd), address, nbytes))
            return number

    def find(self, addresses: Addresses, lengths: Addresses) -> npt.NDArray[np.int64]:
        """Return which of the shared pieces each range lies in, by position; -1 for none.

        None, too, for what was never written or is swapped out.
        """
        found = np.full(len(addresses), -1, np.int64)
        for position, one in enumerate(self._shared):
            starts = addresses - np.uint64(one.address)
            room = np.uint64(one.nbytes)
            is_inside = (addresses >= np.uint64(one.address)) & (starts <= room)
            is_inside &= lengths <= room - np.minimum(starts, room)
            found[is_inside] = position
        inside = np.flatnonzero(found >= 0)
        statuses = np.zeros(len(inside), np.int32)
        if _native.absent(addresses[inside], lengths[inside], statuses):
            found[inside[statuses != 0]] = -1  # the owner reads no holes: it is copied, as others
        return found

    def pieces(self) -> tuple[Shared, ...]:
        """Return what was shared, in order."""
        return self._shared

    def close(self) -> None:
        """Forget everything; idempotent."""
        with self._lock:
            for one in self._shared:
                os.close(one.fd)
            self._shared = ()


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where the owner finds blocks [start, stop) of a batch: arrays for `messages.Put`."""

    start: int
    stop: int
    regions: npt.NDArray[np.uint32]
    offsets: Addresses


def ranges(
    line: Line, memory: SharedMemory, addresses: Addresses, lengths: Addresses
) -> Iterator[Ranges]:
    """Yield a batch in messages' worth, each copied as it is asked for.

    Raises:
        UsageError: A block cannot be read.
    """
    pieces = memory.pieces()
    homes = memory.find(addresses, lengths) if pieces else np.full(len(addresses), -1, np.int64)
    for position in np.unique(homes[homes >= 0]):
        if _share(line, pieces[int(position)]) == _REFUSED:
            homes[homes == position] = -1
    padded = (lengths + np.uint64(_ALIGNMENT - 1)) & ~np.uint64(_ALIGNMENT - 1)
    padded[homes >= 0] = 0
    ends = np.cumsum(padded)
    start = 0
    while start < len(addresses):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + STAGING_BYTES, side="right"))
        stop = min(max(stop, start + 1), start + msg.KEYS_MAX)
        part = slice(start, stop)
        regions = np.zeros(stop - start, np.uint32)
        offsets = ends[part] - padded[part] - np.uint64(before)
        staged = homes[part] < 0
        if staged.any():
            arena = line.stage(int(ends[stop - 1]) - before)
            _copy(np.uint64(arena.address) + offsets[staged], addresses[part][staged],
                  lengths[part][staged])  # fmt: skip
            regions[staged] = line.region
        for position in np.unique(homes[part][~staged]):
            one = pieces[int(position)]
            chosen = homes[part] == position
            regions[chosen] = line.shared[one.number]
            offsets[chosen] = addresses[part][chosen] - np.uint64(one.address)
        yield Ranges(start, stop, regions, offsets)
        start = stop


def _share(line: Line, one: Shared) -> int:
    """Have the owner map a piece, once for each connection; return its number there."""
    if one.number not in line.shared:
        try:
            answer, _ = line.ask(msg.Share(one.nbytes), one.fd)
        except RefusedError as error:
            line.shared[one.number] = _REFUSED
            _log.warning("%s; puts from it copy once more", error)
        else:
            line.shared[one.number] = answer.region
    return line.shared[one.number]


def put_message(
    namespace_id: int,
    keys: KeyArray,
    parents: KeyArray | None,
    lengths: Addresses,
    counts: npt.NDArray[np.uint32],
    durability: str,
    where: Ranges,
) -> msg.Put:
    """Return the message that stores blocks [where.start, where.stop)."""
    part = slice(where.start, where.stop)
    return msg.Put(
        namespace_id=namespace_id,
        keys=keys[part].tobytes(),
        parents=b"" if parents is None else parents[part].tobytes(),
        regions=where.regions.tobytes(),
        offsets=np.ascontiguousarray(where.offsets, np.uint64).tobytes(),
        lengths=np.ascontiguousarray(lengths[part], np.uint64).tobytes(),
        counts=np.ascontiguousarray(counts[part], np.uint32).tobytes(),
        durability=durability,
    )


def total(results: list[PutResult]) -> PutResult:
    """Return what several puts did together."""
    return PutResult(
        sum(r.blocks_stored for r in results), sum(r.blocks_deduplicated for r in results),
        sum(r.bytes_stored for r in results), sum(r.bytes_deduplicated for r in results),
    )  # fmt: skip


def _copy(targets: Addresses, sources: Addresses, lengths: Addresses) -> None:
    statuses = np.zeros(len(sources), np.int32)
    sources, lengths = np.ascontiguousarray(sources), np.ascontiguousarray(lengths)
    _native.copy_verify(np.ascontiguousarray(targets), sources, lengths, None, statuses)
    bad = np.flatnonzero(statuses)
    if len(bad):
        raise UsageError(
            f"memory cannot be read: {int(lengths[bad[0]])} bytes at {int(sources[bad[0]]):#x}"
        )
