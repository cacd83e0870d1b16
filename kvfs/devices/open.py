"""From a device URL to an open device.

Layer: L1. Called by whoever opens a pool; the only place of the device layer that changes a setting
of the process (the soft limit of descriptors, raised to the hard one).
"""

import contextlib
import os
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from kvfs.config import DeviceURL
from kvfs.devices.base import Device
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.dax_source import open_source, size_of
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.filesystem import SEGMENTS, SUPERBLOCK
from kvfs.devices.keeper import Keeper
from kvfs.devices.memory import MemoryDevice, Progress, available_bytes, require_available
from kvfs.devices.osfs import OSFileSystem, nearest_existing
from kvfs.errors import CorruptionError, UsageError
from kvfs.units import PAGE, format_bytes

_FREE_SHARE_PERCENT: Final = 80


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What a constructor is told. `create`: make a missing directory. `keeper`: of memory."""

    url: DeviceURL
    index: int
    uuid: UUID
    capacity_bytes: int
    segment_bytes: int
    name: str
    create: bool
    progress: Progress | None
    keeper: Keeper | None


def is_formatted(location: str) -> bool:
    """Say whether a directory holds a device's superblock, or segments that one could be made of.

    An empty mountpoint, whose filesystem is not mounted, holds neither; nothing is to be put there.
    """
    if os.path.exists(f"{location}/{SUPERBLOCK}"):
        return True
    with contextlib.suppress(OSError):
        return bool(os.listdir(f"{location}/{SEGMENTS}"))
    return False


def _open_directory(request: DeviceRequest) -> Device:
    location = request.url.location
    if not request.create and os.path.isdir(location) and not is_formatted(location):
        raise CorruptionError(
            f"no superblock: {request.name}: {location} was never formatted; "
            "mount the device's filesystem there"
        )
    files = OSFileSystem(request.url.location, create=request.create)
    try:
        return DirectoryDevice(
            files,
            index=request.index,
            uuid=request.uuid,
            capacity_bytes=request.capacity_bytes,
            segment_bytes=request.segment_bytes,
            name=request.name,
            tier=request.url.tier,
            url=str(request.url),
        )
    except BaseException:
        files.close()
        raise


def _open_memory(request: DeviceRequest) -> Device:
    return MemoryDevice(
        index=request.index,
        uuid=request.uuid,
        capacity_bytes=request.capacity_bytes,
        segment_bytes=request.segment_bytes,
        name=request.name,
        tier=request.url.tier,
        url=str(request.url),
        progress=request.progress,
        keeper=request.keeper,
    )


def _open_dax(request: DeviceRequest) -> Device:
    url = request.url
    return DaxDevice(
        open_source(url.location, persistence=url.options.get("persistence", "")),
        index=request.index,
        uuid=request.uuid,
        capacity_bytes=request.capacity_bytes,
        segment_bytes=request.segment_bytes,
        name=request.name,
        tier=url.tier,
        url=str(url),
    )


SCHEMES: Final[dict[str, Callable[[DeviceRequest], Device]]] = {
    "dram": _open_memory,
    "dax": _open_dax,
    "dir": _open_directory,
}


def open_device(
    url: DeviceURL,
    *,
    index: int,
    uuid: UUID,
    capacity_bytes: int,
    segment_bytes: int,
    name: str,
    create: bool = True,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
) -> Device:
    """Open a device; on return this process owns it until `close`.

    Args:
        url: Which.
        index: Its number in the pool.
        uuid: Its identity.
        capacity_bytes: Hard bound of what it may hold, see `capacity_of`.
        segment_bytes: Size of a log segment.
        name: Name for messages.
        create: Make the directory if it is missing. A pool that was formatted before passes False,
            so that a filesystem that is not mounted is noticed.
        progress: Called with (done, total) while memory is populated.
        keeper: Holds the memory of a device made of it; see MemoryDevice.

    Raises:
        UsageError: No room for one segment.
        NotFoundError: The directory is missing.
        CorruptionError: Not to be created, and never formatted.
        RefusedError: The directory lies on a network or FUSE filesystem.
        BusyError: Another process has the directory open.
        NoSpaceError: There is not that much memory.
    """
    if capacity_bytes < segment_bytes:
        raise UsageError(
            f"device too small: {url}: expected at least one segment of "
            f"{format_bytes(segment_bytes)}, found {format_bytes(capacity_bytes)}; "
            "give a larger size or a smaller segment"
        )
    raise_descriptor_limit()
    return SCHEMES[url.scheme](
        DeviceRequest(
            url=url,
            index=index,
            uuid=uuid,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            name=name,
            create=create,
            progress=progress,
            keeper=keeper,
        )
    )


def capacity_of(url: DeviceURL) -> int:
    """Return the size a new device gets: as given, else what a DAX or directory device has.

    All of a DAX device behind its header, 80 % of a directory's free space.
    """
    if url.size_bytes:
        return url.size_bytes
    if url.scheme == "dax":
        return max(0, size_of(url.location) - HEADER_BYTES)
    if url.scheme != "dir":
        raise UsageError(f"device size missing: {url}: expected an option such as size=4GiB")
    free = free_bytes(url)
    assert free is not None
    return free * _FREE_SHARE_PERCENT // 100 // PAGE * PAGE


def free_bytes(url: DeviceURL) -> int | None:
    """Return what the filesystem of a directory has left; None for other kinds."""
    if url.scheme != "dir":
        return None
    found = os.statvfs(nearest_existing(url.location))
    return found.f_bavail * found.f_frsize


def require_memory(devices: Iterable[tuple[str, DeviceURL]]) -> None:
    """Refuse devices, by their names, that want more memory in all than there is; takes none.

    Raises:
        NoSpaceError: The message says how much there is.
    """
    available: int | None = None
    for name, url in devices:
        if url.scheme == "dram":
            available = available_bytes() if available is None else available
            require_available(name, url.size_bytes, available)
            available -= url.size_bytes


def location_of(device: Device) -> int:
    """Return what tells a device from a copy of it; 0 if nothing does."""
    return device.location()


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard one; every open segment holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
