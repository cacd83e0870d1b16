"""The device suite over every device and every wrapper."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvfs import _native
from kvfs.devices import numa
from kvfs.devices.base import Device
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_layout import HEADER_BYTES
from kvfs.devices.dax_source import open_source
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.emulated import EmulatedDevice
from kvfs.devices.keeper import Keeper
from kvfs.devices.memory import MemoryDevice
from kvfs.devices.osfs import OSFileSystem
from kvfs.devices.pmem import PmemFileSystem
from kvfs.devices.transfers import IOOptions
from kvfs.devices.wrappers import CountingDevice, FaultyDevice
from kvfs.emulation import PROFILES
from kvfs.errors import RefusedError, UsageError
from tests.conformance.device_suite import DeviceSuite, FilelessSuite
from tests.conformance.helpers import CAPACITY_BYTES, DEVICE_UUID, SEGMENT_BYTES, Opener

_PLAIN = IOOptions()
_IDENTITY: dict[str, Any] = {
    "index": 3,
    "uuid": DEVICE_UUID,
    "name": "subject",
    "segment_bytes": SEGMENT_BYTES,
}


def open_directory(
    root: Path, capacity_bytes: int = CAPACITY_BYTES, options: IOOptions = _PLAIN
) -> Device:
    try:
        files = OSFileSystem(str(root), options=options)
    except UsageError as error:
        if options.cache == "page" and not options.io:
            raise
        pytest.skip(str(error))
    return DirectoryDevice(files, capacity_bytes=capacity_bytes, **_IDENTITY)


def open_memory(capacity_bytes: int = CAPACITY_BYTES) -> Device:
    return MemoryDevice(capacity_bytes=capacity_bytes, **_IDENTITY)


class TestDirectory(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: open_directory(tmp_path / "device", **options)


def open_pmem(root: Path, capacity_bytes: int = CAPACITY_BYTES) -> Device:
    """Open a directory of mapped segments; MAP_SYNC is what only persistent memory has."""
    return DirectoryDevice(
        PmemFileSystem(str(root), mapper=_native.Arena), capacity_bytes=capacity_bytes,
        kind="pmem", persistence="memory_controller", **_IDENTITY,
    )  # fmt: skip


class TestPmem(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: open_pmem(tmp_path / "device", **options)


class TestNodeMemory(DeviceSuite):
    """Memory bound to a node: here the one there is."""

    @pytest.fixture
    def opener(self) -> Opener:
        found = numa.nodes()
        if not found:
            pytest.skip("this kernel tells of no memory nodes")
        fd = _native.memfd("kvfs-test", CAPACITY_BYTES)
        try:
            numa.bind(fd, CAPACITY_BYTES, found[0], "subject")
        except RefusedError as error:
            pytest.skip(str(error))
        finally:
            os.close(fd)
        return lambda capacity_bytes=CAPACITY_BYTES: MemoryDevice(
            capacity_bytes=capacity_bytes, kind="cxl", node=found[0], huge=True, **_IDENTITY
        )


class TestEmulatedDirectory(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: EmulatedDevice(
            open_directory(tmp_path / "device", **options), PROFILES["ssd"].emulation
        )


class TestDirectoryByRing(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        how = IOOptions(cache="direct", io="io_uring", depth=4)
        return lambda **options: open_directory(tmp_path / "device", options=how, **options)


class TestDirectoryByThreads(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        how = IOOptions(cache="direct", io="threads", depth=4)
        return lambda **options: open_directory(tmp_path / "device", options=how, **options)


class TestDirectoryWithDeadline(DeviceSuite):
    """All goes through buffers."""

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        how = IOOptions(cache="direct", deadline_ms=3_600_000)
        return lambda **options: open_directory(tmp_path / "device", options=how, **options)


class TestDirectoryUncached(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        how = IOOptions(cache="dontcache")
        return lambda **options: open_directory(tmp_path / "device", options=how, **options)


class TestDirectoryOnTmpfs(DeviceSuite):
    @pytest.fixture
    def opener(self) -> Iterator[Opener]:
        if not Path("/dev/shm").is_dir():
            pytest.skip("no /dev/shm")
        root = Path(tempfile.mkdtemp(prefix="kvfs-test-", dir="/dev/shm"))
        yield lambda **options: open_directory(root, **options)
        shutil.rmtree(root)


class TestMemory(DeviceSuite):
    @pytest.fixture
    def opener(self) -> Opener:
        return open_memory


class TestKeptMemory(DeviceSuite):
    """Opened again with the keeper that has the memory, it is what it was."""

    is_kept = True

    @pytest.fixture
    def opener(self) -> Iterator[Opener]:
        keeper = Keeper()
        yield lambda capacity_bytes=CAPACITY_BYTES: MemoryDevice(
            capacity_bytes=capacity_bytes, keeper=keeper, **_IDENTITY
        )
        keeper.close()


class TestCountingDirectory(DeviceSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: CountingDevice(open_directory(tmp_path, **options))


class TestFaultyDirectory(DeviceSuite):
    """A FaultyDevice without faults is the device itself."""

    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: FaultyDevice(open_directory(tmp_path, **options), ())


class TestWrappedMemory(DeviceSuite):
    @pytest.fixture
    def opener(self) -> Opener:
        return lambda **options: CountingDevice(FaultyDevice(open_memory(**options), ()))


def open_dax(path: Path, capacity_bytes: int = CAPACITY_BYTES, persistence: str = "") -> Device:
    with path.open("ab") as file:
        os.truncate(file.fileno(), HEADER_BYTES + CAPACITY_BYTES)
    source = open_source(str(path), persistence=persistence)
    return DaxDevice(source, capacity_bytes=capacity_bytes, **_IDENTITY)


class TestDax(FilelessSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: open_dax(tmp_path / "device", **options)


class TestDaxMemory(FilelessSuite):
    """On tmpfs every page is memory that stays where it is, as on a character device."""

    @pytest.fixture
    def opener(self) -> Iterator[Opener]:
        if not Path("/dev/shm").is_dir():
            pytest.skip("no /dev/shm")
        root = Path(tempfile.mkdtemp(prefix="kvfs-test-", dir="/dev/shm"))
        yield lambda **options: open_dax(
            root / "device", persistence="memory_controller", **options
        )
        shutil.rmtree(root)


class TestEmulatedDax(FilelessSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: EmulatedDevice(
            open_dax(tmp_path / "device", **options), PROFILES["cxl"].emulation
        )


class TestFaultyDax(FilelessSuite):
    @pytest.fixture
    def opener(self, tmp_path: Path) -> Opener:
        return lambda **options: CountingDevice(
            FaultyDevice(open_dax(tmp_path / "device", **options), ())
        )
