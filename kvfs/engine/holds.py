"""Which segments other processes hold: the lease pages of a pool's clients.

Layer: L3.

- A client publishes what it reads in its page (`_native.LeasePage`); the owner asks all pages
  before it gives a segment back, after the segment's blocks have left the index. A page counts only
  for namespaces that its client has attached: nobody can hold the segments of others.
- What is held is asked for again by a timer, when a client goes, and when room is needed. A client
  whose heart has stopped, or which holds more of a device than its share, loses its page when what
  it holds is needed; it learns of that after its next copy, and attaches again.

Locks: the engine's lock, for everything.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvfs import _native
from kvfs.engine.segment_table import SegmentState
from kvfs.units import format_bytes

LEASE_SLOTS: Final = 4096
_log = logging.getLogger("kvfs.clients")


def place_of(segment: SegmentState) -> int:
    """Return the number that stands for this life of a segment; see native/lease_page.h."""
    handle = segment.handle
    return handle.device_index << 56 | handle.slot << 32 | handle.generation


@dataclass(slots=True, eq=False)
class Holder:
    """A client that may hold segments.

    Attributes:
        name: For people.
        page: What it holds.
        since_ns: When it came (monotonic clock).
        namespaces: Ids of the namespaces that it has attached.
    """

    name: str
    page: _native.LeasePage
    since_ns: int
    namespaces: set[int] = field(default_factory=set)

    def places(self) -> set[int]:
        """Return what its page says it holds; whatever it says."""
        return set(np.frombuffer(self.page.places(), np.uint64).tolist())


class Holds:
    """The clients of a pool. Every method needs the engine's lock."""

    def __init__(self, timeout_s: float, share: float) -> None:
        """Make it empty.

        Args:
            timeout_s: How long a client's heart may stand still before its page can be revoked.
            share: How much of a device one client may hold when others need it.
        """
        self._timeout_ns = int(timeout_s * 1e9)
        self._share = share
        self._holders: list[Holder] = []
        self.revoked = 0  # pages, since open
        self.failures = 0  # requests of clients that met what nobody expected, since open

    def add(self, holder: Holder) -> None:
        """Let a client hold segments from now on; it has not seen an index yet."""
        self._holders.append(holder)

    def remove(self, holder: Holder) -> None:
        """Forget a client and what it held; idempotent."""
        if holder in self._holders:
            self._holders.remove(holder)

    @property
    def count(self) -> int:
        """How many clients there are."""
        return len(self._holders)

    def is_held(self, segment: SegmentState) -> bool:
        """Say whether a client holds a segment. REQUIRES: its blocks have left the index."""
        if not self._holders:
            return False
        place = place_of(segment)
        return any(
            segment.namespace_id in holder.namespaces and holder.page.is_held(place)
            for holder in self._holders
        )

    def note_freed(self, segment: SegmentState) -> None:
        """Tell the clients that may have a segment mapped that it is gone."""
        if segment.handle.is_shared:
            for holder in self._holders:
                if segment.namespace_id in holder.namespaces:
                    holder.page.note_freed()

    def snapshot(self, segments: Iterable[SegmentState]) -> set[int]:
        """Return the places of those segments that are held just now, for choosing."""
        if not self._holders:
            return set()
        namespace_of = {place_of(segment): segment.namespace_id for segment in segments}
        return {
            place
            for holder in self._holders
            for place in holder.places()
            if namespace_of.get(place) in holder.namespaces
        }

    def relieve(self, segments: list[SegmentState], capacity_bytes: int, now_ns: int) -> bool:
        """Revoke pages of clients that keep a device from giving back what is needed.

        Args:
            segments: All segments of the device.
            capacity_bytes: Its size.
            now_ns: The monotonic clock.

        Returns:
            Whether any was revoked.
        """
        revoked = False
        for holder in self._holders:
            places = holder.places()
            held_bytes = sum(
                segment.handle.nbytes
                for segment in segments
                if segment.namespace_id in holder.namespaces and place_of(segment) in places
            )
            silent_ns = now_ns - max(holder.page.heartbeat_ns, holder.since_ns)
            if not held_bytes:
                continue
            if silent_ns > self._timeout_ns:
                reason = f"gave no sign of life for {silent_ns / 1e9:.1f} s"
            elif held_bytes > self._share * capacity_bytes:
                reason = f"held {format_bytes(held_bytes)}, more than its share"
            else:
                continue
            holder.page.revoke()
            self.revoked += 1
            revoked = True
            _log.warning("leases revoked: %s %s; room is needed", holder.name, reason)
        return revoked
