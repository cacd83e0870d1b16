"""A pool and its devices in figures.

Layer: L0.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """One device in figures. Sizes in bytes; errors, bytes and energy counted since open.

    `bytes_stored`: of `bytes_written` those that were asked for, not moved to make room.
    `energy_joules`: what the bytes moved would have taken, of an emulated device.
    """

    index: int
    name: str
    kind: str
    tier: int
    url: str
    is_persistent: bool
    state: str
    capacity_bytes: int
    used_bytes: int
    live_bytes: int
    segment_bytes: int
    segment_count: int
    block_count: int
    bytes_written: int
    failures: int
    persistence: str
    filesystem: str
    cache: str
    io: str
    bad_bytes: int
    bad_ranges: tuple[tuple[int, int], ...] = ()
    bytes_stored: int = 0
    energy_joules: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A pool in figures. Sizes in bytes; counters since open."""

    name: str
    uuid: str
    path: str
    state: str
    devices: tuple[DeviceStatistics, ...]
    namespaces: int
    contexts: int
    capacity_bytes: int
    used_bytes: int
    live_bytes: int
    counters: dict[str, int]
