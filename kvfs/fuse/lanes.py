"""Lanes: who answers the reads of an open file.

Layer: L5.

    passthrough  the kernel, from the file that holds exactly this content
    native       kvfs-core, from segments it has mapped
    namespace    the request handlers, as everything else

- What a lane needs is found in `lane_plans`; here it is installed and taken back.
- Native: a table of where each block lies, its fastest copy. The segments it names are held for as
  long as the core may read them (`core_segments`), and for LINGER_NS longer.
- Who must not wait installs and closes a table `at_once`: the core is told, and its answer is taken
  note of later. Until it has come, the table counts as what it may be at worst: not there for a
  read that comes here, still there for the segments it names.
- Held segments cannot be evicted. So tables are taken back after TABLE_NS, and all of them at once
  when a device finds nothing else to free (`reclaim`). The next read is answered by the handler,
  and installs the table again.
- A lane can be refused at any time, by either side; the namespace lane is always right.

Locks: `_lock` guards the tables; taken after the evictor's round lock and before the engine's,
`at_once` after that but without waiting. No message whose answer may wait for reads is waited for
under it.
"""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from kvfs.clock import Clock
from kvfs.devices.descriptors import read_only
from kvfs.engine.reader import Lease
from kvfs.engine.segment_table import is_verified
from kvfs.engine.store import Store
from kvfs.errors import UnavailableError
from kvfs.file_reading import FileReader
from kvfs.fuse.core_client import CoreClient
from kvfs.fuse.core_messages import BLOCK, BLOCK_VERIFIED, SHORT_READS, VERIFY_READS
from kvfs.fuse.core_segments import CoreSegments, Place
from kvfs.fuse.lane_plans import Lane, LanePlans, Plan
from kvfs.fuse.reflink_views import LINGER_NS as VIEW_LINGER_NS
from kvfs.fuse.reflink_views import View
from kvfs.units import PAGE

TABLE_NS: Final = 10_000_000_000
LINGER_NS: Final = 1_000_000_000
RETRY_NS: Final = 1_000_000_000
_EVER_NS: Final = 1 << 63
AT_ONCE_BLOCKS: Final = 1 << 10  # a packet's worth
_log = logging.getLogger("kvfs.fuse")


@dataclass(slots=True, eq=False)
class _Installed:
    """What is installed for one handle."""

    lane: Lane
    block_count: int
    since_ns: int
    places: list[Place] = field(default_factory=list)
    lease: Lease | None = None
    view: View | None = None


