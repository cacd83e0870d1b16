"""Plans: which lane some content could have as it lies now, and what must be done for it.

Layer: L5.

- Passthrough: the content is one whole file segment of a healthy directory device, verified, or a
  view of what is scattered there (`reflink_views`). The plan's lease keeps the segments.
- Native: every block lies where the core can map it, and needs no medium to be verified first.
"""

import logging
import os
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from kvfs.clock import Clock
from kvfs.engine.reader import Lease
from kvfs.engine.segment_table import is_verified
from kvfs.engine.store import Store
from kvfs.file_reading import FileReader
from kvfs.fuse.reflink_views import Offer, View, Views
from kvfs.units import PAGE

STALLED_NS: Final = 60_000_000_000
BLOCKS_MAX: Final = 1 << 18  # a table of 12 MiB
_log = logging.getLogger("kvfs.fuse")


class Lane(Enum):
    """Who answers reads."""

    PASSTHROUGH = "passthrough"
    NATIVE = "native"
    NAMESPACE = "namespace"


@dataclass(slots=True, eq=False)
class Plan:
    """The best lane for some content as it lies now, which it holds."""

    lane: Lane
    reader: FileReader
    lease: Lease
    is_direct: bool = False
    """For a handle past the page cache, whose reads may end before what they ask for."""
    offer: Offer | None = None
    """How it is passed through, if not as a whole file; its lease is the plan's."""
    view: View | None = None
    """What is passed through, once it is there."""


class LanePlans:
    """Makes plans for the open files of a mount. Thread-safe, synchronous."""

    def __init__(self, store: Store, clock: Clock, *, has_passthrough: bool) -> None:
        """Plan for a pool's files."""
        self.has_passthrough = has_passthrough
        self.views = Views(store, clock)
        self._store = store
        self._clock = clock
        self._stalled_ns: dict[int, int] = {}  # devices, and when they last missed a deadline

    def plan(self, reader: FileReader, *, may_pass: bool = True) -> Plan | None:
        """Return the best lane for what a reader has open, or None for the namespace lane.

        A plan for passthrough must be `vouched` before it is installed; there is none without
        `may_pass`.
        """
        if not 0 < len(reader.keys) <= BLOCKS_MAX:
            return None
        lease = self._store.lease(reader.namespace_id, reader.keys, verify=False)
        plan = Plan(Lane.NAMESPACE, reader, lease)
        try:
            if lease.records["length"].all() and _has_files(lease) and self._is_healthy(lease):
                self._choose(plan, may_pass=may_pass and self.has_passthrough)
        finally:
            if plan.lane is Lane.NAMESPACE:
                self.release(plan)
        return None if plan.lane is Lane.NAMESPACE else plan

    def devices_of(self, lease: Lease) -> list[int]:
        """Return the devices that a lease lies on."""
        return [part.segment.handle.device_index for part in lease.parts]

    def note_stall(self, devices: list[int]) -> None:
        """Note devices that did not answer within a deadline.

        For STALLED_NS the kernel and the core are given nothing of them to read: neither has the
        means to give a read up for sure that the handlers have.
        """
        now_ns = self._clock.monotonic_ns()
        for index in devices:
            name = self._store.state.device(index).info.name
            _log.warning("device missed a deadline, is not read past the handlers: %s", name)
            self._stalled_ns[index] = now_ns

    def stalled(self) -> list[str]:
        """Return the names of the devices that missed a deadline of late."""
        state = self._store.state
        return [state.device(i).info.name for i in list(self._stalled_ns) if self._is_stalled(i)]

    def is_vouched(self, plan: Plan) -> bool:
        """Say whether a plan can be installed as it is.

        The kernel verifies nothing, so a file is verified before its first passthrough, and a view
        is made of what was.
        """
        if plan.lane is Lane.NATIVE or plan.view is not None:
            return True
        if plan.offer is not None:
            return False
        if is_verified(plan.lease.records).all():
            return True
        return not self._store.state.options.verify_reads and self._needs_no_medium(plan.lease)

    def vouched(self, plan: Plan) -> Plan | None:
        """Verify what a plan holds; None, and the plan released, if some of it is bad.

        Where a view is to be passed through, it is made; if that fails, the core reads.
        """
        is_good = False
        try:
            is_good = bool(self._store.verified(plan.lease.records).all())
            if is_good and plan.offer is not None and plan.view is None:
                plan.view = self.views.build(plan.reader, plan.offer)
                plan.lane = Lane.NATIVE if plan.view is None else plan.lane
        except BaseException:
            is_good = False
            raise
        finally:
            if not is_good:
                self.release(plan)
        return plan if is_good else None

    def release(self, plan: Plan) -> None:
        """Let go of a plan that is not installed."""
        self._store.release(plan.lease)
        view, plan.view = plan.view, None
        if view is not None:
            self.views.release(view)

    # --- internals

    def _choose(self, plan: Plan, *, may_pass: bool) -> None:
        """Set the lane of a plan whose blocks are all there."""
        reader, lease = plan.reader, plan.lease
        if may_pass and _is_whole_file(reader, lease):
            plan.lane = Lane.PASSTHROUGH
            return
        plan.offer = self.views.offer(reader, lease) if may_pass else None
        if plan.offer is not None:
            self._store.release(lease)
            plan.lease, plan.view = plan.offer.lease, plan.offer.view
            plan.lane = Lane.PASSTHROUGH
        elif self._needs_no_medium(lease):
            plan.lane = Lane.NATIVE

    def _is_healthy(self, lease: Lease) -> bool:
        state = self._store.state
        return not any(
            part.segment.is_poisoned
            or state.device(part.segment.handle.device_index).is_offline
            or self._is_stalled(part.segment.handle.device_index)
            for part in lease.parts
        )

    def _is_stalled(self, index: int) -> bool:
        since_ns = self._stalled_ns.get(index)
        return since_ns is not None and self._clock.monotonic_ns() - since_ns < STALLED_NS

    def _needs_no_medium(self, lease: Lease) -> bool:
        """Whether all that is left to verify can be verified as it is read."""
        return all(
            not part.segment.needs_verify or is_verified(lease.records[part.positions]).all()
            for part in lease.parts
        )


def _has_files(lease: Lease) -> bool:
    """Say whether all of it can be read through descriptors, by others than this process."""
    return all(part.segment.handle.fd >= 0 for part in lease.parts)


def _is_whole_file(reader: FileReader, lease: Lease) -> bool:
    """Say whether content is exactly one file of a directory, from its first byte to its last."""
    if len(lease.parts) != 1:
        return False
    segment, records = lease.parts[0].segment, lease.records
    handle = segment.handle
    starts = np.arange(len(records), dtype=np.int64) * reader.stride
    return (
        handle.is_file
        and not handle.address
        and not _is_memory(handle.fd)
        and handle.nbytes == reader.size_bytes
        and bool((records["page"].astype(np.int64) * PAGE == starts).all())
        and bool((records["length"][:-1] == reader.stride).all())
        and int(starts[-1]) + int(records["length"][-1]) == reader.size_bytes
    )


def _is_memory(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
