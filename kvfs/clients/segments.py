"""The owner's memory as a client sees it: indexes and segments, mapped read-only.

Layer: L4.

- What a lease page holds stays as it is; what it does not hold may be written anew at any time, so
  everything is looked up, held, and looked up again before it is read (native/lease_page.h).
- A segment is mapped at its first use and stays mapped until the owner says that it is gone. Of log
  segments the checksums are read from the summary at their end; of file segments they came with the
  descriptor.
"""

import os
import threading
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clients import channel
from kvfs.clients import messages as msg
from kvfs.clients.link import Link, u64
from kvfs.devices.base import Backing
from kvfs.devices.osfs import MEMORY_FILESYSTEMS, filesystem_type
from kvfs.engine.format import ENTRY, HEADERS_BYTES
from kvfs.engine.holds import LEASE_SLOTS
from kvfs.engine.index import RecordArray
from kvfs.errors import UnavailableError
from kvfs.keys import KEY_BYTES
from kvfs.units import PAGE, align_up

SEGMENTS_MAX: Final = 8192  # mapped at a time
_DIGEST: Final = ENTRY.fields["payload_xxh3"][1] if ENTRY.fields else 0
_DIGEST_BYTES: Final = 16
DigestArray = npt.NDArray[np.uint8]


class MappedSegment:
    """One segment. Dropping the last reference unmaps it."""

    def __init__(self, answer: msg.SegmentAnswer, fd: int) -> None:
        """Map it; takes the descriptor over."""
        self.place = answer.place
        self.needs_verify = answer.needs_verify
        self.verified = np.zeros(0, np.bool_)  # entries that were verified by this process
        self._fd = fd
        self.is_on_disk = filesystem_type(fd) not in MEMORY_FILESYSTEMS
        nbytes = min(answer.nbytes, os.fstat(fd).st_size)
        self._mapping = _native.Mapping(align_up(max(1, nbytes), PAGE))
        if nbytes:
            self._mapping.map(
                np.zeros(1, np.uint64), np.array([fd], np.int32), np.zeros(1, np.uint64),
                np.array([nbytes], np.uint64),
            )  # fmt: skip
        self.nbytes = nbytes
        self.address = self._mapping.address
        if answer.is_log:
            raw = np.frombuffer(memoryview(self._mapping), np.uint8)[: nbytes - HEADERS_BYTES]
            count = len(raw) // ENTRY.itemsize
            rows = raw[len(raw) - count * ENTRY.itemsize :].reshape(-1, ENTRY.itemsize)
            self._entries = rows[::-1]  # entry 0 lies last
            self._digests = None
        else:
            self._entries = np.zeros((0, ENTRY.itemsize), np.uint8)
            self._digests = np.frombuffer(answer.digests, np.uint8).reshape(-1, _DIGEST_BYTES)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def fd(self) -> int:
        """What is read; open as long as this lives."""
        return self._fd

    @property
    def backing(self) -> Backing:
        """What views map."""
        return Backing(self._fd)

    def digests(self, records: RecordArray) -> tuple[DigestArray, npt.NDArray[np.bool_]]:
        """Return checksums, (n, 16), and whether what the records say can be true at all."""
        entries = records["entry"].astype(np.int64)
        ends = records["page"].astype(np.int64) * PAGE + records["length"]
        known = len(self._entries) if self._digests is None else len(self._digests)
        sound = (entries < known) & (ends <= self.nbytes)
        rows = np.where(sound, entries, 0)
        if not known:
            return np.zeros((len(records), _DIGEST_BYTES), np.uint8), sound
        if self._digests is not None:
            return self._digests[rows], sound
        found = self._entries[rows]
        sound &= (found[:, :KEY_BYTES] == records["key"]).all(axis=1)
        return np.ascontiguousarray(found[:, _DIGEST : _DIGEST + _DIGEST_BYTES]), sound

    def mark_verified(self, entries: npt.NDArray[np.integer]) -> None:
        """Note that entries were verified by this process."""
        if len(entries):
            size = int(entries.max()) + 1
            if size > len(self.verified):
                grown = np.zeros(max(size, 2 * len(self.verified)), np.bool_)
                grown[: len(self.verified)] = self.verified
                self.verified = grown
            self.verified[entries] = True

    def is_verified(self, entries: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Say which entries were verified by this process."""
        marks = self.verified
        known = entries < len(marks)
        found = np.zeros(len(entries), np.bool_)
        found[known] = marks[entries[known]]
        return found


@dataclass(slots=True, eq=False)
class Attached:
    """What a client has attached of one owner: a link, indexes, segments."""

    link: Link
    indexes: dict[int, _native.Index] = field(default_factory=dict)
    segments: dict[int, MappedSegment] = field(default_factory=dict)
    fetched: set[int] = field(default_factory=set)  # places that cannot be mapped
    lock: threading.Lock = field(default_factory=threading.Lock)
    freed_seen: int = 0  # of the page's `segments_freed`

    def index(self, namespace_id: int) -> _native.Index:
        """Return the index of a namespace, attached at the first call.

        Raises:
            UnavailableError: It is not attached, and the owner is gone.
        """
        found = self.indexes.get(namespace_id)
        if found is None:
            _, fds = self.link.ask_fds(msg.Attach(namespace_id))
            try:
                found = _native.Index.attach(fds[0])
            except (IndexError, ValueError) as error:
                raise UnavailableError(f"answer of the pool's owner: {error}") from error
            finally:
                channel.close_all(fds)
            self.indexes[namespace_id] = found
        return found

    def forget_index(self, namespace_id: int, index: _native.Index) -> None:
        """Attach anew at the next call, unless another thread has done so already."""
        with self.lock:
            if self.indexes.get(namespace_id) is index:
                del self.indexes[namespace_id]

    def forget_freed(self) -> None:
        """Unmap what the owner has freed. No system call where nothing was.

        Called several times a second, so that a client that is idle keeps nothing either.

        Raises:
            KvfsError: The owner gives no answer.
        """
        if self.link.page.is_revoked:
            self.link.close()  # all of it may go; the watcher attaches again
            return
        freed = self.link.page.segments_freed  # what is freed from here on is seen next time
        if freed == self.freed_seen:
            return
        with self.lock:
            known = [*self.segments, *self.fetched]
        for start in range(0, len(known), LEASE_SLOTS):
            part = u64(known[start : start + LEASE_SLOTS])
            self._forget(self.link.ask(msg.Segments(0, b"", part)).gone)
        self.freed_seen = freed

    def forget_all(self) -> None:
        """Unmap what no lease holds: the owner was another."""
        with self.lock:
            self.segments.clear()
            self.fetched.clear()

    def _forget(self, gone: bytes) -> None:
        with self.lock:
            for place in np.frombuffer(gone, np.uint64).tolist():
                self.segments.pop(place, None)
                self.fetched.discard(place)

    def find_segments(self, namespace_id: int, places: list[int]) -> None:
        """Map the segments that are not mapped yet; those that are gone stay away.

        Raises:
            UnavailableError: The owner is gone, or this process is out of memory or maps.
        """
        missing = [p for p in places if p not in self.segments and p not in self.fetched]
        while missing:
            part = missing[: msg.PLACES_MAX]
            with self.lock:
                known = [*self.fetched, *self.segments][: msg.PLACES_MAX * 8]
            answer, fds = self.link.ask_fds(msg.Segments(namespace_id, u64(part), u64(known)))
            if len(fds) != len(answer.segments) or not 0 < answer.done <= len(part):
                channel.close_all(fds)
                raise UnavailableError("answer of the pool's owner not understood")
            fds.reverse()
            fresh = {}
            try:
                for one in answer.segments:
                    fresh[one.place] = MappedSegment(one, fds.pop())
            except OSError as error:
                raise UnavailableError(f"no room to map a segment: {error}") from error
            finally:
                channel.close_all(fds)
            self._forget(answer.gone)
            with self.lock:
                self.segments.update(fresh)
                self.fetched.update(np.frombuffer(answer.fetched, np.uint64).tolist())
                while len(self.segments) > SEGMENTS_MAX:
                    del self.segments[next(iter(self.segments))]
            missing = missing[answer.done :]
