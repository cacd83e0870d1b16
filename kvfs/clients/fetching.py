"""Reading what a client cannot map: the owner copies it, a tray's worth at a time.

Layer: L4.

- Memory of a DAX device lies behind one descriptor for all tenants, which clients are not given.
- The owner verifies each block before it copies any of it.
- A part comes in one answer if it fits in a tray. Of a larger one the pieces may be of different
  copies, and of other bytes, if the block was dropped and put again meanwhile: the caller looks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.backend import Mask
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.clients.link import Link, u64
from kvfs.errors import UnavailableError
from kvfs.keys import KeyArray
from kvfs.phase import Phase
from kvfs.units import align_up


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Reads blocks of a namespace over a session, for a phase of inference."""

    link: Link
    namespace_id: int
    phase: Phase

    def fetch(
        self, keys: KeyArray, offsets: Addresses, lengths: Addresses, addresses: Addresses
    ) -> Mask:
        """Copy parts of blocks to memory; return which were copied. Without an owner, none is.

        Args:
            keys: (n, 32) uint8; may repeat.
            offsets: Where in block i its part starts, in bytes.
            lengths: Of each part; positive.
            addresses: Where it goes.
        """
        good = np.ones(len(keys), np.bool_)
        try:
            with self.link.line() as line:
                for numbers, starts, sizes, places in _trays(lengths):
                    request = msg.Fetch(
                        self.namespace_id, np.ascontiguousarray(keys[numbers]).tobytes(),
                        u64(offsets[numbers] + starts), u64(sizes), int(self.phase),
                    )  # fmt: skip
                    answer, tray = line.fetch(request)
                    got = np.frombuffer(answer.good, np.uint8) > 0
                    if len(got) != len(numbers):
                        raise UnavailableError("answer of the pool's owner not understood")
                    good[numbers[~got]] = False
                    statuses = np.zeros(len(numbers), np.int32)
                    _native.copy_verify(
                        addresses[numbers] + starts, places + np.uint64(tray), sizes, None, statuses
                    )
                    good[numbers[statuses != 0]] = False
        except UnavailableError:
            return np.zeros(len(keys), np.bool_)
        return good


_Pieces = tuple[npt.NDArray[np.intp], Addresses, Addresses, Addresses]


def _trays(lengths: Addresses) -> Iterator[_Pieces]:
    """Yield trays: numbers of parts, where in the part a piece starts, its size, its place."""
    pieces: list[tuple[int, int, int, int]] = []
    at = 0
    for number, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            least = 1 if length > msg.TRAY_BYTES else length
            if msg.TRAY_BYTES - at < least or len(pieces) == msg.KEYS_MAX:
                yield _columns(pieces)
                pieces, at = [], 0
            size = min(length - start, msg.TRAY_BYTES - at)
            pieces.append((number, start, size, at))
            at += align_up(size, msg.TRAY_ALIGNMENT)
            start += size
    if pieces:
        yield _columns(pieces)


def _columns(pieces: list[tuple[int, int, int, int]]) -> _Pieces:
    table = np.array(pieces, np.uint64)
    return (
        table[:, 0].astype(np.intp), np.ascontiguousarray(table[:, 1]),
        np.ascontiguousarray(table[:, 2]), np.ascontiguousarray(table[:, 3]),
    )  # fmt: skip
