"""The catalog's extended attributes, raw files, many names, and the way from the former schema."""

import errno
import sqlite3
from pathlib import Path

import pytest

from kvfs.engine import catalog_file, catalog_schema
from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    ATTRIBUTE_BYTES_MAX,
    RAW_ATTRIBUTE,
    ROOT_NODE_ID,
    AttributesFullError,
    AttributeTooLargeError,
    NameTooLongError,
    NoAttributeError,
    Node,
    NodeKind,
    NodeState,
    Origin,
)
from kvfs.errors import ExistsError, NotFoundError, UsageError
from kvfs.keys import file_keys, new_uuid
from kvfs.layout import OPAQUE

SPACE = 0x1234


class Names:
    """A catalog in memory with one namespace."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:")
        self.catalog = Catalog.from_connection(self.connection)
        self.root = self.catalog.create_namespace(
            SPACE, "default", OPAQUE, "cache", 1, 0o755, 0, 0
        ).root_node_id

    def file(self, name: str, parent: int = 0, state: NodeState = NodeState.ACTIVE) -> Node:
        return self.catalog.create_context(
            parent or self.root, name, SPACE, Origin.FILE, state, 0o644, 1, 2, 3
        )

    def directory(self, name: str, parent: int = 0) -> Node:
        return self.catalog.make_directory(
            parent or self.root, name, mode=0o755, uid=1, gid=2, now_ns=3
        )

    def count(self, table: str) -> int:
        return int(self.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.fixture
def names() -> Names:
    return Names()


# --- attributes


def test_attributes_are_set_listed_and_removed(names: Names) -> None:
    catalog = names.catalog
    for node in (names.file("f"), names.directory("d"), catalog.node(names.root)):
        catalog.set_attribute(node.node_id, b"user.b", b"\0\xff", now_ns=50)
        catalog.set_attribute(node.node_id, b"user.a", b"", now_ns=51)
        catalog.set_attribute(node.node_id, b"user.b", b"again", now_ns=52)
        assert catalog.attribute(node.node_id, b"user.b") == b"again"
        assert catalog.attribute_names(node.node_id) == [b"user.a", b"user.b"]
        assert catalog.node(node.node_id).ctime_ns == 52
        assert catalog.node(node.node_id).mtime_ns == node.mtime_ns or node.is_directory
        catalog.remove_attribute(node.node_id, b"user.a", now_ns=53)
        with pytest.raises(NoAttributeError) as caught:
            catalog.attribute(node.node_id, b"user.a")
        assert caught.value.errno == errno.ENODATA
        with pytest.raises(NoAttributeError):
            catalog.remove_attribute(node.node_id, b"user.a", now_ns=54)
    assert catalog.check() == []


def test_attributes_have_limits(names: Names) -> None:
    catalog, node_id = names.catalog, names.file("f").node_id
    longest = b"user." + b"n" * 250
    catalog.set_attribute(node_id, longest, b"v" * ATTRIBUTE_BYTES_MAX, now_ns=1)
    catalog.remove_attribute(node_id, longest, now_ns=1)
    for name, nbytes, error, code in (
        (longest + b"n", 1, NameTooLongError, errno.ENAMETOOLONG),
        (b"user.x", ATTRIBUTE_BYTES_MAX + 1, AttributeTooLargeError, errno.E2BIG),
        (b"trusted.x", 1, UsageError, errno.EINVAL),
        (b"user.", 1, UsageError, errno.EINVAL),
    ):
        with pytest.raises(error) as caught:
            catalog.set_attribute(node_id, name, bytes(nbytes), now_ns=1)
        assert caught.value.errno == code
    catalog.set_attribute(node_id, b"user.one", bytes(ATTRIBUTE_BYTES_MAX // 2), now_ns=1)
    with pytest.raises(AttributesFullError) as full:
        catalog.set_attribute(node_id, b"user.two", bytes(ATTRIBUTE_BYTES_MAX // 2), now_ns=1)
    assert full.value.errno == errno.ENOSPC
    catalog.set_attribute(node_id, b"user.one", bytes(ATTRIBUTE_BYTES_MAX), now_ns=1)
    assert catalog.attribute_names(node_id) == [b"user.one"]


def test_attributes_can_be_made_or_replaced_only(names: Names) -> None:
    catalog, node_id = names.catalog, names.file("f").node_id
    with pytest.raises(NoAttributeError):
        catalog.set_attribute(node_id, b"user.x", b"1", now_ns=1, must_exist=True)
    catalog.set_attribute(node_id, b"user.x", b"1", now_ns=1, must_exist=False)
    with pytest.raises(ExistsError):
        catalog.set_attribute(node_id, b"user.x", b"2", now_ns=1, must_exist=False)
    catalog.set_attribute(node_id, b"user.x", b"3", now_ns=1, must_exist=True)
    assert catalog.attribute(node_id, b"user.x") == b"3"
    with pytest.raises(NotFoundError):
        catalog.set_attribute(12345, b"user.x", b"1", now_ns=1)


def test_attributes_follow_a_node_and_go_with_it(names: Names) -> None:
    catalog = names.catalog
    folder, kept, victim = names.directory("d"), names.file("kept"), names.file("victim")
    pending = names.file("pending", state=NodeState.PENDING)
    for node in (folder, kept, victim, pending):
        catalog.set_attribute(node.node_id, b"user.name", node.name.encode(), now_ns=1)
    catalog.rename(kept.node_id, folder.node_id, "moved", 5)
    catalog.rename(kept.node_id, names.root, "victim", 6)
    assert catalog.attribute(kept.node_id, b"user.name") == b"kept"
    assert catalog.attribute_names(victim.node_id) == []
    assert catalog.reap_pending() == 1
    catalog.remove(folder.node_id)
    assert names.count("attributes") == 1
    catalog.remove_nodes([kept.node_id])
    assert names.count("attributes") == 0
    catalog.set_attribute(names.file("f").node_id, b"user.x", b"1", now_ns=1)
    catalog.set_attribute(names.root, b"user.x", b"1", now_ns=1)
    catalog.drop_namespace(SPACE)
    assert names.count("attributes") == 0
    assert catalog.check() == []


def test_lost_attributes_are_found_by_the_check(names: Names) -> None:
    names.connection.execute("INSERT INTO attributes VALUES (77, x'757365722e61', x'00')")
    names.connection.execute("INSERT INTO attributes VALUES (1, x'61', x'00')")
    found = names.catalog.check()
    assert [problem.split(":")[0] for problem in found] == ["attribute", "attribute"]


# --- raw files


def test_the_mark_of_raw_files_is_inherited(names: Names) -> None:
    catalog = names.catalog
    outer = names.directory("outer")
    before = names.directory("before", outer.node_id)
    catalog.set_attribute(outer.node_id, RAW_ATTRIBUTE, b"1", now_ns=1)
    after = names.directory("after", outer.node_id)
    assert catalog.attribute_names(after.node_id) == [RAW_ATTRIBUTE]
    for parent, expected in ((outer, True), (after, True), (before, False)):
        assert catalog.wants_raw(names.file("f", parent.node_id)) is expected
    single = names.file("single")
    assert not catalog.wants_raw(single)
    catalog.set_attribute(single.node_id, RAW_ATTRIBUTE, b"1", now_ns=1)
    assert catalog.wants_raw(single)


def test_a_file_becomes_raw_and_loses_its_blocks(names: Names) -> None:
    catalog = names.catalog
    node = names.file("f", state=NodeState.PENDING)
    version = catalog.next_version(node.node_id)
    keys = file_keys(SPACE, node.node_id, version, 3)
    stride = OPAQUE.stride
    catalog.replace_content(
        node.node_id, keys, stride=stride, tail_bytes=5, version=version, now_ns=9
    )
    raw = catalog.become_raw(node.node_id, 1 << 40, mtime_ns=10, now_ns=11)
    assert raw == catalog.node(node.node_id)
    assert (raw.kind, raw.state, raw.size_bytes) == (NodeKind.RAW, NodeState.ACTIVE, 1 << 40)
    assert (raw.block_count, len(catalog.keys(node.node_id)), raw.mtime_ns) == (0, 0, 10)
    assert raw.is_raw
    assert not raw.is_directory
    assert catalog.raw_nodes() == catalog.raw_nodes(SPACE) == [node.node_id]
    assert catalog.raw_nodes(SPACE + 1) == []
    assert catalog.check() == []
    assert list(catalog.iter_file_contexts()) == []
    assert catalog.files_reaching(keys) == []
    names.connection.execute("UPDATE nodes SET size_bytes = -1 WHERE kind = 3")
    assert len(catalog.check()) == 1


def test_a_namespace_with_a_raw_file_at_the_root_is_not_empty(names: Names) -> None:
    node = names.file("f", ROOT_NODE_ID)
    names.catalog.become_raw(node.node_id, 5, mtime_ns=1, now_ns=1)
    with pytest.raises(ExistsError, match="files at the root"):
        names.catalog.remove(names.root)
    assert names.catalog.check() == []


def test_what_the_api_made_becomes_no_raw_file(names: Names) -> None:
    node = names.catalog.create_context(
        names.root, "c", SPACE, Origin.API, NodeState.ACTIVE, 0o644, 1, 2, 3
    )
    with pytest.raises(UsageError):
        names.catalog.become_raw(node.node_id, 5, mtime_ns=1, now_ns=1)


# --- the former schema


def make_former(path: Path) -> None:
    """Write a catalog of schema 1."""
    catalog = Catalog.create(path, new_uuid())
    catalog.create_namespace(SPACE, "default", OPAQUE, "cache", 1, 0o755, 0, 0)
    catalog.close()
    with sqlite3.connect(path) as raw:
        raw.execute("DROP TABLE attributes")
        raw.execute("PRAGMA user_version=1")
    raw.close()


def schema_of(path: Path) -> tuple[int, bool]:
    raw = sqlite3.connect(path)
    tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master")}
    version = raw.execute("PRAGMA user_version").fetchone()[0]
    raw.close()
    return version, "attributes" in tables


def test_a_catalog_of_the_former_schema_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    make_former(path)
    catalog = Catalog.open(path)
    assert catalog.check() == []
    assert catalog.namespace_by_name("default") is not None
    catalog.close()
    assert schema_of(path) == (1, False)  # only read
    for turn in range(2):
        catalog = Catalog.open(path)
        info = catalog.namespace_by_name("default")
        assert info is not None
        name = f"user.{turn}".encode()
        catalog.set_attribute(info.root_node_id, name, b"value", now_ns=1)
        assert len(catalog.attribute_names(info.root_node_id)) == turn + 1
        assert catalog.check() == []
        catalog.close()
    assert schema_of(path) == (2, True)


def test_an_upgrade_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "catalog"
    make_former(path)
    catalog = Catalog.open(path)
    with monkeypatch.context() as patch:
        broken = {1: (*catalog_schema.UPGRADES[1], "INSERT INTO nothing VALUES (1)")}
        patch.setattr(catalog_file, "UPGRADES", broken)
        with pytest.raises(sqlite3.OperationalError):
            catalog.reap_pending()
    catalog.close()
    assert schema_of(path) == (1, False)
    catalog = Catalog.open(path)
    catalog.reap_pending()
    catalog.close()
    assert schema_of(path) == (2, True)


# --- many names


def test_pages_of_a_large_directory_use_the_index(names: Names) -> None:
    """Each page costs what it holds, wherever it begins: 100,000 names."""
    catalog, count = names.catalog, 100_000
    with catalog.transaction():
        for number in range(count):
            names.file(f"{number * 7919 % count:06d}")
    steps = []
    names.connection.set_progress_handler(lambda: steps.append(1) and None, 100)
    found, after = 0, ""
    costs = []
    while page := catalog.children(names.root, after, 1000):
        assert [node.name for node in page] == [f"{i:06d}" for i in range(found, found + 1000)]
        found, after = found + len(page), page[-1].name
        costs.append(len(steps))
        steps.clear()
    names.connection.set_progress_handler(None, 0)
    assert found == count
    assert max(costs) <= 2 * min(costs)  # counted in steps of SQLite's machine, not in time
    plan = names.connection.execute(
        "EXPLAIN QUERY PLAN SELECT * FROM nodes WHERE parent_id = 1 AND name > x'00' "
        "ORDER BY name LIMIT 1000"
    ).fetchall()
    assert len(plan) == 1
    assert "USING INDEX nodes_by_name (parent_id=? AND name>?)" in plan[0][-1]
