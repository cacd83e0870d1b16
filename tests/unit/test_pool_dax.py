"""Pools on DAX devices; a file stands in for one."""

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs import _native
from kvfs.devices import dax_source
from kvfs.devices.dax import DaxDevice
from kvfs.devices.dax_layout import COPY_BYTES
from kvfs.engine.checker import Severity, check_pool
from kvfs.engine.checker.salvage import salvage
from kvfs.errors import BusyError, ExistsError, MediaError, NoSpaceError, UsageError
from kvfs.pool import CATALOG_NAME
from kvfs.tree import Tree
from kvfs.units import KIB, MIB, PAGE
from tests.unit.small_pools import BLOCK, NEVER_MS, payloads, small_namespace

_OPTIONS = kvfs.PoolOptions(async_delay_ms=NEVER_MS, staging_memory_bytes=12 * MIB)


def device_url(path: Path, size: str = "64MiB") -> str:
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(66 * MIB)
    return f"dax:{path}?size={size}&segment=16MiB"


def make(path: Path, *more: str) -> kvfs.Pool:
    urls = [device_url(path / "memory"), *more]
    return kvfs.create_pool(path / "pool", urls, options=_OPTIONS)


def open_again(path: Path) -> kvfs.Pool:
    pool = kvfs.open_pool(path / "pool", options=_OPTIONS, background=False)
    assert isinstance(pool, kvfs.Pool)
    assert not pool.recovery.problems
    return pool


def tokens(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1 << 30, 4 * count).tolist()


def problems(path: Path) -> list[str]:
    report = check_pool(path / "pool", data=True)
    return [str(found) for found in report.findings if found.severity > Severity.NOTE]


@pytest.mark.parametrize("more", [(), ("dram:?size=64MiB&segment=16MiB",)])
def test_what_was_put_is_there_after_a_reopen(tmp_path: Path, more: tuple[str, ...]) -> None:
    data = payloads(400)  # 25 MiB: a sealed segment and an open one
    with make(tmp_path, *more) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(400))
        space.put(keys, data, durability="sync")
        info = pool.store.state.devices[0].info
        assert (info.kind, info.takes_files, info.persistence) == ("dax", False, "page")
    assert not problems(tmp_path)
    for _ in range(2):
        with open_again(tmp_path) as pool:
            assert pool.recovery.blocks == 400
            space = pool.namespace("n")
            out = np.zeros((400, BLOCK), np.uint8)
            assert space.read_into(keys, out).all()
            assert (out == data).all()
            assert space.match_prefix(keys) == 400


def test_a_view_is_no_copy(tmp_path: Path) -> None:
    data = payloads(8)
    with make(tmp_path) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(8))
        space.put(keys, data)
        for chosen in (np.arange(8), np.array([5, 1, 2, 7])):
            with space.view(keys[chosen]) as view:
                assert view.is_zero_copy
                assert (view.numpy(shape=(len(chosen), BLOCK)) == data[chosen]).all()


def test_a_view_where_maps_are_coarse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dax_source._describe
    monkeypatch.setattr(
        dax_source, "_describe", lambda *args: replace(real(*args), granularity=2 * MIB)
    )
    data = payloads(40)  # 2.5 MiB
    with make(tmp_path) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(40))
        space.put(keys, data)
        for chosen, is_mapped in (
            (np.arange(3, 40), True),  # neighbours, though nothing is aligned
            (np.array([5, 1, 2, 7]), False),
            (np.array([9]), True),
        ):
            with space.view(keys[chosen]) as view:
                assert view.is_zero_copy == is_mapped
                assert (view.numpy(shape=(len(chosen), BLOCK)) == data[chosen]).all()
                read = np.ctypeslib.as_array((ctypes.c_uint8 * BLOCK).from_address(view.address))
                assert (read == data[chosen[0]]).all()


def write_file(pool: kvfs.Pool, name: str, data: bytes) -> None:
    parent = pool.namespace("n").info.root_node_id
    node = Tree(pool).create_file(parent, name, 0o644, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    try:
        pool.files.write(handle, 0, data)
    finally:
        pool.files.close_write(handle)
    pool.files.publish()


def read_file(pool: kvfs.Pool, name: str) -> bytes:
    node = pool.catalog.lookup(pool.namespace("n").info.root_node_id, name)
    assert node is not None
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, node.size_bytes + 1))
    finally:
        pool.files.close_read(reader)


def test_files_go_into_the_log_as_far_as_memory_reaches(tmp_path: Path) -> None:
    contents = {"small": os.urandom(3 * KIB + 1), "large": os.urandom(10 * MIB + 5)}
    with make(tmp_path) as pool:
        small_namespace(pool)
        for name, data in contents.items():
            write_file(pool, name, data)
        with pytest.raises(NoSpaceError, match="use more or larger directories"):
            write_file(pool, "too-large", bytes(13 * MIB))
        pool.flush()
    with open_again(tmp_path) as pool:
        for name, data in contents.items():
            assert read_file(pool, name) == data


def test_files_lie_in_a_directory_beside_it(tmp_path: Path) -> None:
    data = os.urandom(13 * MIB)
    with make(tmp_path, f"dir:{tmp_path}/files?size=64MiB&segment=16MiB") as pool:
        small_namespace(pool)
        write_file(pool, "large", data)
        assert pool.store.file_devices(0) == [1]
    with open_again(tmp_path) as pool:
        assert read_file(pool, "large") == data
    assert not problems(tmp_path)


