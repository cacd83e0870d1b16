"""Changing the devices of an open pool: add, offline, online, evacuate, remove.

Layer: L4.

- A device is formatted before the catalog names it, and the catalog forgets it before it is
  destroyed: a crash in between leaves a device that no pool has, never a pool with a device that is
  not there.
- What is out of service is read as before. That state is kept until it is changed.

Concurrency: any thread; of two that do the same, one fails.
"""

import contextlib
import logging
from dataclasses import dataclass

from kvfs.config import parse_device_url
from kvfs.engine.catalog_schema import OFFLINE, ONLINE, DeviceRow
from kvfs.engine.device_state import DeviceState
from kvfs.engine.evacuation import Evacuated
from kvfs.errors import BusyError, KvfsError, NotFoundError, RefusedError, UsageError
from kvfs.lifecycle import format_row, plan_devices, require_unused
from kvfs.pool import Pool
from kvfs.units import format_bytes

_DEVICES_MAX = 256
_log = logging.getLogger("kvfs.pool")


@dataclass(frozen=True, slots=True)
class Removal:
    """What lies on a device that is to go. `lost_blocks`: without a copy elsewhere."""

    live_bytes: int
    block_count: int
    lost_blocks: int


def find_device(pool: Pool, name: str) -> DeviceState:
    """Return a device of the pool.

    Raises:
        NotFoundError: It has none of this name.
    """
    devices = pool.store.state.devices
    for device in devices:
        if device.info.name == name:
            return device
    known = ", ".join(sorted(device.info.name for device in devices))
    raise NotFoundError(f"no such device: {name!r}: expected one of {known}")


def add_device(pool: Pool, text: str, *, is_dry: bool = False) -> DeviceRow:
    """Format a device and take it into service. Durability: persist.

    Memory that is added is handed to a next owner only once the pool was opened with it.

    Args:
        pool: Where.
        text: The device's URL.
        is_dry: Plan and refuse only.

    Returns:
        The device as the catalog has it.

    Raises:
        UsageError: The URL is wrong, the name taken, or its segments are too small for the blocks
            of a namespace.
        ExistsError: It belongs to a pool.
    """
    catalog = pool.catalog
    index = catalog.next_device_index()
    if index >= _DEVICES_MAX:
        raise UsageError(f"no number is left: a pool has at most {_DEVICES_MAX} devices, ever")
    plan = plan_devices([parse_device_url(text)], catalog.devices(), index)
    ((row, url),) = plan
    require_unused(plan)
    stride = max((info.layout.stride for info in pool.namespaces()), default=0)
    if stride > url.segment_bytes // 2:
        raise UsageError(
            f"segments too small: {url}: blocks of {format_bytes(stride)} need segments of at "
            f"least {format_bytes(2 * stride)}, found {format_bytes(url.segment_bytes)}; give a "
            "larger segment"
        )
    if is_dry:
        return row
    state = format_row(row, url, pool.uuid, pool.clock)
    try:
        catalog.add_device(row)
        catalog.sync()
    except BaseException:
        for step in (state.device.destroy, state.device.close):
            with contextlib.suppress(OSError, KvfsError):
                step()
        raise
    pool.store.state.add_device(state)
    _log.info("device %s was added: %s", row.name, row.url)
    return row


def set_online(pool: Pool, name: str, *, is_online: bool) -> None:
    """Take a device into service or out of it. Durability: persist.

    Failures are counted from zero again when it comes into service.
    """
    device = find_device(pool, name)
    pool.catalog.set_device_state(device.info.index, ONLINE if is_online else OFFLINE)
    pool.catalog.sync()
    with pool.store.state.lock:
        device.is_offline = not is_online
        if is_online:
            device.failures = 0
    _log.info("device %s is %s", name, "online" if is_online else "offline")


def evacuate(pool: Pool, name: str, nbytes: int) -> Evacuated:
    """Take a device out of service and move some of what it holds. Durability: persist.

    Asked again until `left_segments` is 0. Raw files stay: what writes them has them open.

    Raises:
        RefusedError: No other device in service could take it.
        NoSpaceError: The others are full.
    """
    device = find_device(pool, name)
    if not device.is_offline:
        set_online(pool, name, is_online=False)
    with pool.store.state.activity.during():
        return pool.store.evacuation.step(device, nbytes)


def would_remove(pool: Pool, name: str) -> Removal:
    """Return what removing a device would lose."""
    device = find_device(pool, name)
    with pool.store.state.lock:
        segments = list(device.segments.values())
        return Removal(
            live_bytes=sum(segment.live_bytes for segment in segments),
            block_count=sum(segment.live_count for segment in segments),
            lost_blocks=pool.store.evacuation.would_lose(device),
        )


def remove(pool: Pool, name: str, *, allow_data_loss: bool = False) -> Removal:
    """Take a device out of the pool and delete what kvfs made there. Durability: persist.

    Args:
        pool: From where.
        name: Which.
        allow_data_loss: Blocks that lie there alone are dropped, and the names of files with them.

    Raises:
        RefusedError: Blocks would be lost, it holds raw files, or it is the last one.
        BusyError: Something of it is being read, or a file is being written there.
    """
    device, store = find_device(pool, name), pool.store
    if len(store.state.devices) == 1:
        raise RefusedError(f"a pool needs a device: {name} is its last; use 'pool destroy'")
    was_offline, device.is_offline = device.is_offline, True  # what is counted stays all there is
    try:
        found = _require_removable(pool, device, allow_data_loss=allow_data_loss)
    except BaseException:
        device.is_offline = was_offline
        raise
    set_online(pool, name, is_online=False)
    with store.state.activity.during():
        store.evacuation.forget(device)
    pool.sync()
    if device.info.takes_files and not device.segments and device.device.used_bytes:
        raise BusyError(
            f"device is in use: {name}: files of {format_bytes(device.device.used_bytes)} are "
            "being written there; close them, and try again"
        )
    store.evacuation.detach(device)
    pool.catalog.remove_device(device.info.index)
    pool.catalog.sync()
    try:
        device.device.destroy()
    except OSError as error:
        _log.warning("device %s is out of the pool, but not cleaned: %s", name, error)
        device.device.close()
    _log.info("device %s was removed", name)
    return found


def _require_removable(pool: Pool, device: DeviceState, *, allow_data_loss: bool) -> Removal:
    name = device.info.name
    found = would_remove(pool, name)
    if found.lost_blocks and not allow_data_loss:
        raise RefusedError(
            f"device holds what no other has: {name}: {found.lost_blocks} blocks; run 'kvfs-admin "
            f"device evacuate {name}' first, or repeat with --allow-data-loss"
        )
    if raw := len(device.device.raw_files()):
        raise RefusedError(
            f"device holds raw files: {name}: {raw} of them; copy them to other names, which puts "
            "them elsewhere, and remove them"
        )
    return found
