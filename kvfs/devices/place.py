"""A place that could be a device, looked at without opening it.

Layer: L1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfs.config import DIRECTORY_SCHEMES, VOLATILE_SCHEMES, DeviceURL
from kvfs.devices.dax_copies import peek_superblock
from kvfs.devices.dax_layout import Range
from kvfs.devices.dax_source import inspect_source
from kvfs.devices.numa import require_node
from kvfs.devices.open import is_formatted
from kvfs.devices.osfs import nearest_existing
from kvfs.devices.pmem import persistence_of, why_not_dax
from kvfs.emulation import UNKNOWN, LinkFigures, emulation_of
from kvfs.errors import BusyError, DataError

_SYSFS: Final = Path("/sys")


@dataclass(frozen=True, slots=True)
class Place:
    """What a place is. `persistence`: see DeviceInfo. `is_formatted`: it holds a device of kvfs.

    `note`: why it is less than its URL says.
    """

    persistence: str
    is_persistent: bool
    is_formatted: bool
    bad: tuple[Range, ...] = ()
    figures: LinkFigures = UNKNOWN
    note: str = ""


def look(url: DeviceURL, *, sysfs: Path = _SYSFS) -> Place:
    """Look at the place of a URL. Nothing is changed, no lock is taken.

    Raises:
        NotFoundError: A DAX device is not there.
        UsageError: It is none; or there is no such memory node.
    """
    figures = emulation_of(url.profile, url.options) if url.profile else UNKNOWN
    if url.scheme in VOLATILE_SCHEMES:
        if url.node >= 0 and not url.profile:
            figures = require_node(url.node, str(url), sysfs).figures
        return Place("", False, False, figures=figures)
    if url.scheme in DIRECTORY_SCHEMES:
        root = nearest_existing(url.location)
        note = why_not_dax(root) if url.scheme == "pmem" else ""
        persistence = persistence_of(root, sysfs) if url.scheme == "pmem" and not note else ""
        return Place(persistence, True, is_formatted(url.location), figures=figures, note=note)
    persistence, bad = inspect_source(url.location, sysfs=sysfs)
    persistence = url.options.get("persistence", persistence)
    return Place(persistence, persistence != "none", _has_superblock(url.location), bad, figures)


def _has_superblock(location: str) -> bool:
    try:
        return peek_superblock(location) is not None
    except (BusyError, DataError):
        return True  # in use, or damaged
