"""A damaged catalog: replaced by an empty one that keeps the blocks, or destroyed with its pool."""

import shutil
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvfs
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import EPOCH_NODE_BITS
from kvfs.engine.checker import ActionKind, CheckReport, check_pool
from kvfs.engine.checker.salvage import salvage
from kvfs.errors import CorruptionError, RefusedError
from kvfs.lifecycle import create_pool, destroy_pool, open_pool
from kvfs.tree import Tree
from tests.unit.pool_bench import LAYOUT, blocks, read

DRAM = "dram:?size=64MiB&segment=16MiB"
PAGE = 4096


class Damaged:
    """A closed pool with files and blocks on two devices, to be damaged."""

    def __init__(self, root: Path) -> None:
        self.root, self.pool, self.catalog = root, root / "pool", root / "pool/catalog.sqlite"
        urls = [f"dir:{root}/{name}?size=64MiB&segment=16MiB" for name in ("one", "two")]
        self.content = blocks(6)
        with create_pool(self.pool, [DRAM, *urls], name="given") as pool:
            space = pool.namespace("s", LAYOUT)
            self.keys, parents = space.keys(np.arange(24))
            space.put(self.keys, self.content, parents=parents, durability="sync")
            space.context("c").append(self.keys, self.content)
            for name, nbytes in (("small", 5000), ("large", 9 << 20)):
                self.write(pool, name, b"a" * nbytes)
            self.uuid = pool.uuid
            self.rows = pool.catalog.devices()

    def write(self, pool: kvfs.Pool, name: str, content: bytes) -> int:
        node = Tree(pool).create_file(1, name, 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        pool.files.write(handle, 0, content)
        pool.files.close_write(handle)
        return node.node_id

    def overwrite(self, start: int, nbytes: int) -> None:
        with self.catalog.open("r+b") as file:
            file.seek(start)
            file.write(b"?" * nbytes)

    def replace(self) -> CheckReport:
        return check_pool(self.pool, repair=True, allow_name_loss=True)


@pytest.fixture
def damaged(tmp_path: Path) -> Damaged:
    return Damaged(tmp_path)


def head(pool: Damaged) -> None:
    pool.overwrite(0, 100)


def first_page(pool: Damaged) -> None:
    pool.overwrite(0, PAGE)


def contradiction(pool: Damaged) -> None:
    with sqlite3.connect(pool.catalog) as connection:
        connection.execute("UPDATE nodes SET parent_id = 4711 WHERE name = x'6c61726765'")
    connection.close()


@pytest.mark.parametrize("damage", [head, first_page, contradiction])
def test_replaced_catalog_keeps_the_blocks(
    damaged: Damaged, damage: Callable[[Damaged], None]
) -> None:
    damage(damaged)
    bad = damaged.catalog.read_bytes()
    report = damaged.replace()
    assert report.is_repaired
    assert [action.kind for action in report.plan] == [ActionKind.REPLACE_CATALOG]
    assert report.remaining[0].code == "names-lost"
    assert f"{damaged.catalog}.damaged" in report.remaining[0].message
    assert report.exit_code == 3
    assert Path(f"{damaged.catalog}.damaged").read_bytes() == bad
    with open_pool(damaged.pool) as pool:
        assert (pool.uuid, pool.name) == (damaged.uuid, "pool")
        assert pool.catalog.devices()[1:] == damaged.rows[1:]
        assert [(r.index, r.name, r.url) for r in pool.catalog.devices()[:1]] == [
            (r.index, r.name, r.url) for r in damaged.rows[:1]
        ]
        assert sorted(info.name for info in pool.namespaces()) == ["default", "s"]
        assert Tree(pool).lookup(1, "large") is None
        space = pool.namespace("s", LAYOUT)
        assert (read(space, damaged.keys, 6) == damaged.content).all()
    assert check_pool(damaged.pool, data=True).is_clean


def test_ids_are_not_given_again(damaged: Damaged) -> None:
    """A new file never takes the blocks of a lost one for its own."""
    first_page(damaged)
    damaged.replace()
    with open_pool(damaged.pool) as pool:
        nodes = [damaged.write(pool, name, b"b" * 5000) for name in ("small", "other")]
        assert min(nodes) >> EPOCH_NODE_BITS > 1024
        pool.sync()
        reader = pool.files.open_read(Tree(pool).node(nodes[0]))
        assert bytes(pool.files.read(reader, 0, 6000)) == b"b" * 5000
        pool.files.close_read(reader)
    first_page(damaged)
    damaged.replace()
    assert Path(f"{damaged.catalog}.damaged.2").exists()
    with open_pool(damaged.pool) as pool:
        assert damaged.write(pool, "small", b"c") >> EPOCH_NODE_BITS > 2 * 1024


def test_log_of_the_damaged_catalog_goes_with_it(damaged: Damaged) -> None:
    first_page(damaged)
    Path(f"{damaged.catalog}-wal").write_bytes(b"log")
    assert not check_pool(damaged.pool, repair=True).is_repaired
    assert Path(f"{damaged.catalog}-wal").exists()
    damaged.replace()
    assert Path(f"{damaged.catalog}.damaged-wal").read_bytes() == b"log"
    assert not Path(f"{damaged.catalog}-wal").exists()
    open_pool(damaged.pool).close()


def test_names_are_lost_only_where_that_is_allowed(damaged: Damaged) -> None:
    first_page(damaged)
    bad = damaged.catalog.read_bytes()
    report = check_pool(damaged.pool, repair=True)
    assert (report.exit_code, report.is_repaired, report.plan) == (14, False, [])
    assert "--allow-name-loss" in report.findings[0].remedy
    dry = check_pool(damaged.pool, allow_name_loss=True)
    assert [action.kind for action in dry.plan] == [ActionKind.REPLACE_CATALOG]
    assert dry.findings[0].is_repairable
    refused = check_pool(
        damaged.pool, repair=True, allow_name_loss=True, confirm=lambda report: False
    )
    assert not refused.is_repaired
    assert damaged.catalog.read_bytes() == bad
    assert list(damaged.pool.glob("*.damaged*")) == []


def test_sound_catalog_is_not_replaced(damaged: Damaged) -> None:
    assert damaged.replace().is_clean
    with open_pool(damaged.pool) as pool:
        assert Tree(pool).lookup(1, "large") is not None


def test_device_that_is_away_is_waited_for(damaged: Damaged) -> None:
    first_page(damaged)
    (damaged.root / "two").rename(damaged.root / "away")
    report = damaged.replace()
    assert (report.exit_code, report.is_repaired) == (14, False)
    assert "no superblock of this pool in dir:" in report.findings[0].remedy
    (damaged.root / "away").rename(damaged.root / "two")
    assert damaged.replace().is_repaired


def test_nothing_is_left_to_replace(damaged: Damaged) -> None:
    damaged.catalog.write_bytes(b"")
    report = damaged.replace()
    assert (report.exit_code, report.is_repaired) == (14, False)
    assert "pool destroy" in report.findings[0].remedy


def test_device_of_another_pool_is_not_taken(damaged: Damaged, tmp_path: Path) -> None:
    other = f"dir:{tmp_path}/two?size=64MiB&segment=16MiB"
    shutil.rmtree(tmp_path / "two")
    create_pool(tmp_path / "other", [other]).close()
    first_page(damaged)
    found = salvage(damaged.catalog)
    assert [row.name for row in found.rows] == ["dram0", "dir0"]
    with pytest.raises(CorruptionError, match="no superblock of this pool"):
        found.require_whole()
    destroy_pool(damaged.pool)
    open_pool(tmp_path / "other").close()


@pytest.mark.parametrize("damage", [head, first_page, contradiction])
def test_destroy(damaged: Damaged, damage: Callable[[Damaged], None]) -> None:
    damage(damaged)
    Path(f"{damaged.catalog}.damaged").touch()
    destroy_pool(damaged.pool)
    assert not damaged.pool.exists()
    assert [path for path in damaged.root.rglob("*") if path.is_file()] == []


def test_destroy_without_a_device_to_be_found(damaged: Damaged) -> None:
    """What owners left in the lock file says that this was a pool."""
    damaged.catalog.write_bytes(b"")
    destroy_pool(damaged.pool)
    assert not damaged.pool.exists()
    assert (damaged.root / "one" / "kvfs.superblock").exists()


def test_destroy_leaves_what_is_no_pool(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="not known for a pool"):
        destroy_pool(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["catalog.sqlite"]
    assert path.read_bytes() == before


def test_epoch_of_a_new_catalog(tmp_path: Path) -> None:
    catalog = Catalog.create(tmp_path / "c", uuid.UUID(int=1), epoch=7)
    assert catalog.statistics().epoch == 7
    assert catalog.check() == []
    catalog.close()
