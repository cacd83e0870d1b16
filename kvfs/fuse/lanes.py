"""Lanes: who answers the reads of an open file.

Layer: L5.

    passthrough  the kernel, from the file that holds exactly this content
    native       kvfs-core, from segments it has mapped
    namespace    the request handlers, as everything else

- Passthrough: the content is one whole file segment of a healthy directory device, verified, or a
  view of what is scattered there (`reflink_views`). The handle's lease keeps the segments.
- Native: a table of where each block lies, its fastest copy. The segments it names are held for as
  long as the core may read them: a segment is given to the core once, stays while a table uses it,
  and for LINGER_NS longer, so that a file opened again finds it mapped and verified.
- Held segments cannot be evicted. So tables are taken back after TABLE_NS, and all of them at once
  when a device finds nothing else to free (`reclaim`). The next read is answered by the handler,
  and installs the table again.
- A lane can be refused at any time, by either side; the namespace lane is always right.

Locks: `_lock` guards the tables; taken after the evictor's round lock and before the engine's. No
message that may wait for reads is sent under it.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs.clock import Clock
from kvfs.engine.reader import Lease
from kvfs.engine.segment_table import SegmentState, is_verified
from kvfs.engine.store import Store
from kvfs.errors import UnavailableError
from kvfs.file_reading import FileReader
from kvfs.fuse.core_client import (
    BLOCK,
    BLOCK_VERIFIED,
    SHORT_READS,
    VERIFY_READS,
    CoreClient,
)
from kvfs.fuse.reflink_views import LINGER_NS as VIEW_LINGER_NS
from kvfs.fuse.reflink_views import Offer, View, Views
from kvfs.units import PAGE

TABLE_NS: Final = 10_000_000_000
LINGER_NS: Final = 1_000_000_000
STALLED_NS: Final = 60_000_000_000
RETRY_NS: Final = 1_000_000_000
_EVER_NS: Final = 1 << 63
BLOCKS_MAX: Final = 1 << 18  # a table of 12 MiB
_log = logging.getLogger("kvfs.fuse")
Place = tuple[int, int, int]
"""Device, slot and generation of a segment."""


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


@dataclass(slots=True, eq=False)
class _Segment:
    """A segment that the core has. `users`: tables that name it."""

    ref: int
    lease: Lease
    users: int = 0
    idle_ns: int = 0


@dataclass(slots=True, eq=False)
class _Installed:
    """What is installed for one handle."""

    lane: Lane
    block_count: int
    since_ns: int
    places: list[Place] = field(default_factory=list)
    lease: Lease | None = None
    view: View | None = None


class Lanes:
    """The lanes of a mount's open files. Thread-safe, synchronous; may wait for the core."""

    def __init__(
        self, store: Store, client: CoreClient, clock: Clock, *, has_passthrough: bool,
        deadlines_ms: Callable[[], dict[int, int]] = dict,
    ) -> None:  # fmt: skip
        """Serve a pool's files through a core. `deadlines_ms`: of namespaces with their own."""
        self.deadlines_ms = deadlines_ms
        self.has_passthrough = has_passthrough
        self.views = Views(store, clock)
        self._store = store
        self._client = client
        self._clock = clock
        self._lock = threading.Lock()
        self._installed: dict[int, _Installed] = {}
        self._segments: dict[Place, _Segment] = {}
        self._last_ref = 0
        self._refused_ns: dict[int, int] = {}  # when a handle's table was last refused
        self._stuck: list[tuple[int, _Installed]] = []
        self._stalled_ns: dict[int, int] = {}  # devices, and when they last missed a deadline
        store.state.on_pressure = self.reclaim

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
            if lease.records["length"].all() and self._is_healthy(lease):
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

    def install(self, fh: int, inode: int, plan: Plan) -> Lane:
        """Install a plan for a handle, and consume it; return the lane that it got.

        The answer to an open for passthrough must come after. Handles of one inode share the file
        of the first, so their content must be equal. Where the kernel does not take a file, the
        core reads it.
        """
        if plan.lane is Lane.PASSTHROUGH and self._pass_through(fh, inode, plan):
            return Lane.PASSTHROUGH
        return Lane.NATIVE if self._install_table(fh, inode, plan) else Lane.NAMESPACE

    def lane_of(self, fh: int) -> Lane:
        """Return who answers the reads of a handle now."""
        installed = self._installed.get(fh)
        return Lane.NAMESPACE if installed is None else installed.lane

    def is_due(self, fh: int, reader: FileReader) -> bool:
        """Say whether a table should be installed for a handle whose read came to this side."""
        installed = self._installed.get(fh)
        if installed is not None:
            return installed.block_count != len(reader.keys)
        refused_ns = self._refused_ns.get(fh)
        return refused_ns is None or self._clock.monotonic_ns() - refused_ns >= RETRY_NS

    def refuse(self, fh: int) -> None:
        """Note that there is no better lane for a handle now."""
        self._refused_ns[fh] = self._clock.monotonic_ns()

    def close(self, fh: int) -> None:
        """Take the lane from a handle; nothing if it has none."""
        with self._lock:
            installed = self._installed.pop(fh, None)
            self._refused_ns.pop(fh, None)
        if installed is not None:
            self._take_down(fh, installed)

    def sweep(self) -> None:
        """Take back tables that are old, and segments that no table uses any more."""
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            stuck, self._stuck = self._stuck, []
        for fh, installed in stuck:
            self._take_down(fh, installed)
        self._revoke(now_ns - TABLE_NS)
        self._drop_segments(now_ns - LINGER_NS)
        self.views.sweep(now_ns - VIEW_LINGER_NS)

    def reclaim(self) -> None:
        """Hold no segment for the core any more: a device needs room."""
        self._revoke(_EVER_NS)
        self._drop_segments(_EVER_NS)
        self.views.sweep(_EVER_NS)

    def stop(self) -> None:
        """Give back all that is held. The core has ended, or is to be asked no more."""
        self._store.state.on_pressure = None
        self._client.note_end()
        with self._lock:
            handles = list(self._installed)
            stuck, self._stuck = self._stuck, []
        for fh in handles:
            self.close(fh)
        for _, installed in stuck:
            self._let_go(installed)
        self._drop_segments(_EVER_NS)
        self.views.sweep(_EVER_NS)

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

    def _pass_through(self, fh: int, inode: int, plan: Plan) -> bool:
        view = plan.view
        source = plan.lease.parts[0].segment.handle.fd if view is None else view.fd
        try:
            # The descriptor of a file adopted by this process could be written through.
            fd = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._client.install_backing(fh, inode, fd)
            finally:
                os.close(fd)
        except (OSError, UnavailableError) as error:
            if self.has_passthrough:
                self.has_passthrough = False
                _log.info("passthrough is off from now on: %s", error)
            return False
        installed = _Installed(
            Lane.PASSTHROUGH, len(plan.reader.keys), 0, lease=plan.lease, view=view
        )
        return self._note(fh, installed, plan.reader)

    def _install_table(self, fh: int, inode: int, plan: Plan) -> bool:
        reader, lease = plan.reader, plan.lease
        installed = _Installed(Lane.NATIVE, len(reader.keys), self._clock.monotonic_ns())
        try:
            self.close(fh)  # the table of a context that has grown
            blocks = self._blocks(lease, self._hold(lease, installed))
            flags = VERIFY_READS if self._store.state.options.verify_reads else 0
            flags |= SHORT_READS if plan.is_direct else 0
            deadline_ms = self.deadlines_ms().get(reader.namespace_id, 0)
            self._client.install_read(
                fh, inode, reader.size_bytes, reader.stride, blocks, flags, deadline_ms
            )
        except (OSError, UnavailableError):
            if not reader.is_closed:
                self.refuse(fh)
            self._take_down(fh, installed)
            return False
        finally:
            self.release(plan)
        return self._note(fh, installed, reader)

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

    def _hold(self, lease: Lease, installed: _Installed) -> npt.NDArray[np.uint32]:
        """Give the core the segments of a lease; return the ref of each record."""
        refs = np.zeros(len(lease.records), np.uint32)
        for part in lease.parts:
            with self._lock:
                known = self._segment(part.segment)
                known.users += 1
                installed.places.append(_place_of(part.segment))
            refs[part.positions] = known.ref
        return refs

    def _segment(self, segment: SegmentState) -> _Segment:
        """Return what the core knows a segment by. REQUIRES: `_lock`."""
        place = _place_of(segment)
        known = self._segments.get(place)
        if known is None:
            self._last_ref += 1
            self._client.add_segment(self._last_ref, segment.handle.nbytes, segment.handle.fd)
            known = _Segment(self._last_ref, self._store.hold(segment))
            self._segments[place] = known
        return known

    def _blocks(self, lease: Lease, refs: npt.NDArray[np.uint32]) -> npt.NDArray[np.void]:
        records = lease.records
        blocks = np.zeros(len(records), BLOCK)
        blocks["ref"] = refs
        blocks["offset"] = records["page"].astype(np.uint64) * np.uint64(PAGE)
        blocks["stored"] = records["length"]
        verified = is_verified(records)
        if not self._store.state.options.verify_reads:
            verified = np.ones(len(records), np.bool_)
        blocks["flags"] = np.where(verified, BLOCK_VERIFIED, 0)
        for part in lease.parts:
            entries = records["entry"][part.positions]
            blocks["digest"][part.positions] = part.segment.digests(entries)
        return blocks

    def _note(self, fh: int, installed: _Installed, reader: FileReader) -> bool:
        """Remember what was installed, unless the handle was closed meanwhile."""
        with self._lock:
            before = self._installed.pop(fh, None)
            if not reader.is_closed:
                self._installed[fh] = installed
        if before is not None:
            self._let_go(before)
        if reader.is_closed:
            self._take_down(fh, installed)
        return not reader.is_closed

    def _take_down(self, fh: int, installed: _Installed) -> None:
        """Take what was installed from the core; what it may still read stays held."""
        try:
            self._client.close_lane(fh)
        except (OSError, UnavailableError) as error:
            if not self._client.has_ended:
                _log.warning("kvfs-core keeps what it reads: handle %d: %s", fh, error)
                with self._lock:
                    self._stuck.append((fh, installed))
                return
        self._let_go(installed)

    def _let_go(self, installed: _Installed) -> None:
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            for place in installed.places:
                known = self._segments[place]
                known.users -= 1
                known.idle_ns = now_ns
        if installed.lease is not None:
            self._store.release(installed.lease)
        if installed.view is not None:
            self.views.release(installed.view)

    def _revoke(self, before_ns: int) -> None:
        with self._lock:
            old = {
                fh: installed
                for fh, installed in self._installed.items()
                if installed.lane is Lane.NATIVE and installed.since_ns <= before_ns
            }
            for fh in old:
                del self._installed[fh]
        for fh, installed in old.items():
            self._take_down(fh, installed)

    def _drop_segments(self, before_ns: int) -> None:
        """Take segments back that no table has used since."""
        with self._lock:
            unused = [
                place
                for place, known in self._segments.items()
                if not known.users and known.idle_ns <= before_ns
            ]
            dropped = [self._segments.pop(place) for place in unused]
            for known in dropped:
                with contextlib.suppress(OSError, UnavailableError):
                    self._client.drop_segment(known.ref)
        for known in dropped:
            self._store.release(known.lease)


def _place_of(segment: SegmentState) -> Place:
    handle = segment.handle
    return handle.device_index, handle.slot, handle.generation


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
