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
    assert [table.add(table.hash_of(1, name)) for name in names[9_999:]] == [False] + [True] * 10**4
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
    assert not any(table.add(int(value)) for value in values)
    table.close()


class Installed:
    """What a filter told the core and the kernel."""

    def __init__(self) -> None:
        self.count = 0
        self.forgotten: list[tuple[int, bytes]] = []
        self.fail = False

    def install(self, table: NameTable) -> None:
        if self.fail:
            raise KvfsError("no")
        self.table = table
        self.count += 1

    def forget(self, parent: int, name: bytes) -> None:
        self.forgotten.append((parent, name))


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
    names = NameFilter(pool.catalog, told.install, told.forget, also=[(1, b".kvfs")])
    try:
        wait_until(lambda: told.count, "the filter is filled")
        assert all(has(told.table, root, b"old%d" % i) for i in range(100))
        assert has(told.table, 1, b".kvfs")
        assert has(told.table, 1, b"default")
        told.forgotten.clear()
        # Made elsewhere: in the filter, and what the kernel may remember is taken back.
        make(pool, root, "new")
        assert told.forgotten == [(root, b"new")]
        # Made through the mount: the kernel knows.
        names.add(root, b"mine")
        make(pool, root, "mine")
        node = pool.catalog.lookup(root, "mine")
        assert node is not None
        pool.catalog.rename(node.node_id, root, "yours", 1)
        assert told.forgotten == [(root, b"new"), (root, b"yours")]
        for name in (b"new", b"mine", b"yours"):
            assert has(told.table, root, name)
        assert not has(told.table, root, b"other")
    finally:
        names.close()
    make(pool, root, "after")


def test_filter_grows(pool: Pool) -> None:
    told = Installed()
    names = NameFilter(pool.catalog, told.install, told.forget)
    try:
        wait_until(lambda: told.count, "the filter is filled")
        root = pool.namespace("default").info.root_node_id
        writers = [
            threading.Thread(target=lambda n=n: [names.add(root, b"%d-%d" % (n, i)) for i in
                                                 range(12_000)])
            for n in range(3)
        ]  # fmt: skip
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
    names = NameFilter(pool.catalog, told.install, told.forget)
    wait_until(lambda: not names._tables, "the filter is given up")
    make(pool, pool.namespace("default").info.root_node_id, "x")
    names.close()