@pytest.fixture
def memfd() -> Iterator[str]:
    fd = os.memfd_create("kvfs-dax")
    os.truncate(fd, 66 * MIB)
    yield f"/proc/self/fd/{fd}"
    os.close(fd)


@pytest.mark.parametrize("reads_file", [False, True])
def test_bad_memory_costs_its_block_and_is_not_used_again(
    tmp_path: Path, memfd: str, expected_warnings: list[str], reads_file: bool
) -> None:
    expected_warnings.append("memory is bad: dax0: 4.0 KiB")
    data = payloads(100)
    with kvfs.create_pool(tmp_path / "pool", [device_url(Path(memfd))], options=_OPTIONS) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(100))
        space.put(keys, data, durability="sync")
        write_file(pool, "file", data[:10].tobytes())
        [segment] = pool.store.state.devices[0].segments.values()
        block = 105 if reads_file else 20
        try:
            _native.poison(segment.handle.address + block * BLOCK + PAGE, PAGE)
        except OSError as error:
            pytest.skip(f"no UFFDIO_POISON: {error}")
        if reads_file:
            with pytest.raises(MediaError):
                read_file(pool, "file")
        out = np.zeros((100, BLOCK), np.uint8)
        found = space.read_into(keys, out)
        assert np.flatnonzero(~found).tolist() == ([] if reads_file else [20])
        assert (out[found] == data[found]).all()
        device = pool.store.state.devices[0].device
        assert isinstance(device, DaxDevice)
        [bad] = device.bad_ranges
        assert bad == (2 * MIB + block * BLOCK + PAGE, PAGE)
        pool.store.destroy_namespace(space.info.namespace_id)
        assert device.used_bytes == 16 * MIB, "the place is given to nobody any more"
        assert not device.segments()
    with open_again(tmp_path) as pool:
        assert pool.store.state.devices[0].device.used_bytes == 16 * MIB


def test_a_device_has_one_pool(tmp_path: Path) -> None:
    with make(tmp_path), pytest.raises(BusyError, match="device is in use"):
        kvfs.create_pool(tmp_path / "other", [device_url(tmp_path / "memory")])
    with pytest.raises(ExistsError, match="belongs to a pool"):
        kvfs.create_pool(tmp_path / "other", [device_url(tmp_path / "memory")])
    kvfs.destroy_pool(tmp_path / "pool")
    kvfs.create_pool(tmp_path / "other", [device_url(tmp_path / "memory")]).close()


def test_the_size_is_the_devices_own(tmp_path: Path) -> None:
    device_url(tmp_path / "memory")
    with kvfs.create_pool(tmp_path / "pool", [f"dax:{tmp_path}/memory"]) as pool:
        info = pool.store.state.devices[0].info
        assert (info.capacity_bytes, info.segment_bytes) == (64 * MIB, 16 * MIB)
    with pytest.raises(UsageError, match="device too small"):
        kvfs.create_pool(tmp_path / "other", [device_url(tmp_path / "second", "1GiB")])


def test_eviction_reuses_places(tmp_path: Path) -> None:
    with make(tmp_path) as pool:
        space = small_namespace(pool)
        for seed in range(12):  # twice the device
            keys, _ = space.keys(tokens(170, seed))
            data = payloads(170, seed)
            space.put(keys, data, durability="sync")
            out = np.zeros((170, BLOCK), np.uint8)
            assert space.read_into(keys, out).all()
            assert (out == data).all()
    assert not problems(tmp_path)
    with open_again(tmp_path) as pool:
        space = pool.namespace("n")
        assert space.read_into(keys, out).all()
        assert (out == data).all()


def test_a_damaged_catalog_is_replaced(tmp_path: Path) -> None:
    data = payloads(20)
    with make(tmp_path) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(20))
        space.put(keys, data, durability="sync")
        identity = pool.store.state.devices[0].info.uuid
    catalog = tmp_path / "pool" / CATALOG_NAME
    found = salvage(catalog)
    found.require_whole()
    assert [row.uuid for row in found.rows] == [identity.bytes]
    with catalog.open("r+b") as file:
        file.write(b"damaged" * 10)
    report = check_pool(tmp_path / "pool", repair=True, allow_name_loss=True)
    assert report.findings
    with open_again(tmp_path) as pool:
        out = np.zeros_like(data)
        assert pool.namespace("n").read_into(keys, out).all()
        assert (out == data).all()


def test_memory_that_does_not_persist_is_found_again_or_starts_empty(
    tmp_path: Path, expected_warnings: list[str]
) -> None:
    device_url(tmp_path / "memory")
    url = f"dax:{tmp_path}/memory?segment=16MiB&persistence=none"
    data = payloads(20)
    with kvfs.create_pool(tmp_path / "pool", [url], options=_OPTIONS) as pool:
        space = small_namespace(pool)
        keys, _ = space.keys(tokens(20))
        with pytest.raises(UsageError):
            space.put(keys, data, durability="sync")
        space.put(keys, data, durability="async")
    out = np.zeros_like(data)
    with open_again(tmp_path) as pool:
        assert pool.namespace("n").read_into(keys, out).all()
        assert (out == data).all()
    with (tmp_path / "memory").open("r+b") as file:  # power was lost: some of it decays
        for copy in range(3):
            file.seek(copy * COPY_BYTES + PAGE)
            file.write(b"decayed")
    expected_warnings.append("memory of the last owner is not used, dax0 starts empty")
    with open_again(tmp_path) as pool:
        space = pool.namespace("n")
        assert not space.read_into(keys, out).any()
        space.put(keys, data)
        assert space.read_into(keys, out).all()
