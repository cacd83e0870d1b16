"""The reading side of a client: lookups, copies and leases without asking the owner.

Layer: L4.

- Nothing here makes a system call once index and segments are mapped, but for copies of blocks
  that lie on disk: one pread each.
- Without an owner what is mapped can still be read; the rest is a miss.
- A copy that finds another checksum is a miss, and the owner is told, who drops the block.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.backend import Mask
from kvfs.buffers import Addresses
from kvfs.clients import messages as msg
from kvfs.clients.fetching import Fetcher
from kvfs.clients.segments import Attached, MappedSegment
from kvfs.engine.index import RECORD, RecordArray
from kvfs.engine.segment_table import group_by_segment, is_verified
from kvfs.engine.stitching import Backings, backings_of
from kvfs.errors import BusyError, KvfsError, LeaseExpiredError, UnavailableError
from kvfs.keys import KeyArray
from kvfs.phase import Phase
from kvfs.units import PAGE

_ATTEMPTS: Final = 3  # copies of one block tried before it is a miss
_LOOKS: Final = 8  # lookups of a batch whose index changes all the time


@dataclass(slots=True, eq=False)
class RemoteLease:
    """Blocks held by this process's lease page.

    Attributes:
        places: What `release` gives back.
        parts: The records that lie in segments mapped here, by position.
        fetched: Positions of those whose bytes the owner must copy.
    """

    records: RecordArray
    attached: Attached
    places: bytes
    namespace_id: int
    phase: Phase
    fetched: npt.NDArray[np.intp] = field(default_factory=lambda: np.zeros(0, np.intp))
    parts: list[tuple[MappedSegment, npt.NDArray[np.intp]]] = field(default_factory=list)

    def backings(self) -> Backings:
        """Say where to map each block from."""
        return backings_of(
            self.records, ((segment.backing, positions) for segment, positions in self.parts)
        )

    def check(self) -> None:
        """Raise LeaseExpiredError if the owner has taken the lease away."""
        if self.attached.link.page.is_revoked:
            raise LeaseExpiredError(
                "the pool's owner needed the room: this process gave no sign of life, or held too "
                "much; what was read may be other bytes: read again"
            )

    def release(self) -> None:
        """Give it back; idempotent."""
        places, self.places = self.places, b""
        if places:
            self.attached.link.page.release(places)


class RemoteReader:
    """Reads blocks of a pool that another process owns. Thread-safe."""

    def __init__(self, attached: Callable[[], Attached]) -> None:
        """Bind to what is attached; `attached` attaches anew where it must be."""
        self._attached = attached

    def lookup(self, namespace_id: int, keys: KeyArray) -> RecordArray:
        """Return the fastest copy of each block; length 0 for a miss."""
        found = np.empty(len(keys), RECORD)
        for _ in range(_LOOKS):
            index = self._index(self._attached(), namespace_id)
            if index is None:
                break
            index.lookup(keys, found)
            if not index.is_superseded:
                return found
        return np.zeros(len(keys), RECORD)

    def match_prefix(self, namespace_id: int, keys: KeyArray) -> int:
        """Return how many leading keys are resident."""
        for _ in range(_LOOKS):
            index = self._index(self._attached(), namespace_id)
            if index is None:
                break
            count = index.match_prefix(keys)
            if not index.is_superseded:
                return count
        return 0

    def touch(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> int:
        """Report an access to what is resident, as a copy would; return how much that is."""
        records = self.lookup(namespace_id, keys)
        count = int(np.count_nonzero(records["length"]))
        self._attached().link.ring.push(records, phase)
        return count

    def read_into(
        self, namespace_id: int, keys: KeyArray, addresses: Addresses, lengths: Addresses,
        phase: Phase = Phase.UNKNOWN,
    ) -> Mask:  # fmt: skip
        """Copy whole blocks to memory, verified; return which were."""
        done = np.zeros(len(keys), np.bool_)
        for _ in range(_ATTEMPTS):
            todo = np.flatnonzero(~done)
            if not len(todo):
                break
            part = keys if len(todo) == len(keys) else np.ascontiguousarray(keys[todo])
            lease = self._hold(namespace_id, part, phase)
            try:
                records = lease.records
                usable = (records["length"] > 0) & (records["length"] <= lengths[todo])
                records["length"][~usable] = 0
                if not usable.any():
                    break
                self._verify_at_owner(lease, namespace_id)
                wanted = records["length"] > 0
                good, bad = self._copy(lease, addresses[todo])
                if lease.attached.link.page.is_revoked:
                    continue  # perhaps other bytes were copied
            finally:
                lease.release()
            done[todo[good]] = True
            if bad.any():
                self._report(lease.attached, namespace_id, part[bad])
            elif good[wanted].all() and wanted[usable].all():
                break
        return done

    def lease(self, namespace_id: int, keys: KeyArray, phase: Phase = Phase.UNKNOWN) -> RemoteLease:
        """Hold verified blocks for reading in place."""
        for attempt in range(_ATTEMPTS):
            lease = self._hold(namespace_id, keys, phase)
            try:
                self._verify_at_owner(lease, namespace_id)
                bad = self._verify(lease)
                if bad.any():
                    self._report(lease.attached, namespace_id, keys[bad])
                    lease.records[bad] = np.zeros(1, RECORD)[0]
                if not bad.any() or attempt == _ATTEMPTS - 1:
                    lease.check()
                    return lease
            except BaseException:
                lease.release()
                raise
            lease.release()
        raise AssertionError("the last attempt returns")

    def read_ranges(
        self,
        lease: RemoteLease,
        positions: npt.NDArray[np.integer],
        offsets: Addresses,
        lengths: Addresses,
        addresses: Addresses,
    ) -> Mask:
        """Copy parts of leased, verified blocks."""
        bases = _addresses(lease)[positions]
        statuses = np.zeros(len(positions), np.int32)
        bases[bases > 0] += offsets[bases > 0]
        chosen = np.flatnonzero(bases)
        part = np.zeros(len(chosen), np.int32)
        _native.copy_verify(
            np.ascontiguousarray(addresses[chosen]), bases[chosen],
            np.ascontiguousarray(lengths[chosen]), None, part,
        )  # fmt: skip
        statuses[:] = -1
        statuses[chosen] = part
        lease.check()
        good: Mask = statuses == 0
        apart = np.flatnonzero(np.isin(positions, lease.fetched))
        good[apart] = self._fetch(
            lease, positions[apart], offsets[apart], lengths[apart], addresses[apart]
        )
        return good

    # --- internals

    def _index(self, attached: Attached, namespace_id: int) -> _native.Index | None:
        """Return the index; None if it is out of date and the owner is gone."""
        index = attached.indexes.get(namespace_id)
        if index is not None and index.is_superseded:
            attached.forget_index(namespace_id, index)
            index = None
        if index is not None:
            return index
        try:
            return attached.index(namespace_id)
        except UnavailableError:
            return None

    def _hold(self, namespace_id: int, keys: KeyArray, phase: Phase) -> RemoteLease:
        """Look up, hold, and look up again, until both say the same."""
        records, again = np.empty(len(keys), RECORD), np.empty(len(keys), RECORD)
        for look in range(_LOOKS):
            attached = self._attached()
            index = self._index(attached, namespace_id)
            if index is None:
                break
            page = attached.link.page
            index.lookup(keys, records)
            try:
                places = page.hold(records)
            except OSError as error:
                raise BusyError("this process holds too many segments; close views") from error
            index.lookup(keys, again)
            if index.is_superseded or page.is_revoked:
                page.release(places)
                continue
            if records.tobytes() != again.tobytes():
                if look < _LOOKS - 1:
                    page.release(places)
                    continue
                records["length"][records.view("V64") != again.view("V64")] = 0
            lease = RemoteLease(records, attached, places, namespace_id, phase)
            try:
                self._map(lease)
                attached.link.ring.push(_without(records, lease.fetched), phase)
            except BaseException:
                lease.release()
                raise
            return lease
        return RemoteLease(np.zeros(len(keys), RECORD), self._attached(), b"", namespace_id, phase)

    def _map(self, lease: RemoteLease) -> None:
        """Find the segments of a lease; what cannot be mapped becomes a miss."""
        attached, records = lease.attached, lease.records
        groups = [
            (device << 56 | slot << 32 | generation, positions)
            for device, slot, generation, positions in group_by_segment(records)
        ]
        with contextlib.suppress(UnavailableError):  # no owner, no room: what is mapped must do
            attached.find_segments(lease.namespace_id, [place for place, _ in groups])
        fetched = [lease.fetched]
        for place, positions in groups:
            segment = attached.segments.get(place)
            if segment is not None:
                lease.parts.append((segment, positions))
            elif place in attached.fetched:
                fetched.append(positions)
            else:
                records["length"][positions] = 0
        lease.fetched = np.concatenate(fetched)

    def _verify_at_owner(self, lease: RemoteLease, namespace_id: int) -> None:
        """Have the owner verify, from the medium, what no seal vouches for."""
        records = lease.records
        for segment, positions in lease.parts:
            if not segment.needs_verify:
                continue
            risky = positions[(records["length"][positions] > 0)
                              & ~is_verified(records[positions])
                              & ~segment.is_verified(records["entry"][positions])]  # fmt: skip
            for start in range(0, len(risky), msg.KEYS_MAX):
                part = risky[start : start + msg.KEYS_MAX]
                keys = np.ascontiguousarray(records["key"][part])
                try:
                    answer = lease.attached.link.ask(msg.Verify(namespace_id, keys.tobytes()))
                    good = np.frombuffer(answer.good, np.uint8) > 0
                except UnavailableError:
                    good = np.zeros(len(part), np.bool_)
                records["length"][part[~good]] = 0
                segment.mark_verified(records["entry"][part[good]])

    def _verify(self, lease: RemoteLease) -> Mask:
        """Verify what nobody has verified yet; return what is bad."""
        records = lease.records
        bad = np.zeros(len(records), np.bool_)
        for segment, positions in lease.parts:
            part = records[positions]
            digests, sound = segment.digests(part)
            bad[positions] = ~sound & (part["length"] > 0)
            todo = np.flatnonzero((part["length"] > 0) & sound & ~is_verified(part)
                                  & ~segment.is_verified(part["entry"]))  # fmt: skip
            if not len(todo) or not lease.attached.link.welcome.verify_reads:
                continue
            statuses = np.zeros(len(todo), np.int32)
            starts = part["page"][todo].astype(np.uint64) * np.uint64(PAGE)
            _native.verify(
                starts + np.uint64(segment.address), part["length"][todo].astype(np.uint64),
                np.ascontiguousarray(digests[todo]), statuses,
            )  # fmt: skip
            segment.mark_verified(part["entry"][todo[statuses == 0]])
            bad[positions[todo[statuses != 0]]] = True
        return bad

    def _copy(self, lease: RemoteLease, addresses: Addresses) -> tuple[Mask, Mask]:
        """Copy and verify; return what was copied, and what did not hold.

        From maps of memory, and with pread from disk, as the owner does: a fault brings in less at
        a time than a read that says how much it wants.
        """
        records = lease.records
        digests = np.zeros((len(records), 16), np.uint8)
        sound = np.zeros(len(records), np.bool_)
        fds = np.full(len(records), -1, np.int32)
        for segment, positions in lease.parts:
            digests[positions], sound[positions] = segment.digests(records[positions])
            if segment.is_on_disk:
                fds[positions] = segment.fd
        wanted = records["length"] > 0
        good = np.zeros(len(records), np.bool_)
        lengths = records["length"].astype(np.uint64)
        starts = records["page"].astype(np.uint64) * np.uint64(PAGE)
        for is_file in (False, True):
            chosen = np.flatnonzero(wanted & sound & ((fds >= 0) == is_file))
            if not len(chosen):
                continue
            statuses = np.zeros(len(chosen), np.int32)
            into, checked = np.ascontiguousarray(addresses[chosen]), digests[chosen]
            if is_file:
                _native.pread_verify(
                    fds[chosen], starts[chosen], lengths[chosen], into, checked, statuses
                )
            else:
                mapped = _addresses(lease)[chosen]
                _native.copy_verify(into, mapped, lengths[chosen], checked, statuses)
            good[chosen[statuses == 0]] = True
        bad = wanted & ~good
        bad[lease.fetched] = False  # the owner has seen for itself
        apart = lease.fetched[wanted[lease.fetched]]
        whole = np.zeros(len(apart), np.uint64)
        good[apart] = self._fetch(lease, apart, whole, lengths[apart], addresses[apart])
        return good, bad

    def _fetch(
        self, lease: RemoteLease, positions: npt.NDArray[np.integer], offsets: Addresses,
        lengths: Addresses, addresses: Addresses,
    ) -> Mask:  # fmt: skip
        """Have the owner copy parts of leased blocks; return which it did."""
        if not len(positions):
            return np.zeros(0, np.bool_)
        keys = np.ascontiguousarray(lease.records["key"][positions])
        fetcher = Fetcher(lease.attached.link, lease.namespace_id, lease.phase)
        good = fetcher.fetch(keys, offsets, lengths, addresses)
        split = np.flatnonzero(good & (lengths > msg.TRAY_BYTES))  # in several answers
        if len(split):  # of one copy, if the one that is held was found all the time
            now = self.lookup(lease.namespace_id, np.ascontiguousarray(keys[split]))
            held = lease.records[positions[split]]
            for name in ("device", "segment", "generation", "page"):
                good[split] &= now[name] == held[name]
            good[split] &= now["length"] > 0
        return good

    def _report(self, attached: Attached, namespace_id: int, keys: KeyArray) -> None:
        """Tell the owner of blocks that did not hold, so that it drops them."""
        try:
            for start in range(0, len(keys), msg.KEYS_MAX):
                part = np.ascontiguousarray(keys[start : start + msg.KEYS_MAX])
                attached.link.ask(msg.Verify(namespace_id, part.tobytes(), again=True))
        except KvfsError:
            return  # they are misses all the same


def _without(records: RecordArray, positions: npt.NDArray[np.intp]) -> RecordArray:
    """Return the records, those at some positions made misses."""
    if not len(positions):
        return records
    found = records.copy()
    found["length"][positions] = 0
    return found


def _addresses(lease: RemoteLease) -> Addresses:
    """Return where each block is mapped; 0 for a miss."""
    found = np.zeros(len(lease.records), np.uint64)
    starts = lease.records["page"].astype(np.uint64) * np.uint64(PAGE)
    for segment, positions in lease.parts:
        found[positions] = np.uint64(segment.address) + starts[positions]
    found[lease.records["length"] == 0] = 0
    return found
