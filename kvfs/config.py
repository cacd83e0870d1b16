"""Device URLs and the options of a pool.

Layer: L0.

A device URL is `scheme:location?option=value&option=value`, e.g. `dram:?size=4GiB`,
`cxl:node=1?size=64GiB`, `dax:/dev/dax0.0`, `pmem:/mnt/pmem/kv`, `dir:/mnt/nvme/kv?tier=2`. Options
known to every scheme: size, segment, tier, name. `emulated:PROFILE:` before any of them makes the
device behave like another kind (`kvfs.emulation`): `emulated:cxl:dram:?size=4GiB`. `dax:` knows
persistence; `dir:` and `pmem:` cache, depth, io and deadline_ms.
"""

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl

from kvfs.emulation import EMULATION_OPTIONS, PROFILES, overrides
from kvfs.errors import UsageError
from kvfs.units import GIB, MIB, is_power_of_two, parse_bytes

SCHEMES: Final = ("dram", "cxl", "dax", "pmem", "dir")
EMULATED: Final = "emulated"
VOLATILE_SCHEMES: Final = ("dram", "cxl")  # what lies there ends with the owner
DIRECTORY_SCHEMES: Final = ("pmem", "dir")  # what lies there are files below a directory
DEFAULT_TIER: Final = {"dram": 0, "cxl": 1, "dax": 1, "pmem": 1, "dir": 2}
PERSISTENCE: Final = ("cpu_cache", "memory_controller", "page", "none")  # see DeviceInfo
_OPTIONS: Final = ("size", "segment", "tier", "name")
_IO_OPTIONS: Final = ("cache", "depth", "io", "deadline_ms")
_OWN_OPTIONS: Final = {
    "dram": ("numa", "huge"), "cxl": ("huge",), "dax": ("persistence",), "pmem": _IO_OPTIONS,
    "dir": _IO_OPTIONS,
}  # fmt: skip
_FORM: Final = {"dram": "dram:?size=4GiB", "cxl": "cxl:node=1?size=64GiB"}
CACHES: Final = ("page", "dontcache", "direct")  # see kvfs.devices.transfers
DEPTH_MAX: Final = 256
DEADLINE_MS_MAX: Final = 3_600_000
SEGMENT_BYTES_MIN: Final = 16 * MIB
SEGMENT_BYTES_MAX: Final = GIB
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}\Z")
_NODE: Final = re.compile(r"node=(\d{1,4})\Z")


@dataclass(frozen=True, slots=True)
class DeviceURL:
    """A parsed device URL. Sizes in bytes; zero means not given.

    `profile`: what the device is to behave like; empty for what it is. `scheme` and `location` are
    those of the device itself.
    """

    scheme: str
    location: str
    size_bytes: int = 0
    segment_bytes: int = 0
    tier: int = 0
    name: str = ""
    options: dict[str, str] = field(default_factory=dict)
    profile: str = ""

    @property
    def kind(self) -> str:
        """What the device is called: its scheme, or "emulated"."""
        return EMULATED if self.profile else self.scheme

    @property
    def node(self) -> int:
        """NUMA node that memory is taken from; -1 for any."""
        found = _NODE.match(self.location)
        return int(found[1]) if found else int(self.options.get("numa", "-1"))

    def __str__(self) -> str:
        extra = "&".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        start = f"{EMULATED}:{self.profile}:" if self.profile else ""
        return f"{start}{self.scheme}:{self.location}" + (f"?{extra}" if extra else "")


def parse_device_url(text: str) -> DeviceURL:
    """Parse one device URL.

    Raises:
        UsageError: Unknown scheme, profile or option, or a value out of range; the message lists
            what is known.
    """
    profile, inner = _split_profile(text)
    scheme, separator, rest = inner.partition(":")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        remedy = f"; for a directory write 'dir:{inner}'" if inner.startswith("/") else ""
        raise UsageError(f"unknown device {inner!r}: expected one of {known}{remedy}")
    location, _, query = rest.partition("?")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(f"device options not understood: {text!r}: {error}") from error
    known_options = (*_OPTIONS, *_OWN_OPTIONS.get(scheme, ()))
    if profile:
        known_options += EMULATION_OPTIONS
    unknown = set(options) - set(known_options)
    if unknown:
        raise UsageError(
            f"unknown device option {min(unknown)!r} in {text!r}: "
            f"expected {', '.join(known_options[:-1])} or {known_options[-1]}"
        )
    _check_location(text, scheme, location, options)
    if profile:
        options |= overrides(options)
    _check_io(options, text)
    segment_bytes = parse_bytes(options.get("segment", "0"))
    if segment_bytes and not (
        is_power_of_two(segment_bytes) and SEGMENT_BYTES_MIN <= segment_bytes <= SEGMENT_BYTES_MAX
    ):
        raise UsageError("segment must be a power of two from 16MiB to 1GiB")
    tier = PROFILES[profile].tier if profile else DEFAULT_TIER[scheme]
    tier_text = options.get("tier", str(tier))
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
        profile=profile,
    )


def _split_profile(text: str) -> tuple[str, str]:
    """Return profile and URL of the device behind `emulated:PROFILE:`; "" without."""
    if not text.startswith(f"{EMULATED}:"):
        return "", text
    profile, separator, inner = text.removeprefix(f"{EMULATED}:").partition(":")
    if not separator or profile not in PROFILES:
        raise UsageError(
            f"unknown profile {profile!r} in {text!r}: expected one of {', '.join(PROFILES)}, then "
            "a device, such as 'emulated:cxl:dram:?size=4GiB'"
        )
    return profile, inner


def _check_location(text: str, scheme: str, location: str, options: dict[str, str]) -> None:
    """Raise UsageError unless a device can be where the URL says."""
    if scheme in VOLATILE_SCHEMES:
        is_placed = bool(_NODE.match(location)) if scheme == "cxl" else not location
        if not is_placed or "size" not in options:
            raise UsageError(f"a {scheme}: device is written '{_FORM[scheme]}', found {text!r}")
    elif not location.startswith("/") or "\0" in location:
        raise UsageError(f"a {scheme}: device needs an absolute path: {text!r}")
    if options.get("persistence", "none") not in PERSISTENCE:
        raise UsageError(f"persistence must be one of {', '.join(PERSISTENCE)}: {text!r}")
    numa = options.get("numa", "0")
    if not numa.isdecimal() or len(numa) > 4:
        raise UsageError(f"numa must be the number of a node, found {numa!r}: {text!r}")
    if options.get("huge", "no") not in ("yes", "no"):
        raise UsageError(f"huge must be yes or no: {text!r}")


def scheme_of(text: str) -> str:
    """Return the scheme of a device URL that may be of another release: the device's own."""
    if text.startswith(f"{EMULATED}:"):
        text = text.split(":", 2)[-1]
    return text.partition(":")[0]


def _check_io(options: dict[str, str], text: str) -> None:
    """Refuse values of a directory's own options that mean nothing."""
    if options.get("cache", "page") not in CACHES:
        raise UsageError(f"cache must be one of {', '.join(CACHES)}: {text!r}")
    if options.get("io", "threads") not in ("io_uring", "threads"):
        raise UsageError(f"io must be io_uring or threads: {text!r}")
    for name, low, high in (("depth", 1, DEPTH_MAX), ("deadline_ms", 0, DEADLINE_MS_MAX)):
        value = options.get(name, str(low))
        if not value.isdecimal() or not low <= int(value) <= high:
            raise UsageError(f"{name} must be a number from {low} to {high}, found {value!r}")


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
