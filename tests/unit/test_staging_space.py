"""Files being written take the room they need from the cache, and no more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.errors import NoSpaceError
from kvfs.files import WriteHandle
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
