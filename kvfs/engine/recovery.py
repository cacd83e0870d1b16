"""Taking over a device: claim it, read all summaries, build the index.

Layer: L3.

- Reads superblock and summaries, never payloads: the cost follows the number of blocks, not their
  size.
- Whatever is found is persisted once, so that from then on "found" means "durable".
- A segment whose open header never made it to the medium, or only in part, held nothing that was
  acknowledged: it is freed. One with a damaged open header and something else in it is set aside:
  nothing in it is served, its space comes back by eviction, `check` reports it.
- Of two segments on one slot the older was freed before the slot was used again, and a crash took
  the change of its name: it is freed again.
- The last unsealed log segment of a namespace is resumed; its old payloads stay subject to
  verification.
- An unsealed segment that cannot be written again is kept for reading alone, each payload verified:
  nobody knows which of its entries the medium holds. Memory of an earlier owner always is one.
- Torn entries and a torn seal header are overwritten with zeros, so that `check` can tell what a
  crash left from damage.
- Recovery writes nothing that a crash during it could turn into harm: claims bump counters, frees
  and zeros repeat.
"""

import uuid
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvfs import _native
from kvfs.clock import Clock
from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.engine import format as fmt
from kvfs.engine.device_state import GENERATIONS_RESERVED, DeviceState
from kvfs.engine.format import Superblock
from kvfs.engine.log import (
    LoadedSegment,
    SegmentLog,
    is_unborn,
    load_segment,
    segment_where,
)
from kvfs.engine.segment_table import SegmentState, SegmentStatus
from kvfs.engine.state import EngineState
from kvfs.errors import CorruptionError, DeviceError, RefusedError
from kvfs.keys import file_contexts


@dataclass(frozen=True, slots=True)
class Owner:
    """Who takes the pool: ids of host and boot (16 bytes each) and the process."""

    host: bytes = bytes(16)
    boot: bytes = bytes(16)
    pid: int = 0


@dataclass(slots=True)
class RecoveryReport:
    """What recovery found. `problems` are sentences for the operator."""

    segments: int = 0
    unsealed: int = 0
    blocks: int = 0
    freed: int = 0
    files_dropped: int = 0
    problems: list[str] = field(default_factory=list)


def format_device(
    device: Device, pool_uuid: uuid.UUID, location: int, owner: Owner, clock: Clock
) -> DeviceState:
    """Write the first superblock of a device. Durability: persist."""
    info = device.info
    superblock = Superblock(
        pool_uuid=pool_uuid,
        device_uuid=info.uuid,
        device_index=info.index,
        tier=info.tier,
        segment_bytes=info.segment_bytes,
        capacity_bytes=info.capacity_bytes,
        location=location,
    )
    return _claimed(device, superblock, owner, clock)


def claim_device(
    device: Device,
    pool_uuid: uuid.UUID,
    location: int,
    owner: Owner,
    clock: Clock,
    *,
    allow_moved: bool = False,
) -> DeviceState:
    """Check that the device belongs to the pool and to nobody else, and take it over.

    Durability: persist.

    Raises:
        CorruptionError: No superblock, or a damaged one.
        RefusedError: Another pool's device, a copy of the device, or owned by another running host.
    """
    info = device.info
    raw = device.read_superblock()
    if raw is None:
        raise CorruptionError(f"no superblock: {info.name}: {info.url} was never formatted")
    superblock = fmt.decode_superblock(raw, f"{info.name} superblock")
    if superblock.pool_uuid != pool_uuid or superblock.device_uuid != info.uuid:
        raise RefusedError(
            f"device belongs to another pool: {info.name}: expected pool {str(pool_uuid)[:8]} "
            f"device {str(info.uuid)[:8]}, found pool {str(superblock.pool_uuid)[:8]} "
            f"device {str(superblock.device_uuid)[:8]}"
        )
    moved = superblock.location and location and superblock.location != location
    if moved and not allow_moved:
        raise RefusedError(
            f"device was copied or moved: {info.name}: {info.url}: two owners of copies would each "
            "believe to be the pool; repeat with --allow-moved if the original is gone"
        )
    foreign = superblock.owner_pid and superblock.owner_host != owner.host
    if foreign and not allow_moved:
        raise RefusedError(
            f"device was last owned by another host and not closed: {info.name}: "
            "make sure that host is down, then repeat with --allow-moved"
        )
    return _claimed(device, superblock, owner, clock, location=location)


