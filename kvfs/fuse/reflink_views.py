"""Views: content that is scattered over segments, as one file that the kernel can read itself.

Layer: L5.

- A view is an unnamed file that shares the extents of a device's segments (`Device.assemble`), and
  holds exactly the content's bytes. It ends with its last descriptor, so that a crash leaves
  nothing of it.
- The rule: content of at least BYTES_MIN, in runs of RUN_BYTES_MIN or more on average, gets a view
  when it is opened for the second time. One open does not pay for one: a view has pages of its own,
  which its first reader brings in from the medium, while those of segments just written are there.
- Content all of which lies in memory gets none: it would take memory a second time.
- All blocks lie on one device, persisted and verified. Blocks that are still to be verified are
  verified before the view is made.
- A view holds its segments as long as it lives, so that what it shares is no more than what is
  accounted for, and eviction knows. It is kept for LINGER_NS after its last use, and goes at once
  when a device needs room, or leaves service.
- Whatever stands in the way, the content is read by another lane.

Locks: `_lock` guards the tables, for book-keeping only; a leaf.
"""

import logging
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clock import Clock
from kvfs.devices.base import DeviceInfo
from kvfs.devices.reflink import Extent
from kvfs.engine.reader import Lease
from kvfs.engine.segment_table import SegmentStatus
from kvfs.engine.store import Store
from kvfs.errors import KvfsError
from kvfs.file_reading import FileReader
from kvfs.units import KIB, MIB, PAGE

BYTES_MIN: Final = 4 * MIB
RUN_BYTES_MIN: Final = 256 * KIB
RUNS_MAX: Final = 1 << 14  # a quarter of a second on XFS
VIEWS_MAX: Final = 256
DEVICE_SHARE: Final = 4  # what is kept without use has at most one part in so many of its device
LINGER_NS: Final = 30_000_000_000
RETRY_NS: Final = 60_000_000_000
_RECENT_MAX: Final = 1 << 14
_log = logging.getLogger("kvfs.fuse")


@dataclass(slots=True, eq=False)
class View:
    """A file that holds some content. `users`: handles that the kernel reads it for, and plans."""

    content: bytes
    device_index: int
    nbytes: int
    fd: int
    lease: Lease
    users: int = 0
    idle_ns: int = 0


@dataclass(slots=True, eq=False)
class Offer:
    """How content can be passed through: a view of it, or what one can be made of."""

    lease: Lease
    view: View | None
    device_index: int
    extents: list[Extent]


