"""The segments that kvfs-core has, and what holds them.

Layer: L5.

- A segment is given to the core once, stays while a table names it, and for a while longer, so that
  a file opened again finds it mapped and verified. As long as the core has it, a lease holds it.

Not thread-safe: guarded by the lock of `Lanes`, which is held over short messages to the core.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvfs.engine.reader import Lease
from kvfs.engine.segment_table import SegmentState
from kvfs.engine.store import Store
from kvfs.errors import UnavailableError
from kvfs.fuse.core_client import CoreClient

Place = tuple[int, int, int]
"""Device, slot and generation of a segment."""


@dataclass(slots=True, eq=False)
class _Segment:
    """A segment that the core has. `users`: tables that name it."""

    ref: int
    lease: Lease
    users: int = 0
    idle_ns: int = 0


class CoreSegments:
    """What the core may read from."""

    def __init__(self, store: Store, client: CoreClient) -> None:
        """Give a core segments of a pool."""
        self._store = store
        self._client = client
        self._known: dict[Place, _Segment] = {}
        self._last_ref = 0

    def places(self) -> list[Place]:
        """Return the segments that the core has."""
        return list(self._known)

    def has(self, lease: Lease) -> bool:
        """Say whether the core has all segments of a lease."""
        return all(_place_of(part.segment) in self._known for part in lease.parts)

    def use(self, lease: Lease, places: list[Place]) -> npt.NDArray[np.uint32]:
        """Count a table that names a lease's segments, each as one more place; return their refs.

        Raises:
            OSError, UnavailableError: The core did not take one; `places` tells which are counted.
        """
        refs = np.zeros(len(lease.records), np.uint32)
        for part in lease.parts:
            place = _place_of(part.segment)
            known = self._known.get(place)
            if known is None:
                known = self._known[place] = self._given(part.segment)
            known.users += 1
            places.append(place)
            refs[part.positions] = known.ref
        return refs

    def let_go(self, places: list[Place], now_ns: int) -> None:
        """Count one table less."""
        for place in places:
            known = self._known[place]
            known.users -= 1
            known.idle_ns = now_ns

    def drop(self, before_ns: int) -> None:
        """Take segments back that no table has used since."""
        unused = [
            place
            for place, known in self._known.items()
            if not known.users and known.idle_ns <= before_ns
        ]
        for place in unused:
            known = self._known.pop(place)
            with contextlib.suppress(OSError, UnavailableError):
                self._client.drop_segment(known.ref)
            self._store.release(known.lease)

    def _given(self, segment: SegmentState) -> _Segment:
        self._last_ref += 1
        self._client.add_segment(self._last_ref, segment.handle.nbytes, segment.handle.fd)
        return _Segment(self._last_ref, self._store.hold(segment))


def _place_of(segment: SegmentState) -> Place:
    handle = segment.handle
    return handle.device_index, handle.slot, handle.generation