def _claimed(
    device: Device, superblock: Superblock, owner: Owner, clock: Clock, **changes: int
) -> DeviceState:
    """Persist a new owner epoch and a fresh range of generations that starts at the old limit."""
    state = DeviceState(device, superblock, clock)
    state.update_superblock(
        generation_limit=superblock.generation_limit + GENERATIONS_RESERVED,
        owner_epoch=superblock.owner_epoch + 1,
        owner_host=owner.host,
        owner_boot=owner.boot,
        owner_pid=owner.pid,
        **changes,
    )
    return state


@dataclass(slots=True)
class _Found:
    device: DeviceState
    handle: Segment
    loaded: LoadedSegment


def load_devices(state: EngineState) -> RecoveryReport:
    """Read the segments of all devices into tables and indexes.

    REQUIRES: all namespaces are known.
    """
    report = RecoveryReport()
    found: list[_Found] = []
    for device in state.devices:
        device.device.reap_staging()
        names = device.device.segments()
        newest: dict[int, int] = {}
        for name in names:
            newest[name.slot] = max(name.generation, newest.get(name.slot, 0))
        for name in names:
            try:
                handle = device.device.attach(name)
                if name.generation < newest[name.slot]:
                    _free(device, handle, report)
                    continue
                loaded = _load(state, device, handle, report)
            except OSError as error:
                _shun(device, name, error, report)
                continue
            if loaded is not None:
                found.append(_Found(device, handle, loaded))
    totals: dict[int, int] = {}
    for item in found:
        namespace_id = item.loaded.header.namespace_id
        totals[namespace_id] = totals.get(namespace_id, 0) + len(item.loaded.entries)
    for namespace_id, total in totals.items():
        state.index(namespace_id).reserve(total)
    # Sealed segments last: where a block has two copies on a device, the vouched one wins.
    found.sort(key=lambda item: (item.loaded.is_sealed, item.loaded.header.generation))
    for item in found:
        _enter(state, item, report)
    for device in state.devices:
        device.device.persist_names()
    return report


def _shun(device: DeviceState, name: SegmentName, error: OSError, report: RecoveryReport) -> None:
    """Leave a segment alone that the device cannot read, and its slot."""
    device.claimed.add(name.slot)
    device.failures += 1
    report.problems.append(
        f"segment cannot be read: {segment_where(device.device, name)}: {error.strerror or error}; "
        "its blocks are misses, its space stays used; run 'kvfs-admin check --repair'"
    )


def _load(
    state: EngineState, device: DeviceState, handle: Segment, report: RecoveryReport
) -> LoadedSegment | None:
    """Read one segment; free or set aside what cannot be used."""
    where = segment_where(device.device, handle)
    try:
        loaded = load_segment(device.device, handle)
    except CorruptionError as error:
        if is_unborn(device.device, handle):
            _free(device, handle, report)
        else:
            report.problems.append(f"{error}; the segment is set aside, nothing in it is served")
            _set_aside(state, device, handle)
        return None
    header = loaded.header
    namespace = state.namespaces.get(header.namespace_id)
    if header.pool_uuid != state.pool_uuid or header.device_uuid != device.info.uuid:
        report.problems.append(f"segment of another pool or device: {where}: set aside")
        _set_aside(state, device, handle)
        return None
    if namespace is None:  # its namespace was destroyed, or its creation never committed
        _free(device, handle, report)
        return None
    if header.layout_digest != namespace.digest:
        report.problems.append(
            f"layout mismatch: {where}: expected {namespace.digest.hex()}, "
            f"found {header.layout_digest.hex()}; the segment is set aside"
        )
        _set_aside(state, device, handle)
        return None
    if not loaded.is_sealed and not len(loaded.entries):
        _free(device, handle, report)
        return None
    return loaded


def _free(device: DeviceState, handle: Segment, report: RecoveryReport) -> None:
    device.device.free(handle)
    report.freed += 1


def _set_aside(state: EngineState, device: DeviceState, handle: Segment) -> None:
    """Keep a segment's place without serving anything from it; it is first in line for eviction."""
    segment = SegmentState(handle, 0, SegmentStatus.SEALED, 0, needs_verify=True)
    segment.is_poisoned = True
    device.segments[handle.slot] = segment


