"""Device URLs and the options of a pool.

Layer: L0.

A device URL is `scheme:location?option=value&option=value`, e.g. `dram:?size=4GiB`,
`dir:/mnt/nvme/kv?size=500GiB&tier=2`, `dax:/dev/dax0.0`. Options known to every scheme: size,
segment, tier, name. `dax:` knows persistence.
"""

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

from kvfs.errors import UsageError
from kvfs.units import GIB, MIB, is_power_of_two, parse_bytes

SCHEMES: Final = ("dram", "dax", "dir")
VOLATILE_SCHEMES: Final = ("dram",)  # what lies there ends with the owner
DEFAULT_TIER: Final = {"dram": 0, "dax": 1, "dir": 2}
PERSISTENCE: Final = ("cpu_cache", "memory_controller", "page", "none")  # see DeviceInfo
_OPTIONS: Final = ("size", "segment", "tier", "name")
SEGMENT_BYTES_MIN: Final = 16 * MIB
SEGMENT_BYTES_MAX: Final = GIB
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}\Z")


@dataclass(frozen=True, slots=True)
class DeviceURL:
    """A parsed device URL. Sizes in bytes; zero means not given."""

    scheme: str
    location: str
    size_bytes: int = 0
    segment_bytes: int = 0
    tier: int = 0
    name: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = "&".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.scheme}:{self.location}" + (f"?{extra}" if extra else "")


def parse_device_url(text: str) -> DeviceURL:
    """Parse one device URL.

    Raises:
        UsageError: Unknown scheme or option, or a value out of range; the message lists what is
            known.
    """
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        raise UsageError(f"unknown device {text!r}: expected one of {known}")
    location, _, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(f"device options not understood: {text!r}: {error}") from error
    known_options = (*_OPTIONS, "persistence") if scheme == "dax" else _OPTIONS
    unknown = set(options) - set(known_options)
    if unknown:
        raise UsageError(
            f"unknown device option {min(unknown)!r} in {text!r}: "
            f"expected {', '.join(known_options[:-1])} or {known_options[-1]}"
        )
    if scheme != "dram" and (not location.startswith("/") or "\0" in location):
        raise UsageError(f"a {scheme}: device needs an absolute path: {text!r}")
    if options.get("persistence", "none") not in PERSISTENCE:
        raise UsageError(f"persistence must be one of {', '.join(PERSISTENCE)}: {text!r}")
    if scheme == "dram" and (location or "size" not in options):
        raise UsageError(f"a dram: device is written 'dram:?size=4GiB', found {text!r}")
    segment_bytes = parse_bytes(options.get("segment", "0"))
    if segment_bytes and not (
        is_power_of_two(segment_bytes) and SEGMENT_BYTES_MIN <= segment_bytes <= SEGMENT_BYTES_MAX
    ):
        raise UsageError("segment must be a power of two from 16MiB to 1GiB")
    tier_text = options.get("tier", str(DEFAULT_TIER[scheme]))
    if not tier_text.isdecimal() or int(tier_text) > 15:
        raise UsageError(f"tier must be a number from 0 to 15, found {tier_text!r}")
    name = options.get("name", "")
    if name and not _NAME.match(name):
        raise UsageError(f"device name {name!r}: use lower-case letters, digits, '.', '-', '_'")
    return DeviceURL(
        scheme=scheme,
        location=location,
        size_bytes=parse_bytes(options.get("size", "0")),
        segment_bytes=segment_bytes,
        tier=int(tier_text),
        name=name,
        options=options,
    )


def default_segment_bytes(capacity_bytes: int) -> int:
    """Return the power of two near capacity / 256, from 16 MiB to 1 GiB."""
    target = max(1, capacity_bytes // 256)
    nearest = 1 << (target.bit_length() - 1)
    if target - nearest > 2 * nearest - target:
        nearest *= 2
    return min(SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, nearest))


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How an open pool behaves; nothing here changes the medium.

    Attributes:
        async_delay_ms: Bound on how long an "async" block stays unpersisted.
        pinned_share: Largest share of the persistent tiers that open files may pin, per namespace.
        verify_reads: Verify a block's checksum on its first read or view per process and
            generation.
        copy_to_dram: Keep an extra copy of async and sync blocks on volatile tiers.
        device_failures_max: Write failures after which a device leaves service.
        staging_memory_bytes: Memory that small files may take while they are being written; beyond
            it they are written to their device at once, and once more when they are stored.
        client_timeout_s: How long a client process may give no sign of life before it loses what it
            holds, if that is needed.
        client_share: Largest share of a device that one client may hold while others need room.
        client_shared_bytes: How much memory the clients of one user may share with the owner, who
            maps it to store from there; each file counts once.
    """

    async_delay_ms: int = 50
    pinned_share: float = 0.5
    verify_reads: bool = True
    copy_to_dram: bool = True
    device_failures_max: int = 3
    staging_memory_bytes: int = 256 * MIB
    client_timeout_s: float = 10.0
    client_share: float = 0.5
    client_shared_bytes: int = 4096 * GIB

    def __post_init__(self) -> None:
        if not 1 <= self.async_delay_ms <= 60_000:
            raise UsageError(f"async_delay_ms must be 1 to 60000, found {self.async_delay_ms}")
        if not 0.0 <= self.pinned_share <= 1.0:
            raise UsageError(f"pinned_share must be between 0 and 1, found {self.pinned_share}")
        if not 0.0 <= self.client_share <= 1.0:
            raise UsageError(f"client_share must be between 0 and 1, found {self.client_share}")
        if self.client_timeout_s <= 0:
            raise UsageError(f"client_timeout_s must be positive, found {self.client_timeout_s}")
        if self.client_shared_bytes < 1:
            raise UsageError(
                f"client_shared_bytes must be positive, found {self.client_shared_bytes}"
            )
        if self.staging_memory_bytes < 0:
            raise UsageError(
                f"staging_memory_bytes must not be negative, found {self.staging_memory_bytes}"
            )
