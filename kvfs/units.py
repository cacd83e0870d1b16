"""Sizes, alignment and how they are printed.

Layer: L0.
"""

import re
from typing import Final

from kvfs.errors import UsageError

PAGE: Final = 4096
KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

_SUFFIXES: Final = {"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB,
                    "t": GIB * KIB, "tib": GIB * KIB, "kb": 10**3, "mb": 10**6, "gb": 10**9,
                    "tb": 10**12}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*\Z")


def align_up(value: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return -(-value // alignment) * alignment


def is_power_of_two(value: int) -> bool:
    """Say whether `value` is 1, 2, 4, 8 and so on."""
    return value > 0 and value & (value - 1) == 0


def parse_bytes(text: str) -> int:
    """Read a size such as '4GiB', '512M' or '65536' (K, M, G, T are binary; kB, MB decimal)."""
    match = _SIZE.match(text)
    factor = _SUFFIXES.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"size not understood: {text!r}: expected a number with KiB, MiB, GiB or TiB"
        )
    number = match.group(1)
    return int(float(number) * factor) if "." in number else int(number) * factor


def format_bytes(count: int) -> str:
    """Print a size in IEC units with one decimal, e.g. '7.1 GiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_duration(nanoseconds: int) -> str:
    """Print a duration with a unit that fits, e.g. '11 us', '1.10 ms', '1m41s'."""
    if nanoseconds < 10_000:
        return f"{nanoseconds} ns"
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f} us"
    if nanoseconds < 1_000_000_000:
        return f"{nanoseconds / 1e6:.2f} ms"
    seconds = nanoseconds / 1e9
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"
