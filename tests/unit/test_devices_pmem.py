"""Directories on persistent memory: what is mapped, what is persisted how, and what is refused."""

import errno
import logging
import os
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

from kvfs import _native
from kvfs.config import parse_device_url
from kvfs.devices import open as opening
from kvfs.devices import pmem
from kvfs.devices.base import SegmentName
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.open import open_device
from kvfs.devices.osfile import OSFile
from kvfs.devices.pmem import PmemFile, PmemFileSystem, map_synchronously, why_not_dax
from kvfs.engine.log import is_unborn
from kvfs.units import MIB, PAGE
from tests.unit.made_up_sysfs import link, write


def opened(root: Path) -> DirectoryDevice:
    return DirectoryDevice(
        PmemFileSystem(str(root), mapper=_native.Arena), index=1, uuid=UUID(int=5),
        capacity_bytes=8 * MIB, segment_bytes=2 * MIB, name="pmem0", kind="pmem",
        persistence="memory_controller",
    )  # fmt: skip


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count fdatasync."""
    calls: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), real(fd))[1])
    return calls


def test_what_is_stored_in_a_segment_needs_no_fdatasync(tmp_path: Path, syncs: list[int]) -> None:
    device = opened(tmp_path)
    segment = device.create(0, 1, b"t")
    assert len(syncs) == 1  # its blocks
    data = np.frombuffer(os.urandom(10_000), np.uint8)
    digests, statuses = np.zeros((1, 16), np.uint8), np.zeros(1, np.int32)
    failed = device.write_payloads(
        segment, np.array([PAGE], np.uint64), np.array([data.ctypes.data], np.uint64),
        np.array([len(data)], np.uint64), digests, statuses,
    )  # fmt: skip
    device.write_tail(segment, 4096, b"summary")
    device.persist(segment)
    assert (failed, len(syncs)) == (0, 1)
    device.close()
    raw = (tmp_path / "segments/00000000-00000001.seg").read_bytes()
    assert raw[PAGE : PAGE + len(data)] == data.tobytes()
    assert raw[-4096:][:7] == b"summary"
    assert digests[0].tobytes() == _native.xxh3_128(data.tobytes())


def test_a_segment_goes_on_after_it_was_opened_again(tmp_path: Path, syncs: list[int]) -> None:
    device = opened(tmp_path)
    device.create(0, 1, b"t")
    device.close()
    device = opened(tmp_path)
    syncs.clear()
    segment = device.attach(SegmentName(0, 1, False, 2 * MIB))
    device.write_tail(segment, 4096, b"more")
    device.persist(segment)
    assert isinstance(segment.state.file, PmemFile)
    assert device.read_tail(segment, 4096)[:4] == b"more"
    assert not syncs
    device.close()


def test_a_segment_that_a_crash_left_empty_is_freed(tmp_path: Path) -> None:
    """Its name may come before its space: then there is nothing to map."""
    opened(tmp_path).close()
    path = tmp_path / "segments/00000000-00000001.seg"
    path.touch()
    device = opened(tmp_path)
    segment = device.attach(*device.segments())
    assert is_unborn(device, segment)
    device.free(segment)
    assert not path.exists()
    device.close()


def test_the_blocks_of_a_segment_are_there_from_the_start(tmp_path: Path) -> None:
    device = opened(tmp_path)
    device.create(0, 1, b"t")
    status = (tmp_path / "segments/00000000-00000001.seg").stat()
    assert status.st_blocks * 512 >= 2 * MIB
    device.close()


def test_files_are_written_by_the_filesystem_and_synced(tmp_path: Path, syncs: list[int]) -> None:
    device = opened(tmp_path)
    staging = device.create_staging("file")
    device.write_staging(staging, 0, b"x" * 5000)
    device.persist_staging(staging)
    assert type(staging.state.file) is OSFile
    assert len(syncs) == 1
    device.write_superblock(b"superblock")
    assert len(syncs) == 2
    device.close()


def test_a_page_that_went_bad_is_an_error(tmp_path: Path) -> None:
    device = opened(tmp_path)
    segment = device.create(0, 1, b"t")
    os.truncate(tmp_path / "segments/00000000-00000001.seg", MIB)
    with pytest.raises(OSError, match="memory fault") as caught:
        device.write_tail(segment, 4096, b"summary")
    assert caught.value.errno == errno.EIO
    device.close()


def test_a_segment_that_cannot_be_mapped_leaves_nothing(tmp_path: Path) -> None:
    def refuse(fd: int, nbytes: int) -> _native.Arena:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    files = PmemFileSystem(str(tmp_path), mapper=refuse)
    files.make_directory("segments")
    with pytest.raises(OSError, match="not supported"):
        files.create("segments/00000000-00000001.seg", 2 * MIB)
    assert list((tmp_path / "segments").iterdir()) == []
    files.close()


def test_map_sync_is_refused_where_files_are_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(2 * MIB)
        with pytest.raises(OSError, match="not supported") as caught:
            map_synchronously(file.fileno(), 2 * MIB)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_mount_that_is_not_dax_says_so(tmp_path: Path) -> None:
    assert why_not_dax(str(tmp_path)) == "its filesystem is not mounted with -o dax"
    assert why_not_dax(str(tmp_path), _native.Arena) == ""
    assert "no file can be made" in why_not_dax("/proc")


def test_without_dax_it_is_served_like_a_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_warnings: list[str]
) -> None:
    expected_warnings.append("served like a directory")
    url = parse_device_url(f"pmem:{tmp_path}/kv?size=32MiB")
    with caplog.at_level(logging.WARNING, logger="kvfs.devices"):
        device = open_device(url, index=0, uuid=UUID(int=1), capacity_bytes=32 * MIB,
                             segment_bytes=16 * MIB, name="pmem0")  # fmt: skip
    assert (device.info.kind, device.info.tier, device.info.persistence) == ("pmem", 1, "")
    assert device.info.is_persistent
    assert "pmem0 is served like a directory on disk" in caplog.text
    assert f"or call it dir:{tmp_path}/kv" in caplog.text
    segment = device.create(0, 1, b"t")
    assert type(segment.state.file) is OSFile
    device.close()


def test_with_dax_segments_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAP_SYNC and the attribute of statx are made up: no filesystem here has them."""
    monkeypatch.setattr(opening, "why_not_dax", lambda root: why_not_dax(root, _native.Arena))
    monkeypatch.setattr(
        opening, "PmemFileSystem",
        lambda root, **options: PmemFileSystem(root, mapper=_native.Arena, **options),
    )  # fmt: skip
    url = parse_device_url(f"pmem:{tmp_path}/kv?size=32MiB")
    device = open_device(url, index=0, uuid=UUID(int=1), capacity_bytes=32 * MIB,
                         segment_bytes=16 * MIB, name="pmem0")  # fmt: skip
    assert device.info.persistence == "memory_controller"
    assert isinstance(device.create(0, 1, b"t").state.file, PmemFile)
    device.close()


def test_persistence_is_what_the_region_says(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    sysfs = tmp_path / "sys"
    region = sysfs / "devices/ndbus0/region0"
    disk = region / "namespace0.0/block/pmem0"
    link(sysfs / f"dev/block/{os.major(number)}:{os.minor(number)}", disk)
    assert pmem.persistence_of(str(tmp_path), sysfs) == "memory_controller"
    write(region / "persistence_domain", "cpu_cache")
    assert pmem.persistence_of(str(tmp_path), sysfs) == "cpu_cache"
    write(region / "persistence_domain", "unknown")
    assert pmem.persistence_of(str(tmp_path), sysfs) == "memory_controller"
