"""One device as its owner sees it: superblock, segments, open logs.

Layer: L3.

- The engine's lock guards `segments`, `logs`, `full`, `claimed`; `open_lock`, taken before it,
  guards the superblock and lets one thread at a time open a segment, so that the engine's lock is
  never held over a persist.
- A generation is used only below `superblock.generation_limit`, which is persisted first; the next
  owner starts at the limit. So no (slot, generation) is used twice, whatever crashes. The limit is
  raised when half a range is used (`register`), so that `claim` never waits for the medium.
"""

import dataclasses
import errno
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from statistics import median_low
from typing import Final

from kvfs.clock import Clock
from kvfs.devices.base import Device, DeviceInfo
from kvfs.engine import format as fmt
from kvfs.engine.format import NamespaceRecord, Superblock
from kvfs.engine.log import SegmentLog
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.errors import ClosedError, NoSpaceError, UnavailableError

_log = logging.getLogger("kvfs.engine")
GENERATIONS_RESERVED: Final = 4096
_RESERVE_SEGMENTS_FROM: Final = 4  # devices with fewer segments keep none back for relocation


@dataclasses.dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """What the store needs to know of a namespace.

    Sizes in bytes; `digest` is the layout fingerprint.
    """

    namespace_id: int
    name: str
    layout_json: str
    digest: bytes
    block_bytes: int
    stride: int
    is_durable: bool = False


