"""What a memory or storage takes for its bytes, and the profiles of the `emulated:` devices.

Layer: L0.

The figures of a profile are those of one part that was published; each has its source beside it.
docs/DEVICES.md shows the same table, and a test compares the two.
"""

import dataclasses
from dataclasses import dataclass
from typing import Final

from kvfs.errors import UsageError
from kvfs.units import parse_bytes

_PJ_MAX: Final = 1_000_000
_LATENCY_NS_MAX: Final = 10_000_000_000


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """How fast a memory or storage answers. Zero: not known, or no limit."""

    read_bytes_per_s: int = 0
    write_bytes_per_s: int = 0
    read_latency_ns: int = 0
    write_latency_ns: int = 0


UNKNOWN: Final = LinkFigures()


@dataclass(frozen=True, slots=True)
class Emulation(LinkFigures):
    """What an emulated device adds. Energies in picojoules per byte."""

    read_pj_per_byte: int = 0
    write_pj_per_byte: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """A part to stand for. `sources`: of bandwidth, latency and energy."""

    emulation: Emulation
    tier: int
    sources: tuple[str, str, str]


PROFILES: Final[dict[str, Profile]] = {
    "cxl": Profile(
        Emulation(17_800_000_000, 13_600_000_000, 250, 250, 640, 640),
        1,
        ("CXL 2.0 x8 module, OCP E3.S (CacheLib wiki): 17.8 read; half of 27.2 at 1:1 written",
         "250 ns idle, same source; 140 to 410 ns over devices (Melody)",
         "70 to 90 pJ/bit, derived: 20 to 25 W per module at 36 GB/s (CZ120)"),
    ),
    "pmem": Profile(
        Emulation(39_400_000_000, 13_900_000_000, 305, 94, 2_280, 6_470),
        1,
        ("Optane 100, six DIMMs, non-temporal (Izraelevitz et al., 2019): 39.4 read, 13.9 write",
         "305 ns random read, 94 ns for a non-temporal store with its fence, same source",
         "derived: 15 W per DIMM, six of them, at those bandwidths"),
    ),
    "rdma": Profile(
        Emulation(42_900_000_000, 42_900_000_000, 3_500, 3_500, 890, 890),
        2,
        ("400 Gbit/s, 40 GiB/s reached (86 %) by the KV cache client of 3FS (its README)",
         "2 to 5 us, same source",
         "derived: two adapters of 19 W (GreenSKU, NIC.yaml) at that bandwidth"),
    ),
    "ssd": Profile(
        Emulation(14_000_000_000, 10_000_000_000, 70_000, 10_000, 1_640, 1_640),
        2,
        ("Micron 9550, PCIe 5.0 x4 (ComputerBase): 14.0 read, 10.0 write",
         "60 to 80 us for 4 KiB of TLC, 10 us for a write into its buffer",
         "205 pJ/bit, from 608 MB/s per W (PM1743); writes are taken to be no dearer"),
    ),
}  # fmt: skip
EMULATION_OPTIONS: Final = (
    "read_bandwidth", "write_bandwidth", "read_latency_ns", "write_latency_ns",
    "read_pj_per_byte", "write_pj_per_byte",
)  # fmt: skip


def overrides(options: dict[str, str]) -> dict[str, str]:
    """Return the options of a URL that change a profile's figures, as plain numbers.

    Raises:
        UsageError: A value is out of range.
    """
    found: dict[str, str] = {}
    for name in EMULATION_OPTIONS:
        text = options.get(name)
        if text is None:
            continue
        if name.endswith("bandwidth"):
            found[name] = str(parse_bytes(text))
            continue
        limit = _LATENCY_NS_MAX if name.endswith("_ns") else _PJ_MAX
        if not text.isdecimal() or int(text) > limit:
            raise UsageError(f"{name} must be a number from 0 to {limit}, found {text!r}")
        found[name] = text
    return found


def emulation_of(profile: str, options: dict[str, str]) -> Emulation:
    """Return a profile's figures, but for what the options of a URL say otherwise."""
    changes = {
        name.replace("bandwidth", "bytes_per_s"): int(value)
        for name, value in overrides(options).items()
    }
    return dataclasses.replace(PROFILES[profile].emulation, **changes)
