"""The filter of names that may exist."""

import threading
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine.catalog_schema import Origin
from kvfs.errors import KvfsError
from kvfs.fuse.name_filter import NameFilter, NameTable
from kvfs.pool import Pool
from tests.fuse.mounting import wait_until


def has(table: NameTable, parent: int, name: bytes) -> bool:
    """Look a name up as the core does."""
    slots = np.frombuffer(table._map, np.uint64, table.slot_count, 64)
    value = table.hash_of(parent, name)
    position = value % table.slot_count
    while slots[position]:
        if slots[position] == value:
            return True
        position = (position + 1) % table.slot_count
    return False


def test_table_in_bulk_and_one_by_one() -> None:
    table = NameTable(1000, seed=5)
    names = [b"n%d" % i for i in range(20_000)]
    hashes = np.array([table.hash_of(1, name) for name in names[:10_000]], np.uint64)
    table.add_all(np.concatenate([hashes, hashes[:100]]))
    assert table.count == 10_000
    table.add_all(hashes)
    assert table.count == 10_000
    for name in names[9_999:]:
        table.add(table.hash_of(1, name))
    assert table.count == 20_000
    assert all(has(table, 1, name) for name in names)
    assert not any(has(table, 2, name) for name in names)
    head = bytes(table._map[:32])
    assert head == b"KVFSNAM1" + (1 << 16).to_bytes(8, "little") + bytes(8) + b"\5" + bytes(7)
    table.complete()
    assert table._map[16] == 1
    table.close()


def test_table_where_everything_collides() -> None:
    table = NameTable(10, seed=0)
    last = table.slot_count - 2
    values = np.uint64(last) + np.arange(500, dtype=np.uint64) * np.uint64(table.slot_count)
    table.add_all(values)
    assert table.count == 500
    for value in values:
        table.add(int(value))
    assert table.count == 500
    table.close()


class Installed:
    """What a filter told the core."""

    def __init__(self) -> None:
        self.count = 0
        self.fail = False

    def install(self, table: NameTable) -> None:
        if self.fail:
            raise KvfsError("no")
        self.table = table
        self.count += 1


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    with kvfs.create_pool(tmp_path / "pool", ["dram:?size=64MiB&segment=16MiB"]) as pool:
        yield pool


def make(pool: Pool, parent: int, name: str) -> None:
    pool.catalog.make_directory(parent, name, mode=0o755, uid=0, gid=0, now_ns=1, origin=Origin.API)


def test_filter_follows_the_catalog(pool: Pool) -> None:
    root = pool.namespace("default").info.root_node_id
    for i in range(100):
        make(pool, root, f"old{i}")
    told = Installed()
    names = NameFilter(pool.catalog, told.install, also=[(1, b".kvfs")])
    try:
        wait_until(lambda: told.count, "the filter is filled")
        assert all(has(told.table, root, b"old%d" % i) for i in range(100))
        assert has(told.table, 1, b".kvfs")
        assert has(told.table, 1, b"default")
        make(pool, root, "new")
        make(pool, root, "mine")
        node = pool.catalog.lookup(root, "mine")
        assert node is not None
        pool.catalog.rename(node.node_id, root, "yours", 1)
        for name in (b"new", b"mine", b"yours"):
            assert has(told.table, root, name)
        assert not has(told.table, root, b"other")
    finally:
        names.close()
    make(pool, root, "after")


def test_filter_grows(pool: Pool) -> None:
    told = Installed()
    names = NameFilter(pool.catalog, told.install)
    try:
        wait_until(lambda: told.count, "the filter is filled")
        root = pool.namespace("default").info.root_node_id
        assert pool.catalog.on_name is not None
        hook = pool.catalog.on_name

        def write(number: int) -> None:
            for i in range(12_000):
                hook(root, b"%d-%d" % (number, i))

        writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        make(pool, root, "x")
        wait_until(lambda: told.count >= 2, "the filter is made anew")
        assert has(told.table, root, b"x")
    finally:
        names.close()


def test_filter_that_cannot_be_installed(pool: Pool, expected_warnings: list[str]) -> None:
    expected_warnings.append("lookups are slower")
    told = Installed()
    told.fail = True
    names = NameFilter(pool.catalog, told.install)
    wait_until(lambda: not names._tables, "the filter is given up")
    make(pool, pool.namespace("default").info.root_node_id, "x")
    names.close()