class DeviceState:
    """A device with its tables. Methods need the engine's lock unless they say otherwise."""

    def __init__(self, device: Device, superblock: Superblock, clock: Clock) -> None:
        self.device = device
        self.superblock = superblock
        self.segments: dict[int, SegmentState] = {}
        self.logs: dict[int, SegmentLog] = {}  # by namespace: takes appends
        self.full: list[SegmentLog] = []  # to be sealed
        self.claimed: set[int] = set()
        self.open_lock = threading.Lock()
        self.failures = 0
        self.failures_max: int | None = None  # the pool's; so many, and the device leaves service
        self.is_offline = False
        self.is_held: Callable[[SegmentState], bool] = lambda _: False  # by a client; the pool's
        self.note_freed: Callable[[SegmentState], None] = lambda _: None  # tells clients
        self._clock = clock
        self._next_generation = superblock.generation_limit
        self._next_slot = 0

    @property
    def info(self) -> DeviceInfo:
        """What the device is."""
        return self.device.info

    def update_superblock(self, **changes: object) -> None:
        """Write the superblock with some fields changed. Durability: persist."""
        updated = dataclasses.replace(
            self.superblock,
            sequence=self.superblock.sequence + 1,
            heartbeat_ns=self._clock.wall_ns(),
            **changes,  # type: ignore[arg-type]
        )
        self.device.write_superblock(fmt.encode_superblock(updated))
        self.superblock = updated

    def register(self, namespace: NamespaceSpec) -> None:
        """Get the superblock ready for a segment: the namespace's layout, generations in reserve.

        REQUIRES: `open_lock` only. Called for every segment, so that some are always left.
        """
        record = NamespaceRecord(namespace.namespace_id, namespace.name, namespace.layout_json)
        others = tuple(
            known
            for known in self.superblock.namespaces
            if known.namespace_id != namespace.namespace_id
        )
        changes: dict[str, object] = {}
        if len(others) == len(self.superblock.namespaces) or record not in (
            self.superblock.namespaces
        ):
            changes["namespaces"] = (*others, record)
        limit = self.superblock.generation_limit
        if limit - self._next_generation <= GENERATIONS_RESERVED // 2:
            changes["generation_limit"] = limit + GENERATIONS_RESERVED
        if changes:
            self.update_superblock(**changes)

    def unregister(self, namespace_id: int) -> None:
        """Take a destroyed namespace out of the superblock. REQUIRES: `open_lock`."""
        left = tuple(n for n in self.superblock.namespaces if n.namespace_id != namespace_id)
        if left != self.superblock.namespaces:
            self.update_superblock(namespaces=left)

    def claim(self) -> tuple[int, int]:
        """Return a free slot, reserved, and a generation this device never used. No I/O.

        REQUIRES: both locks; each claim goes with a `register`, before it or after.

        Raises:
            NoSpaceError: All slots are taken.
            OSError: No generation is left: the superblock could not be written for long.
        """
        if self._next_generation >= self.superblock.generation_limit:
            raise OSError(errno.EIO, f"no generation in reserve: {self.info.name}")
        for step in range(self.info.slot_count):
            slot = (self._next_slot + step) % self.info.slot_count
            if slot not in self.segments and slot not in self.claimed:
                self._next_slot = slot + 1
                self._next_generation += 1
                self.claimed.add(slot)
                return slot, self._next_generation - 1
        raise NoSpaceError(f"no free segment: {self.info.name}: all {self.info.slot_count} in use")

    def has_room_for_segment(self, *, keep_reserve: bool) -> bool:
        """Say whether a log segment fits; with `keep_reserve`, leaving one for relocation."""
        segments = 2 if keep_reserve and self.has_reserve else 1
        free = self.info.capacity_bytes - self.device.used_bytes
        return free >= segments * self.info.segment_bytes

    def usual_use_ns(self) -> int:
        """Return before when half of the segments were last used; 0 for none. REQUIRES: `lock`.

        Says where to evict: a few segments that are pinned weigh little in it.
        """
        times = [segment.last_access_ns for segment in self.segments.values()]
        return median_low(times) if times else 0

    @property
    def has_reserve(self) -> bool:
        """Whether the device is large enough to keep a segment back for relocation."""
        return self.info.capacity_bytes // self.info.segment_bytes >= _RESERVE_SEGMENTS_FROM

    def open_segment(
        self, namespace: NamespaceSpec, pool_uuid: uuid.UUID, slot: int, generation: int
    ) -> SegmentLog:
        """Create a log segment on a claimed slot; persist its open header and name.

        REQUIRES: `open_lock` only.

        Raises:
            NoSpaceError: The device is full for real.
            DeviceError: A write failed; the segment is given back.
        """
        self.register(namespace)
        handle = self.device.create(slot, generation, namespace.namespace_id.to_bytes(8, "little"))
        state = SegmentState(
            handle, namespace.namespace_id, SegmentStatus.OPEN, self._clock.monotonic_ns()
        )
        header = self.header_for(namespace, pool_uuid, slot, generation, handle.nbytes)
        log = SegmentLog(self.device, state, header)
        try:
            log.start()
        except BaseException:
            self.device.free(handle)
            raise
        return log

    def header_for(
        self,
        namespace: NamespaceSpec,
        pool_uuid: uuid.UUID,
        slot: int,
        generation: int,
        nbytes: int,
        kind: fmt.SegmentKind = fmt.SegmentKind.LOG,
    ) -> fmt.SegmentHeader:
        """Build the open header of a segment of `nbytes` payload file or slot."""
        return fmt.SegmentHeader(
            kind=fmt.HeaderKind.OPEN,
            pool_uuid=pool_uuid,
            device_uuid=self.info.uuid,
            slot=slot,
            generation=generation,
            namespace_id=namespace.namespace_id,
            layout_digest=namespace.digest,
            segment_kind=kind,
            segment_bytes=nbytes,
            created_ns=self._clock.wall_ns(),
        )  # fmt: skip

    def state_of(self, slot: int, generation: int) -> SegmentState | None:
        """Return the segment if it still lives in this generation. Needs no lock."""
        state = self.segments.get(slot)
        return state if state is not None and state.handle.generation == generation else None

    def discard(self, state: SegmentState) -> bool:
        """Give a segment back whose blocks have left the index; waits for leases by DRAINING.

        What clients hold waits, too, until they do no more. False if the device cannot free it:
        it stays DRAINING, its space used, and eviction tries again before it takes anything else.
        """
        if self.segments.get(state.handle.slot) is not state:
            return True  # it is gone already
        state.status = SegmentStatus.DRAINING
        if state.leases == 0 and not self.is_held(state):
            try:
                self.device.free(state.handle)
            except ClosedError:
                return True  # a lease outlived the pool: the next owner frees it
            except OSError as error:
                self.note_failure()
                _log.warning("segment cannot be freed: %s: %s", self.info.name, error)
                return False
            del self.segments[state.handle.slot]
            self.note_freed(state)
        return True

    def clear_freed(self) -> None:
        """Give back the space of what was freed under clients' descriptors. Without any lock."""
        try:
            self.device.clear_freed()
        except ClosedError:
            return
        except OSError as error:  # tried again with the next
            self.note_failure()
            _log.warning("freed segments keep their space: %s: %s", self.info.name, error)

    def waiting(self) -> list[SegmentState]:
        """Return the segments that could not be given back, though no lease is left here."""
        return [
            segment
            for segment in self.segments.values()
            if segment.status is SegmentStatus.DRAINING and not segment.leases
        ]

    def note_failure(self) -> None:
        """Count a failure; after too many the device takes no more writes."""
        self.failures += 1
        if self.failures_max is not None and self.failures >= self.failures_max:
            self.is_offline = True

    def unsynced_logs(self) -> Iterator[SegmentLog]:
        """Yield the logs with entries that no persist has covered."""
        for log in [*self.full, *self.logs.values()]:
            if log.state.persisted_count < log.state.entry_count:
                yield log

    def require_online(self) -> None:
        """Raise UnavailableError if the device left service."""
        if self.is_offline:
            raise UnavailableError(f"device is out of service after failures: {self.info.name}")
