"""From URLs to devices; the ledger."""

import os
import resource
import threading
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs.config import SCHEMES as URL_SCHEMES
from kvfs.config import DeviceURL, parse_device_url
from kvfs.devices.base import SLOT_COUNT_MAX, Device, slot_count_of
from kvfs.devices.dax import DaxDevice
from kvfs.devices.directory import DirectoryDevice
from kvfs.devices.ledger import Ledger
from kvfs.devices.memory import MemoryDevice
from kvfs.devices.open import (
    SCHEMES,
    capacity_of,
    location_of,
    open_device,
    raise_descriptor_limit,
)
from kvfs.errors import CorruptionError, NoSpaceError, NotFoundError, UsageError
from kvfs.units import GIB, MIB, PAGE, align_up


def opened(url: DeviceURL, *, create: bool = True, capacity_bytes: int = 32 * MIB) -> Device:
    return open_device(
        url, index=2, uuid=UUID(int=5), capacity_bytes=capacity_bytes, segment_bytes=16 * MIB,
        name="one", create=create,
    )  # fmt: skip


def test_every_url_scheme_has_a_constructor() -> None:
    assert set(SCHEMES) == set(URL_SCHEMES)


def test_a_directory_is_opened(tmp_path: Path) -> None:
    url = parse_device_url(f"dir:{tmp_path}/kv?size=32MiB&tier=3")
    with pytest.raises(NotFoundError):
        opened(url, create=False)
    device = opened(url)
    assert isinstance(device, DirectoryDevice)
    info = device.info
    assert (info.kind, info.index, info.uuid, info.name) == ("dir", 2, UUID(int=5), "one")
    assert (info.tier, info.is_persistent, info.url) == (3, True, str(url))
    assert (info.capacity_bytes, info.segment_bytes) == (32 * MIB, 16 * MIB)
    assert location_of(device) == device.location() != 0
    device.close()
    with pytest.raises(CorruptionError, match="never formatted"):
        opened(url, create=False)
    (tmp_path / "kv/kvfs.superblock").write_bytes(b"anything")
    opened(url, create=False).close()


def test_dax_is_opened(tmp_path: Path) -> None:
    url = parse_device_url(f"dax:{tmp_path}/memory?persistence=memory_controller")
    with pytest.raises(NotFoundError, match="no DAX device"):
        capacity_of(url)
    with (tmp_path / "memory").open("wb") as file:
        file.truncate(34 * MIB)
    assert capacity_of(url) == 32 * MIB
    device = opened(url)
    assert isinstance(device, DaxDevice)
    info = device.info
    assert (info.kind, info.index, info.uuid, info.name) == ("dax", 2, UUID(int=5), "one")
    assert (info.tier, info.is_persistent, info.url) == (1, True, str(url))
    assert (info.persistence, info.takes_files) == ("memory_controller", False)
    assert location_of(device) != 0
    device.close()
    with pytest.raises(UsageError, match="give a smaller size"):
        opened(url, capacity_bytes=48 * MIB)


def test_memory_is_opened() -> None:
    device = opened(parse_device_url("dram:?size=32MiB"))
    assert isinstance(device, MemoryDevice)
    assert (device.info.kind, device.info.tier, device.info.is_persistent) == ("dram", 0, False)
    assert location_of(device) == 0
    device.close()


def test_a_device_holds_at_least_one_segment(tmp_path: Path) -> None:
    url = parse_device_url(f"dir:{tmp_path}/kv?size=1MiB")
    with pytest.raises(UsageError, match=r"at least one segment of 16\.0 MiB, found 1\.0 MiB"):
        opened(url, capacity_bytes=MIB)
    assert not (tmp_path / "kv").exists()


def test_a_failed_open_keeps_no_lock(tmp_path: Path) -> None:
    (tmp_path / "segments").write_text("in the way")
    url = parse_device_url(f"dir:{tmp_path}?size=32MiB")
    for _ in range(2):
        with pytest.raises(NotADirectoryError):
            opened(url)


def test_capacity_as_given_or_most_of_what_is_free(tmp_path: Path) -> None:
    assert capacity_of(parse_device_url("dram:?size=3GiB")) == 3 * GIB
    assert capacity_of(parse_device_url(f"dir:{tmp_path}?size=3GiB")) == 3 * GIB
    capacity = capacity_of(parse_device_url(f"dir:{tmp_path}/not/yet"))
    free = os.statvfs(tmp_path)
    assert capacity % PAGE == 0
    assert 0.7 < capacity / (free.f_bavail * free.f_frsize) < 0.9
    with pytest.raises(UsageError, match="size"):
        capacity_of(DeviceURL(scheme="dram", location=""))


def test_the_descriptor_limit_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_there_are_slots_for_the_smallest_file_segments() -> None:
    assert slot_count_of(256 * MIB, 16 * MIB) == 4 * 16 + 64
    assert slot_count_of(16 * MIB + 1, 16 * MIB) == 4 * 2 + 64
    assert slot_count_of(1 << 60, 16 * MIB) == SLOT_COUNT_MAX


# --- the ledger

KEYS = st.sampled_from(["a", "b", "c", "d"])
SIZES = st.integers(0, 5 * PAGE)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "take", "put", "drop", "move"]), KEYS, SIZES))


@given(STEPS)
def test_the_ledger_agrees_with_a_table(steps: list[tuple[str, str, int]]) -> None:
    capacity = 8 * PAGE
    ledger = Ledger("ssd0", capacity)
    table: dict[str, int] = {}
    for verb, key, nbytes in steps:
        size = align_up(nbytes, PAGE)
        more = size - table.get(key, 0)
        fits = sum(table.values()) + more <= capacity
        try:
            if verb == "add":
                ledger.add(key, nbytes)
                assert key not in table
                table[key] = size
            elif verb == "take" and key in table:
                ledger.take(key, nbytes)
                table[key] = max(size, table[key])
            elif verb == "put":
                ledger.put(key, nbytes)
                table[key] = size
            elif verb == "move" and key in table and f"{key}'" not in table:
                ledger.move(key, f"{key}'")
                table[f"{key}'"] = table.pop(key)
            elif verb == "drop":
                ledger.drop(key)
                table.pop(key, None)
        except FileExistsError:
            assert key in table
        except NoSpaceError:
            assert not fits
        assert ledger.used_bytes == sum(table.values())


def test_the_ledger_under_threads() -> None:
    ledger = Ledger("ssd0", 100 * PAGE)
    taken = []

    def work(number: int) -> None:
        for turn in range(100):
            try:
                ledger.add(f"{number}-{turn}", PAGE)
                taken.append(1)
            except NoSpaceError:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == 100
    assert ledger.used_bytes == 100 * PAGE
