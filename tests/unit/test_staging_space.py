"""Files being written take the room they need from the cache, and no more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.errors import NoSpaceError, UnavailableError
from kvfs.files import WriteHandle
from kvfs.layout import OPAQUE
from kvfs.lifecycle import create_pool
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import payloads, small_namespace, small_pool

BLOCKS = 240  # of 64 KiB: one segment


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made


def fill(pool: Pool, count: int) -> Namespace:
    """Store chains of one segment each."""
    namespace = small_namespace(pool)
    for seed in range(count):
        keys, parents = namespace.keys([seed * 10_000 + i for i in range(4 * BLOCKS)])
        namespace.put(keys, payloads(BLOCKS, seed), parents=parents)
    pool.flush()
    return namespace


def open_new(pool: Pool) -> WriteHandle:
    node = Tree(pool).create_file(1, "f", 0o644, 0, 0)
    return pool.files.open_write(node, truncate=True)


def evicted(pool: Pool) -> int:
    return pool.statistics().counters["blocks_evicted"]


@pytest.mark.parametrize("offset", [1 << 40, 128 * MIB])
def test_a_write_that_can_never_fit_evicts_nothing(pool: Pool, offset: int) -> None:
    fill(pool, 6)
    handle = open_new(pool)
    with pytest.raises(NoSpaceError):
        pool.files.write(handle, offset, b"x")
    with pytest.raises(NoSpaceError):
        pool.files.truncate(handle, offset + 1)
    assert evicted(pool) == 0
    pool.files.close_write(handle)


def test_growth_that_can_never_fit_evicts_nothing(pool: Pool) -> None:
    handle = open_new(pool)
    pool.files.write(handle, 0, bytes(20 * MIB))
    fill(pool, 4)
    with pytest.raises(NoSpaceError):
        pool.files.write(handle, 127 * MIB, bytes(2 * MIB))
    assert evicted(pool) == 0
    pool.files.close_write(handle)


def test_a_hole_takes_the_room_it_counts(pool: Pool) -> None:
    fill(pool, 6)
    handle = open_new(pool)
    pool.files.write(handle, 90 * MIB, b"x")
    assert evicted(pool) > 0
    pool.files.close_write(handle)
    assert Tree(pool).lookup(1, "f") is not None


def test_overwriting_needs_no_room(pool: Pool) -> None:
    handle = open_new(pool)
    pool.files.write(handle, 0, bytes(20 * MIB))
    fill(pool, 5)
    before = evicted(pool)
    pool.files.write(handle, 0, bytes(20 * MIB))
    assert evicted(pool) == before
    pool.files.close_write(handle)


def append_mebibytes(namespace: Namespace, name: str, seed: int, count: int) -> None:
    keys = namespace.keys([seed * 1000 + i for i in range(count)])[0]
    namespace.context(name).append(keys, [bytes(MIB)] * count)


def test_adoption_makes_room_for_what_is_stored_beside_the_file(pool: Pool) -> None:
    cache = pool.namespace("cache", OPAQUE)
    for seed in range(20):
        append_mebibytes(cache, f"c{seed}", seed, 16)
    handle = open_new(pool)
    for start in range(0, 48 * MIB, MIB):
        pool.files.write(handle, start, bytes(MIB))
    pool.files.flush(handle)
    pool.files.close_write(handle)
    node = Tree(pool).lookup(1, "f")
    assert node is not None
    assert node.size_bytes == 48 * MIB


def test_files_leave_the_segment_that_relocation_needs(tmp_path: Path) -> None:
    """Half of each segment is garbage: it can be had only if there is room for the other half."""
    with small_pool(tmp_path, size="256MiB") as pool:
        kept = pool.namespace("kept", OPAQUE, retention="durable")
        for seed in range(15):
            append_mebibytes(kept, f"c{seed}", seed, 14)
        pool.flush()
        for seed in range(15):
            kept.context(f"c{seed}").drop()
            append_mebibytes(kept, f"c{seed}", seed, 7)
        handle = open_new(pool)
        for start in range(0, 31 * MIB, MIB):
            pool.files.write(handle, start, bytes(MIB))
        device = pool.store.state.devices[0]
        assert device.has_room_for_segment(keep_reserve=False)
        pool.files.close_write(handle)
        append_mebibytes(kept, "new", 99, 14)


def test_a_file_goes_to_the_device_that_has_room(tmp_path: Path) -> None:
    urls = [f"dir:{tmp_path}/{name}?size={size}&segment=16MiB" for name, size in
            (("full", "64MiB"), ("roomy", "128MiB"))]  # fmt: skip
    with create_pool(tmp_path / "pool", urls) as pool:
        kept = pool.namespace("kept", OPAQUE, retention="durable")
        for number in range(3):
            keys = kept.keys([number * 100 + i for i in range(14)])[0]
            kept.context(f"c{number}").append(keys, [bytes(MIB)] * 14, durability="sync")
        handle = open_new(pool)
        for start in range(0, 40 * MIB, MIB):
            pool.files.write(handle, start, bytes([start // MIB]) * MIB)
        pool.files.truncate(handle, 41 * MIB)
        pool.files.close_write(handle)
        node = Tree(pool).lookup(1, "f")
        assert node is not None
        reader = pool.files.open_read(node)
        for start in range(0, 40 * MIB, MIB):
            assert pool.files.read(reader, start, 1) == bytes([start // MIB])
        assert pool.files.read(reader, 40 * MIB, 1) == b"\0"
        pool.files.close_read(reader)
        assert not [*tmp_path.glob("*/staging/*")]


def test_files_are_not_silently_volatile(tmp_path: Path) -> None:
    with small_pool(tmp_path, dram=True) as pool:
        handle = open_new(pool)
        disk = next(d for d in pool.store.state.devices if d.info.is_persistent)
        disk.is_offline = True
        with pytest.raises(UnavailableError):
            pool.files.write(handle, 0, b"x")
        disk.is_offline = False
        pool.files.close_write(handle)
