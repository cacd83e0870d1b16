"""Applying the plan of a check.

Layer: L3.

- Names first, durably, then bytes: a crash half-way leaves blocks that no name reaches, never a
  name without its blocks.
- Within a segment the seal is forgotten and persisted before an entry is zeroed, so that a crash
  leaves an unsealed segment, whose payloads are verified before they are served.
"""

from collections.abc import Sequence
from typing import Final

from kvfs.devices.base import Device, Segment, SegmentName
from kvfs.devices.open import location_of
from kvfs.engine import format as fmt
from kvfs.engine.catalog import Catalog
from kvfs.engine.checker.report import Action, ActionKind, CheckReport
from kvfs.engine.format import ENTRY_BYTES, HEADER_BYTES, NamespaceRecord, Superblock
from kvfs.errors import CorruptionError

_GENERATIONS_SKIPPED: Final = 1 << 20  # generations that may have been used and left no trace
_ORDER: Final = (
    ActionKind.REMOVE_NAMES, ActionKind.REBUILD_SUPERBLOCK, ActionKind.FREE_SEGMENT,
    ActionKind.FORGET_SEAL, ActionKind.DROP_BLOCKS, ActionKind.REAP_STAGING, ActionKind.FREE_RAW,
)  # fmt: skip
_PLACELESS: Final = (ActionKind.REAP_STAGING, ActionKind.FREE_RAW)


def apply_plan(report: CheckReport, devices: Sequence[Device], catalog: Catalog) -> None:
    """Do what the plan says, then check again and set `report.remaining`. Durability: persist.

    Raises:
        OSError: A device failed; what was done so far stays done, and repeating is safe.
        DeviceError: The catalog could not be written.
    """
    from kvfs.engine.checker.devices import check_devices

    by_index = {device.info.index: device for device in devices}
    freed: set[tuple[int, int, int]] = set()
    for kind in _ORDER:
        for action in [action for action in report.plan if action.kind is kind]:
            place = (action.device_index, action.slot, action.generation)
            if action.kind is ActionKind.REMOVE_NAMES:
                catalog.remove_nodes(list(action.node_ids))
            elif kind not in _PLACELESS and place in freed:
                continue
            else:
                _apply(by_index[action.device_index], catalog, action)
                if kind in (ActionKind.FREE_SEGMENT, ActionKind.REBUILD_SUPERBLOCK):
                    freed.add(place)
        if kind is ActionKind.REMOVE_NAMES:
            catalog.sync()
    for device in devices:
        device.persist_names()
    report.is_repaired = True
    report.remaining = check_devices(devices, catalog).findings


def _apply(device: Device, catalog: Catalog, action: Action) -> None:
    if action.kind is ActionKind.REBUILD_SUPERBLOCK:
        _rebuild_superblock(device, catalog)
        return
    if action.kind is ActionKind.REAP_STAGING:
        device.reap_staging()
        return
    if action.kind is ActionKind.FREE_RAW:
        for number in action.node_ids:
            device.drop_staging(device.open_raw(number))
        return
    name = _find(device, action)
    if name is None:
        return
    handle = device.attach(name)
    try:
        if action.kind is ActionKind.FREE_SEGMENT:
            device.free(handle)
            return
        _forget_seal(device, handle)
        for index in action.entries:
            device.write_tail(handle, fmt.entry_position(index), bytes(ENTRY_BYTES))
        device.persist(handle)
    finally:
        device.release(handle)


def _find(device: Device, action: Action) -> SegmentName | None:
    for name in device.segments():
        if (name.slot, name.generation) == (action.slot, action.generation):
            return name
    return None


def _forget_seal(device: Device, handle: Segment) -> None:
    """Zero the seal header, if there is something in its place. Durability: persist."""
    tail = device.read_tail(handle, fmt.HEADERS_BYTES)
    if any(tail[:HEADER_BYTES]):
        device.write_tail(handle, fmt.SEAL_POSITION, bytes(HEADER_BYTES))
        device.persist(handle)


def _rebuild_superblock(device: Device, catalog: Catalog) -> None:
    """Write a superblock from what catalog and segments say. Durability: persist.

    Generations are what cannot be known: the limit jumps far beyond the highest one seen, because a
    number used
    twice could make an entry of a former life valid.
    """
    info = device.info
    known: Superblock | None = None
    raw = device.read_superblock()
    if raw is not None:
        try:
            known = fmt.decode_superblock(raw, info.name)
        except CorruptionError:
            known = None
    highest = max((name.generation for name in device.segments()), default=0)
    limit = max(known.generation_limit if known else 0, highest + _GENERATIONS_SKIPPED)
    rows = {row.index: row for row in catalog.devices()}
    made = Superblock(
        pool_uuid=catalog.pool_uuid,
        device_uuid=info.uuid,
        device_index=info.index,
        tier=rows[info.index].tier if info.index in rows else info.tier,
        segment_bytes=info.segment_bytes,
        capacity_bytes=info.capacity_bytes,
        sequence=known.sequence + 1 if known else 1,
        generation_limit=limit,
        owner_epoch=known.owner_epoch + 1 if known else 1,
        location=location_of(device),
        namespaces=tuple(
            NamespaceRecord(space.namespace_id, space.name, space.layout.to_json())
            for space in catalog.namespaces()
        ),
    )
    device.write_superblock(fmt.encode_superblock(made))