def _enter(state: EngineState, item: _Found, report: RecoveryReport) -> None:
    """Put one segment into the tables and its blocks into the index."""
    device, handle, loaded = item.device, item.handle, item.loaded
    header = loaded.header
    age_ns = max(0, state.clock.wall_ns() - header.created_ns)
    segment = SegmentState(
        handle,
        header.namespace_id,
        SegmentStatus.SEALED,
        state.clock.monotonic_ns() - age_ns,
        needs_verify=not loaded.is_sealed,
    )
    segment.load(loaded.indices, loaded.entries, loaded.entry_count)
    device.segments[handle.slot] = segment
    report.segments += 1
    report.blocks += len(loaded.entries)
    if loaded.is_sealed:
        segment.persisted_count = loaded.entry_count
    elif handle.is_fixed:
        report.unsealed += 1
        segment.persisted_count = loaded.entry_count
    else:
        report.unsealed += 1
        _write_again(device, segment, loaded, report)
    last_access_ns = segment.last_access_ns
    if len(loaded.entries):
        indices = loaded.indices.astype(np.int64)
        if not loaded.is_sealed:
            indices = _preferable(state, device, segment, indices)
        state.publish(segment, indices, verified=False)
    segment.last_access_ns = last_access_ns
    segment.accessed_ns[:] = last_access_ns


def _preferable(
    state: EngineState, device: DeviceState, segment: SegmentState, indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Leave out entries whose block the device has already, unless their payload verifies.

    Eviction copies a block, persists the copy, then frees the original: a crash in between may
    leave the copy's entry without its payload, and then the original is the block.
    """
    keys = np.ascontiguousarray(segment.entries["key"][indices])
    known = state.index(segment.namespace_id).lookup(keys, device.info.index)["length"] > 0
    keep = ~known
    for position in np.flatnonzero(known).tolist():
        entry = segment.entries[indices[position]]
        start, nbytes = int(entry["offset"]), int(entry["stored_bytes"])
        try:
            raw = device.device.read(segment.handle, start, nbytes, uncached=True)
        except OSError:
            continue
        keep[position] = _native.xxh3_128(raw) == entry["payload_xxh3"].tobytes()
    return indices[keep]


def _write_again(
    device: DeviceState, segment: SegmentState, loaded: LoadedSegment, report: RecoveryReport
) -> None:
    """Persist what was found in an unsealed segment, and let the newest of a namespace go on."""
    try:
        for distance, page in loaded.residue:
            device.device.write_tail(segment.handle, distance, page)
        if segment.handle.is_file:
            device.device.persist(segment.handle)
        else:
            _resume(device, segment, loaded.header)
    except (OSError, DeviceError) as error:
        segment.is_poisoned = True
        device.note_failure()
        report.problems.append(
            f"segment cannot be written: {segment_where(device.device, segment.handle)}: "
            f"{error.__cause__ or error}; its blocks are verified before they are served"
        )
        return
    segment.persisted_count = loaded.entry_count


def _resume(device: DeviceState, segment: SegmentState, header: fmt.SegmentHeader) -> None:
    """Let the newest unsealed segment of a namespace take appends again."""
    log = SegmentLog(device.device, segment, header)
    log.rewrite_summary()
    older = device.logs.get(segment.namespace_id)
    if older is not None:
        older.state.status = SegmentStatus.SEALED  # generations ascend, so this one is newer
    segment.status = SegmentStatus.OPEN
    device.logs[segment.namespace_id] = log


def reap_unnamed_files(
    state: EngineState, versions: dict[int, int], report: RecoveryReport
) -> None:
    """Free file segments that no name reaches.

    `versions`: the version of each named file by context id.
    """
    for device in state.devices:
        for segment in list(device.segments.values()):
            if not segment.handle.is_file or not segment.entry_count:
                continue
            keys = np.ascontiguousarray(segment.entries["key"][: segment.entry_count])
            contexts = file_contexts(keys)
            version = int(keys.view("<u4")[0, 5])
            if len(contexts) == 1 and versions.get(contexts[0]) == version:
                continue
            with state.lock:
                state.forget(segment.namespace_id, segment.records(segment.live_indices()))
                device.discard(segment)
            report.freed += 1
