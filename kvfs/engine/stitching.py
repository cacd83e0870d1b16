"""How blocks that lie scattered become one range of addresses: what to map where.

Layer: L2, pure.

- A map starts and ends at multiples of the device's granularity, in the file and in memory: 4 KiB
  for files, often 2 MiB for DAX devices. So the range may have to start some way into its first
  map (`skew`), and blocks that are no neighbours on such a device can seldom be stitched.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs.devices.base import Backing
from kvfs.engine.index import RecordArray
from kvfs.units import PAGE, align_up

Offsets = npt.NDArray[np.uint64]
Descriptors = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Backings:
    """Where to map each of n blocks from.

    Attributes:
        fds: The file of each block; -1 for a miss, or where there is none.
        offsets: Where in it the block starts, in bytes.
        granularity: The coarsest of all.
    """

    fds: Descriptors
    offsets: Offsets
    granularity: int


def backings_of(
    records: RecordArray, parts: Iterable[tuple[Backing, npt.NDArray[np.intp]]]
) -> Backings:
    """Say where to map records from: those at the positions of a part, from its segment."""
    fds = np.full(len(records), -1, np.int32)
    offsets = records["page"].astype(np.uint64) * np.uint64(PAGE)
    granularity = PAGE
    for backing, positions in parts:
        fds[positions] = backing.fd
        offsets[positions] += np.uint64(backing.offset)
        granularity = max(granularity, backing.granularity)
    return Backings(fds, offsets, granularity)


@dataclass(frozen=True, slots=True)
class Stitches:
    """What to map. Positions, offsets and lengths in bytes.

    Attributes:
        skew: Where in the range the first block starts.
        nbytes: Of the whole range.
        positions: Where in the range each map starts.
        fds: The file of each.
        offsets: Where in the file it starts.
        lengths: Of each.
    """

    skew: int
    nbytes: int
    positions: Offsets
    fds: Descriptors
    offsets: Offsets
    lengths: Offsets


def stitch(backings: Backings, lengths: Offsets, stride: int) -> Stitches | None:
    """Lay n blocks out, `stride` bytes apart; None if they cannot be mapped so.

    Args:
        backings: Where they are, at multiples of 4 KiB.
        lengths: Bytes of each; all but the last fill their stride, up to the next 4 KiB.
        stride: A multiple of 4 KiB.
    """
    fds, offsets, granularity = backings.fds, backings.offsets, backings.granularity
    if (fds < 0).any():
        return None
    positions = np.arange(len(fds), dtype=np.uint64) * np.uint64(stride)
    if granularity <= PAGE:
        return Stitches(0, len(fds) * stride, positions, fds, offsets, lengths)
    unit = np.int64(granularity)
    skew = int(offsets[0]) % granularity
    places = positions.astype(np.int64) + skew
    shifts = offsets.astype(np.int64) - places
    breaks = np.flatnonzero((fds[1:] != fds[:-1]) | (shifts[1:] != shifts[:-1])) + 1
    if (places[breaks] % unit).any() or (shifts[np.append(0, breaks)] % unit).any():
        return None
    end = align_up(int(places[-1]) + int(lengths[-1]), granularity)
    starts = np.append(np.int64(0), places[breaks])
    firsts = np.append(0, breaks)
    return Stitches(
        skew, end, starts.astype(np.uint64), np.ascontiguousarray(fds[firsts]),
        (starts + shifts[firsts]).astype(np.uint64),
        np.diff(np.append(starts, end)).astype(np.uint64),
    )  # fmt: skip