class Lanes(LanePlans):
    """The lanes of a mount's open files. Thread-safe, synchronous; may wait for the core."""

    def __init__(
        self, store: Store, client: CoreClient, clock: Clock, *, has_passthrough: bool,
        deadlines_ms: Callable[[], dict[int, int]] = dict,
    ) -> None:  # fmt: skip
        """Serve a pool's files through a core. `deadlines_ms`: of namespaces with their own."""
        super().__init__(store, clock, has_passthrough=has_passthrough)
        self.deadlines_ms = deadlines_ms
        self._client = client
        self._lock = threading.RLock()
        self._installed: dict[int, _Installed] = {}
        self._segments = CoreSegments(store, client)
        self._closing: dict[int, _Installed] = {}  # by handle: its CLOSE is not answered yet
        self._answers: deque[tuple[int, _Installed, bool, int]] = deque()  # not taken note of yet
        self._refused_ns: dict[int, int] = {}  # when a handle's table was last refused
        self._stuck: list[tuple[int, _Installed]] = []
        store.state.on_pressure = self.reclaim

    def install(self, fh: int, inode: int, plan: Plan) -> Lane:
        """Install a plan for a handle, and consume it; return the lane that it got.

        The answer to an open for passthrough must come after. Handles of one inode share the file
        of the first, so their content must be equal. Where the kernel does not take a file, the
        core reads it.
        """
        if plan.lane is Lane.PASSTHROUGH and self._pass_through(fh, inode, plan):
            return Lane.PASSTHROUGH
        return Lane.NATIVE if self._install_table(fh, inode, plan) else Lane.NAMESPACE

    def install_at_once(self, fh: int, inode: int, plan: Plan) -> bool:
        """Install a plan as `install` does, and consume it, if nothing need be waited for.

        The core may refuse it later: then the reads come to this side, as before.
        """
        if plan.lane is not Lane.NATIVE or len(plan.reader.keys) > AT_ONCE_BLOCKS:
            return False
        with self._store.hold_at_once() as is_free:
            if not is_free or not self._lock.acquire(blocking=False):
                return False
            try:
                if not self._posted(fh, inode, plan):
                    return False
            finally:
                self._lock.release()
            self.release(plan)
            return True

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

    def close_at_once(self, fh: int) -> bool:
        """Take the lane from a handle as `close` does, if nothing need be waited for."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._note_answers()
            installed = self._installed.get(fh)
            if installed is not None:
                if installed.lane is not Lane.NATIVE or not self._client.close_lane_at_once(
                    fh, partial(self._answered, fh, installed, True)
                ):
                    return False
                self._closing[fh] = self._installed.pop(fh)
            self._refused_ns.pop(fh, None)
            return True
        finally:
            self._lock.release()

    def sweep(self) -> None:
        """Take back tables that are old, and segments that no table uses any more."""
        now_ns = self._clock.monotonic_ns()
        self._client.read_answers()
        with self._lock:
            self._note_answers()
            stuck, self._stuck = self._stuck, []
        for fh, installed in stuck:  # perhaps many, of a device that stalls: nobody waits for them
            self._take_down(fh, installed, close=self._client.close_lane_briefly)
        self._revoke(now_ns - TABLE_NS)
        self._drop_segments(now_ns - LINGER_NS)
        self.views.sweep(now_ns - VIEW_LINGER_NS)

    def reclaim(self) -> None:
        """Hold no segment for the core any more: a device needs room."""
        self._revoke(_EVER_NS)
        if self._closing:
            with contextlib.suppress(OSError, UnavailableError):
                self._client.status()  # answered when all before it is
        self._drop_segments(_EVER_NS)
        self.views.sweep(_EVER_NS)

    def stop(self) -> None:
        """Give back all that is held. The core has ended, or is to be asked no more."""
        self._store.state.on_pressure = None
        self._client.note_end()
        with self._lock:
            handles = list(self._installed)
            stuck, self._stuck = self._stuck, []
            stuck += self._closing.items()
            self._closing.clear()
            self._answers.clear()
        for fh in handles:
            self.close(fh)
        for _, installed in stuck:
            self._let_go(installed)
        self._drop_segments(_EVER_NS)
        self.views.sweep(_EVER_NS)

    def leave(self) -> None:
        """Forget all without giving it back: the core reads on, so it is held until the end."""
        self._store.state.on_pressure = None
        self._client.note_end()
        with self._lock:
            for known in (self._installed, self._stuck, self._closing, self._answers):
                known.clear()

    # --- internals

    def _pass_through(self, fh: int, inode: int, plan: Plan) -> bool:
        view = plan.view
        source = plan.lease.parts[0].segment.handle.fd if view is None else view.fd
        try:
            # The descriptor of a file adopted by this process could be written through.
            fd = read_only(source)
            try:
                self._client.install_backing(fh, inode, fd)
            finally:
                os.close(fd)
        except (OSError, UnavailableError) as error:
            if self.has_passthrough:
                self.has_passthrough = False
                _log.info("passthrough is off from now on: %s", error)
            return False
        if view is None:  # the kernel may read it on when mount and lease have ended
            plan.lease.parts[0].segment.handle.keeps_bytes = True
        installed = _Installed(
            Lane.PASSTHROUGH, len(plan.reader.keys), 0, lease=plan.lease, view=view
        )
        return self._note(fh, installed, plan.reader)

    def _install_table(self, fh: int, inode: int, plan: Plan) -> bool:
        reader, lease = plan.reader, plan.lease
        installed = _Installed(Lane.NATIVE, len(reader.keys), self._clock.monotonic_ns())
        try:
            self.close(fh)  # the table of a context that has grown
            with self._lock:
                refs = self._segments.use(lease, installed.places)
            self._client.install_read(fh, inode, *self._table(plan, refs))
        except (OSError, UnavailableError):
            if not reader.is_closed:
                self.refuse(fh)
            self._take_down(fh, installed)
            return False
        finally:
            self.release(plan)
        return self._note(fh, installed, reader)

    def _posted(self, fh: int, inode: int, plan: Plan) -> bool:
        """Send a table without waiting; False: nothing was sent. REQUIRES: the lock."""
        reader, lease = plan.reader, plan.lease
        self._note_answers()
        if reader.is_closed or fh in self._installed or not self._segments.has(lease):
            return False
        installed = _Installed(Lane.NATIVE, len(reader.keys), self._clock.monotonic_ns())
        table = self._table(plan, self._segments.use(lease, installed.places))
        on_answer = partial(self._answered, fh, installed, False)
        if not self._client.install_read_at_once(fh, inode, *table, on_answer):
            self._let_go(installed)
            return False
        self._installed[fh] = installed
        return True

    def _table(
        self, plan: Plan, refs: npt.NDArray[np.uint32]
    ) -> tuple[int, int, npt.NDArray[np.void], int, int]:
        """Return the table of a plan: size, stride, blocks, flags and deadline, as the core has it.

        `refs`: what the core knows the segment of each block by.
        """
        reader = plan.reader
        flags = VERIFY_READS if self._store.state.options.verify_reads else 0
        flags |= SHORT_READS if plan.is_direct else 0
        deadline_ms = self.deadlines_ms().get(reader.namespace_id, 0)
        blocks = self._blocks(plan.lease, refs)
        return reader.size_bytes, reader.stride, blocks, flags, deadline_ms

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
            is_open = not reader.is_closed  # one who closes it from here on takes the lane, too
            if is_open:
                self._installed[fh] = installed
        if before is not None:
            self._let_go(before)
        if not is_open:
            self._take_down(fh, installed)
        return is_open

    def _take_down(
        self, fh: int, installed: _Installed, close: Callable[[int], None] | None = None
    ) -> None:
        """Take what was installed from the core; what it may still read stays held."""
        try:
            (close or self._client.close_lane)(fh)
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
            self._segments.let_go(installed.places, now_ns)
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
        with self._lock:
            self._note_answers()
            self._segments.drop(before_ns)

    def _answered(self, fh: int, installed: _Installed, is_close: bool, result: int) -> None:
        """Keep an answer until it can be taken note of: the client is locked."""
        self._answers.append((fh, installed, is_close, result))

    def _note_answers(self) -> None:
        """Take note of what was installed and closed without waiting. REQUIRES: the lock."""
        while self._answers:
            fh, installed, is_close, result = self._answers.popleft()
            if is_close:
                self._closing.pop(fh, None)
                if result < 0:
                    self._stuck.append((fh, installed))
                else:
                    self._let_go(installed)
            elif result < 0 and self._installed.get(fh) is installed:
                del self._installed[fh]
                self.refuse(fh)
                self._stuck.append((fh, installed))
