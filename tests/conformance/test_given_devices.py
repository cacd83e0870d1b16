"""The device suite over devices that the caller names, all of which it overwrites.

    export KVFS_TEST_DEVICES='dax:/dev/dax0.0 pmem:/mnt/pmem dir:/mnt/nvme'
    pytest tests/conformance/test_given_devices.py

A `pmem:` device that is served like a directory on disk, since its files are no memory, fails.

Without the variable there are no tests here: a device of a developer's machine is never wiped.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kvfs.config import VOLATILE_SCHEMES, parse_device_url
from kvfs.devices.base import Device
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.dax_memory import DaxMemory
from kvfs.devices.dax_source import open_source
from kvfs.devices.open import open_device
from tests.conformance.device_suite import DeviceSuite, FilelessSuite
from tests.conformance.helpers import CAPACITY_BYTES, DEVICE_UUID, SEGMENT_BYTES, Opener

_FILELESS = ("dax",)
_DIRECTORY = "kvfs-conformance"


def _open(url: str, capacity_bytes: int = CAPACITY_BYTES) -> Device:
    device = open_device(
        parse_device_url(url),
        index=3,
        uuid=DEVICE_UUID,
        capacity_bytes=capacity_bytes,
        segment_bytes=SEGMENT_BYTES,
        name="subject",
    )
    assert url.partition(":")[0] != "pmem" or device.info.persistence, "its files are no memory"
    return device


class _Given:
    url: ClassVar[str]

    @pytest.fixture
    def opener(self) -> Iterator[Opener]:
        scheme, _, rest = self.url.partition(":")
        location, _, options = rest.partition("?")
        if scheme in _FILELESS:
            _wipe(location)
        if scheme in (*_FILELESS, *VOLATILE_SCHEMES):
            yield lambda **wanted: _open(self.url, **wanted)
            return
        root = Path(location) / _DIRECTORY
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        yield lambda **wanted: _open(f"{scheme}:{root}?{options}".rstrip("?"), **wanted)
        shutil.rmtree(root)


def _wipe(location: str) -> None:
    """Overwrite the header: no superblock, no labels, no bad ranges."""
    with open_source(location) as source:
        memory = DaxMemory(source.fd, source.nbytes, None)
        memory.zero(0, HEADER_BYTES)
        memory.close()


for _number, _url in enumerate(os.environ.get("KVFS_TEST_DEVICES", "").split()):
    _suite = FilelessSuite if _url.partition(":")[0] in _FILELESS else DeviceSuite
    _class = type(f"TestGiven{_number}", (_Given, _suite), {"url": _url, "__module__": __name__})
    # Volatile memory of a device keeps its contents while its owner is away.
    _class.is_kept = _suite is FilelessSuite
    # A character device says nothing that a copy of it would not say.
    _class.tells_copies = not Path(_url.partition(":")[2].partition("?")[0]).is_char_device()
    globals()[_class.__name__] = _class