class Views:
    """The views of a mount. Thread-safe, synchronous."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """Make views of a store's blocks."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._views: OrderedDict[bytes, View] = OrderedDict()  # the least recently used first
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._retry_ns: dict[int, int] = {}  # when to try a device again that refused
        self._built_count = 0
        self._failed_count = 0

    def note_open(self, reader: FileReader) -> None:
        """Note that content was opened, so that the next open may get a view."""
        if reader.size_bytes < BYTES_MIN or not len(reader.keys):
            return
        content = _content_of(reader)
        with self._lock:
            self._recent[content] = None
            self._recent.move_to_end(content)
            if len(self._recent) > _RECENT_MAX:
                self._recent.popitem(last=False)

    def offer(self, reader: FileReader, fastest: Lease) -> Offer | None:
        """Return how content can be passed through, holding it; None if it cannot or should not.

        What is not a view yet must be verified, then go to `build`. Moves no bytes.
        """
        if reader.size_bytes < BYTES_MIN:
            return None
        content = _content_of(reader)
        with self._lock:
            view = self._views.get(content)
            is_known = content in self._recent
            if view is not None:
                view.users += 1
                self._views.move_to_end(content)
        if view is not None:
            if self._is_in_service(view.device_index):
                return Offer(self._store.share(view.lease), view, view.device_index, [])
            self.release(view)
            return None
        info = self._device_of(fastest) if is_known else None
        if info is None:
            return None
        keys, namespace_id = reader.keys, reader.namespace_id
        lease = self._store.lease(namespace_id, keys, verify=False, device=info.index)
        extents = extents_of(reader, lease, info)
        if extents is None or len(extents) > min(RUNS_MAX, reader.size_bytes // RUN_BYTES_MIN):
            self._store.release(lease)
            return None
        return Offer(lease, None, info.index, extents)

    def build(self, reader: FileReader, offer: Offer) -> View | None:
        """Make a view of what is offered, and use it until `release`; None if that fails.

        REQUIRES: all that the offer holds is verified. The offer's lease stays the caller's.
        """
        try:
            if not _is_padding_zero(reader, offer.lease):
                return None
            fd = self._store.assemble(offer.device_index, offer.extents, reader.size_bytes)
        except (OSError, KvfsError) as error:
            self._note_failure(offer.device_index, error)
            return None
        lease = self._store.share(offer.lease)
        made = View(_content_of(reader), offer.device_index, reader.size_bytes, fd, lease)
        with self._lock:
            view = self._views.setdefault(made.content, made)  # another open may have come first
            self._views.move_to_end(view.content)
            view.users += 1
            self._built_count += view is made
        if view is not made:
            self._end([made])
        return view

    def release(self, view: View) -> None:
        """Let go of a view; it is kept for a while."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            view.users -= 1
            view.idle_ns = now_ns
            surplus = self._surplus()
        self._end(surplus)

    def sweep(self, before_ns: int) -> None:
        """End views without use since `before_ns` (monotonic), or that nobody can ask for."""
        with self._lock:
            old = [
                view
                for view in self._views.values()
                if not view.users and (view.idle_ns <= before_ns or self._is_dead(view))
            ]
            for view in old:
                del self._views[view.content]
        self._end(old)

    def snapshot(self) -> dict[str, int]:
        """Return what was made, what failed, and what there is."""
        with self._lock:
            return {
                "views_built": self._built_count,
                "views_failed": self._failed_count,
                "views": len(self._views),
                "views_cached": sum(not view.users for view in self._views.values()),
                "view_bytes": sum(view.nbytes for view in self._views.values()),
            }

    # --- internals

    def _device_of(self, fastest: Lease) -> DeviceInfo | None:
        """Return the device from which content could be viewed: one that it is read from now."""
        devices = {part.segment.handle.device_index for part in fastest.parts}
        infos = [self._store.state.device(index).info for index in sorted(devices)]
        able = [info for info in infos if info.cloning.granularity]
        if len(able) != 1:
            return None
        retry_ns = self._retry_ns.get(able[0].index, 0)
        is_due = not retry_ns or self._clock.monotonic_ns() >= retry_ns
        return able[0] if is_due and self._is_in_service(able[0].index) else None

    def _is_dead(self, view: View) -> bool:
        """Say whether a view's device left service, or it alone keeps a segment from being freed.

        What was removed should not wait for time to give its space back.
        """
        segments = view.lease.segments
        return not self._is_in_service(view.device_index) or not all(s.live_count for s in segments)

    def _is_in_service(self, device_index: int) -> bool:
        return not self._store.state.device(device_index).is_offline

    def _surplus(self) -> list[View]:
        """Take out unused views beyond the limits, the oldest first. REQUIRES: `_lock`."""
        idle = [view for view in self._views.values() if not view.users]
        sizes: dict[int, int] = {}
        for view in idle:
            sizes[view.device_index] = sizes.get(view.device_index, 0) + view.nbytes
        surplus = []
        for view in idle:
            info = self._store.state.device(view.device_index).info
            is_much = sizes[view.device_index] > info.capacity_bytes // DEVICE_SHARE
            if is_much or len(self._views) > VIEWS_MAX:
                sizes[view.device_index] -= view.nbytes
                surplus.append(self._views.pop(view.content))
        return surplus

    def _end(self, views: list[View]) -> None:
        """End views that are in no table: the file first, then what it shares may go."""
        for view in views:
            os.close(view.fd)
            self._store.release(view.lease)

    def _note_failure(self, device_index: int, error: Exception) -> None:
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            is_first = device_index not in self._retry_ns
            self._retry_ns[device_index] = now_ns + RETRY_NS
            self._failed_count += 1
        name = self._store.state.device(device_index).info.name
        report = _log.info if is_first else _log.debug
        report("no view could be made, content is read natively: %s: %s", name, error)


def extents_of(reader: FileReader, lease: Lease, info: DeviceInfo) -> list[Extent] | None:
    """Return what of a device's segments makes up some content; None if it cannot be shared.

    A block's padding up to its page is shared with it; what is left of its stride is a hole.
    """
    records, unit = lease.records, info.cloning.granularity
    stored = records["length"].astype(np.int64)
    starts = records["page"].astype(np.int64) * PAGE
    targets = np.arange(len(records), dtype=np.int64) * reader.stride
    padded = -(-stored // unit) * unit
    is_last = targets == targets[-1]
    if not (
        stored.all()
        and int(targets[-1] + stored[-1]) == reader.size_bytes
        and not (starts % unit).any()
        and (is_last | (padded <= reader.stride)).all()
        and (len(records) == 1 or reader.stride % unit == 0)
        and (unit == PAGE or not (stored[:-1] % unit).any())
    ):
        return None
    fds = np.empty(len(records), np.int64)
    for part in lease.parts:
        segment, handle = part.segment, part.segment.handle
        is_final = segment.status is SegmentStatus.SEALED or info.cloning.of_written
        is_kept = (records["entry"][part.positions] < segment.persisted_count).all()
        if segment.is_poisoned or handle.address or not (is_final and is_kept):
            return None
        fds[part.positions] = handle.fd
        # A file ends where its last block does; only the content's end may share that.
        ends = (starts + padded)[part.positions]
        if ((ends > handle.nbytes) & ~is_last[part.positions]).any():
            return None
        padded[part.positions] -= np.maximum(ends - handle.nbytes, 0)
    goes_on = (fds[1:] == fds[:-1]) & (np.diff(starts) == reader.stride)
    goes_on &= padded[:-1] == reader.stride
    firsts = np.flatnonzero(np.concatenate([[True], ~goes_on]))
    lasts = np.append(firsts[1:], len(records)) - 1
    lengths = targets[lasts] + padded[lasts] - targets[firsts]
    rows = zip(fds[firsts], starts[firsts], lengths, targets[firsts], strict=True)
    return [Extent(*map(int, row)) for row in rows]


def _is_padding_zero(reader: FileReader, lease: Lease) -> bool:
    """Say whether what follows blocks in their last pages is zero: no checksum covers it."""
    records = lease.records
    ends: npt.NDArray[np.int64] = records["page"].astype(np.int64) * PAGE + records["length"]
    gaps = -ends % PAGE
    gaps[-1] = 0  # cut off
    for part in lease.parts:
        fd = part.segment.handle.fd
        for position in part.positions[gaps[part.positions] > 0].tolist():
            nbytes = int(gaps[position])
            if os.pread(fd, nbytes, int(ends[position])) != bytes(nbytes):
                return False
    return True


def _content_of(reader: FileReader) -> bytes:
    """Return what names some content: its keys, in their order, and its shape."""
    shape = f"{reader.size_bytes} {reader.stride}".encode()
    return _native.xxh3_128(reader.keys.tobytes()) + shape
