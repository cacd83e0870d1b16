"""Devices, namespaces, eviction's questions and the check of the catalog."""

import sqlite3

import numpy as np
import pytest

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    ROOT_NODE_ID,
    DeviceRow,
    NamespaceInfo,
    Node,
    NodeState,
    Origin,
)
from kvfs.errors import CorruptionError, ExistsError, NotFoundError, UsageError
from kvfs.keys import KeyArray, file_keys
from kvfs.layout import OPAQUE, Layout

NS = 0x1234
LAYOUT = Layout("bfloat16", (2, 4), 16, "token,layer", "0/1", "model")


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog.from_connection(sqlite3.connect(":memory:"))
    made.create_namespace(NS, "default", OPAQUE, "cache", 5, 0o755, 1, 2)
    return made


def add(catalog: Catalog, name: str, blocks: int = 0, origin: Origin = Origin.FILE) -> Node:
    node = catalog.create_context(ROOT_NODE_ID, name, NS, origin, NodeState.PENDING, 0o644, 0, 0, 2)
    version = catalog.next_version(node.node_id)
    return catalog.replace_content(
        node.node_id, file_keys(NS, node.node_id, version, blocks), stride=4096,
        tail_bytes=min(blocks, 1) * 7, version=version, now_ns=3,
    )  # fmt: skip


def raw(catalog: Catalog, sql: str) -> None:
    catalog._connection.execute(sql)


def test_facts(catalog: Catalog) -> None:
    assert catalog.meta("name") is None
    catalog.set_meta("name", "kv0")
    catalog.set_meta("name", "kv1")
    assert catalog.meta("name") == "kv1"


def test_devices(catalog: Catalog) -> None:
    rows = [
        DeviceRow(index, bytes([index]) * 16, f"ssd{index}", f"dir:/mnt/{index}", 2, "online")
        for index in (1, 0)
    ]
    for row in rows:
        catalog.add_device(row)
    assert catalog.devices() == rows[::-1]
    for clash in (
        DeviceRow(1, b"n" * 16, "new", "", 0, ""),
        DeviceRow(9, rows[0].uuid, "new", "", 0, ""),
        DeviceRow(9, b"n" * 16, "ssd0", "", 0, ""),
    ):
        with pytest.raises(ExistsError, match="device is taken"):
            catalog.add_device(clash)
    catalog.set_device_state(1, "offline")
    assert [row.state for row in catalog.devices()] == ["online", "offline"]
    with pytest.raises(NotFoundError, match="no such device: 7"):
        catalog.set_device_state(7, "online")


def test_namespaces(catalog: Catalog) -> None:
    made = catalog.create_namespace(99, "llama", LAYOUT, "durable", 6, 0o700, 3, 4)
    assert made == NamespaceInfo(
        99, "llama", LAYOUT, LAYOUT.fingerprint(), "durable", made.root_node_id, 6
    )
    root = catalog.node(made.root_node_id)
    assert (root.name, root.parent_id, root.mode, root.uid) == ("llama", ROOT_NODE_ID, 0o700, 3)
    assert catalog.namespace_by_name("llama") == catalog.namespace(99) == made
    assert catalog.namespace_by_name("nothing") is None
    assert [info.name for info in catalog.namespaces()] == ["default", "llama"]
    catalog.set_retention(99, "cache")
    assert catalog.namespace(99).retention == "cache"
    for namespace_id, name in ((99, "new"), (100, "llama")):
        with pytest.raises(ExistsError):
            catalog.create_namespace(namespace_id, name, OPAQUE, "cache", 6, 0o700, 3, 4)
    with pytest.raises(UsageError):
        catalog.create_namespace(100, "a/b", OPAQUE, "cache", 6, 0o700, 3, 4)
    for use in (
        lambda: catalog.namespace(100),
        lambda: catalog.set_retention(100, "cache"),
        lambda: catalog.drop_namespace(100),
    ):
        with pytest.raises(NotFoundError, match="no such namespace: 0x64"):
            use()
    assert catalog.check() == []


def test_drop_namespace_takes_everything_and_nothing_else(catalog: Catalog) -> None:
    other = catalog.create_namespace(99, "other", OPAQUE, "cache", 6, 0o700, 3, 4)
    directory = catalog.make_directory(
        other.root_node_id, "d", mode=0o755, uid=0, gid=0, now_ns=1
    ).node_id
    kept = catalog.create_context(
        directory, "x", 99, Origin.API, NodeState.ACTIVE, 0o644, 0, 0, 2
    ).node_id
    catalog.append_blocks(
        kept, np.ones((3, 32), np.uint8), block_bytes=1, stride=4096, tail_bytes=1, now_ns=1
    )
    add(catalog, "at-the-root", 700)
    catalog.drop_namespace(NS)
    assert [node.name for node in catalog.children(ROOT_NODE_ID)] == ["other"]
    assert len(catalog.keys(kept)) == 3
    assert catalog.check() == []


def test_dropped_tokens_are_overwritten(catalog: Catalog) -> None:
    node = add(catalog, "secret", origin=Origin.API).node_id
    tokens = np.random.default_rng(0).integers(0, 1 << 31, 8192)
    catalog.append_blocks(
        node, np.ones((1, 32), np.uint8), block_bytes=1, stride=4096, tail_bytes=1,
        token_counts=[8192], tokens=tokens, now_ns=1,
    )  # fmt: skip
    blob = catalog._connection.execute("SELECT tokens FROM context_rows").fetchone()[0]
    traces = [blob[start : start + 64] for start in range(0, len(blob), 1000)]
    image = catalog._connection.serialize()
    assert any(trace in image for trace in traces)
    catalog.drop_namespace(NS)
    image = catalog._connection.serialize()
    assert not any(trace in image for trace in traces)


def test_file_nodes_tells_files_from_the_rest(catalog: Catalog) -> None:
    files = [add(catalog, f"f{index}").node_id for index in range(3)]
    api = add(catalog, "api", origin=Origin.API).node_id
    pending = catalog.create_context(
        ROOT_NODE_ID, "new", NS, Origin.FILE, NodeState.PENDING, 0o644, 0, 0, 2
    ).node_id
    many = list(range(5000, 7000))
    assert catalog.file_nodes([*many, api, pending, ROOT_NODE_ID, *files[::-1], files[0]]) == files
    assert catalog.file_nodes([]) == []


def test_files_reaching_knows_versions(catalog: Catalog) -> None:
    first, second = add(catalog, "a", 3), add(catalog, "b", 700)
    old = catalog.keys(first.node_id)
    catalog.replace_content(
        first.node_id, file_keys(NS, first.node_id, first.version + 1, 3), stride=4096,
        tail_bytes=1, now_ns=4,
    )  # fmt: skip
    lost = np.vstack([old, catalog.keys(second.node_id, 690)])
    assert catalog.files_reaching(lost) == [second.node_id]
    assert catalog.files_reaching(old[:0]) == []


def test_remove_nodes_returns_what_was_there(catalog: Catalog) -> None:
    nodes = [add(catalog, f"f{index}", index) for index in range(3)]
    ids = [node.node_id for node in nodes]
    keys = [catalog.keys(id_).tobytes() for id_ in ids]
    root = catalog.namespace(NS).root_node_id
    removed = catalog.remove_nodes([ids[0], 12345, ids[2], ids[0], root, ROOT_NODE_ID])
    assert [node for node, _ in removed] == [nodes[0], nodes[2]]
    assert [found.tobytes() for _, found in removed] == [keys[0], keys[2]]
    assert [node.name for node in catalog.children(ROOT_NODE_ID)] == ["default", "f1"]
    assert catalog.check() == []


def test_iterators_see_everything_in_batches(catalog: Catalog) -> None:
    sizes = [0, 1, 511, 512, 513, 1, 0, 0, 1100]
    nodes = [add(catalog, f"f{index}", size) for index, size in enumerate(sizes)]
    api = add(catalog, "api", 5, Origin.API)
    other = catalog.create_namespace(99, "other", OPAQUE, "cache", 6, 0o700, 3, 4)
    assert other.name == "other"
    for batch in (1, 2, 3, len(sizes), 100):
        found = list(catalog.iter_file_contexts(batch))
        assert [node for node, _ in found] == nodes
        assert all(
            (keys == catalog.keys(node.node_id)).all() and len(keys) == node.block_count
            for node, keys in found
        )
        joined = b"".join(keys.tobytes() for keys in catalog.durable_keys(NS, batch))
        expected: list[KeyArray] = [catalog.keys(node.node_id) for node in [*nodes, api]]
        assert joined == b"".join(keys.tobytes() for keys in expected)
    assert list(catalog.durable_keys(99)) == []


def test_an_iterator_bears_changes_in_between(catalog: Catalog) -> None:
    nodes = [add(catalog, f"f{index}", 1).node_id for index in range(6)]
    seen = []
    for node, _ in catalog.iter_file_contexts(2):
        seen.append(node.node_id)
        catalog.remove_nodes([nodes[1], nodes[4]])
    assert set(seen) >= {nodes[0], nodes[2], nodes[3], nodes[5]}


def test_pins_and_pending(catalog: Catalog) -> None:
    node = add(catalog, "a", 2)
    catalog.set_pinned(node.node_id, True)
    assert [found.node_id for found in catalog.pinned_contexts()] == [node.node_id]
    assert catalog.node(node.node_id).is_pinned
    catalog.set_pinned(node.node_id, False)
    assert catalog.pinned_contexts() == []
    for index in range(3):
        catalog.create_context(
            ROOT_NODE_ID, f"new{index}", NS, Origin.FILE, NodeState.PENDING, 0o644, 0, 0, 2
        )
    assert catalog.statistics().pending_count == 3
    assert catalog.reap_pending() == 3
    assert catalog.reap_pending() == 0
    assert [found.name for found in catalog.children(ROOT_NODE_ID)] == ["a", "default"]


def test_nodes_are_counted_once(catalog: Catalog) -> None:
    def counted() -> int:
        return int(catalog._read("SELECT count(*) FROM nodes")[0][0])

    assert catalog.node_count == counted()
    nodes = [add(catalog, name, 2) for name in "abc"]
    assert catalog.node_count == counted() == 5
    statements: list[str] = []
    catalog._connection.set_trace_callback(statements.append)
    assert catalog.node_count == 5
    assert not statements
    catalog._connection.set_trace_callback(None)
    with catalog.transaction():
        catalog.remove(nodes[0].node_id, 3)
    assert catalog.node_count == counted() == 4

    def fail() -> None:
        with catalog.transaction():
            catalog.remove(nodes[1].node_id, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert catalog.node_count == counted() == 4


def test_statistics(catalog: Catalog) -> None:
    add(catalog, "a", 2)
    found = catalog.statistics()
    assert (found.node_count, found.context_count, found.namespace_count) == (3, 1, 1)
    assert found.database_bytes == len(catalog._connection.serialize())
    assert (found.wal_bytes, found.epoch, found.is_poisoned) == (0, 1, False)


@pytest.mark.parametrize(
    ("sql", "finding"),
    [
        ("UPDATE nodes SET kind = 2 WHERE node_id = 1", "root: expected one directory"),
        ("DELETE FROM nodes WHERE node_id = 1", "root: expected one directory"),
        ("UPDATE nodes SET parent_id = 999 WHERE name = x'61'", "node parent: expected a dir"),
        ("UPDATE nodes SET parent_id = node_id WHERE name = x'64'", "node reach: expected a path"),
        ("UPDATE nodes SET state = 3 WHERE name = x'61'", "node enums: expected known"),
        ("UPDATE nodes SET namespace_id = 5 WHERE name = x'65'", "namespace: expected an existing"),
        ("UPDATE nodes SET namespace_id = 99 WHERE name = x'65'", "expected that of its directory"),
        ("UPDATE nodes SET parent_id = 1 WHERE name = x'64'", "at the root: expected a namespace"),
        ("UPDATE nodes SET namespace_id = 99 WHERE name = x'61'", "expected namespace 'default'"),
        ("UPDATE nodes SET name = x'7878' WHERE name = x'64656661756c74'", "namespace 'default'"),
        ("UPDATE namespaces SET root_node_id = 77 WHERE namespace_id = 99", "one below the root"),
        ("UPDATE nodes SET size_bytes = size_bytes + 1 WHERE name = x'61'", "context size: exp"),
        ("UPDATE nodes SET version = 5 WHERE name = x'61'", "context row: expected a context of"),
        (
            "UPDATE context_rows SET keys = substr(keys, 33) WHERE row_index = 0",
            "expected 512 keys",
        ),
        ("UPDATE context_rows SET row_index = 5 WHERE row_index = 1", "in rows without gaps"),
        ("DELETE FROM context_rows WHERE row_index = 1", "context rows: expected all blocks"),
        ("UPDATE context_rows SET token_count = 9", "context tokens: expected the sum"),
        ("UPDATE context_rows SET tokens = x'00'", "context tokens: node"),
        ("UPDATE meta SET value = '0' WHERE key = 'epoch'", "ids: expected none above"),
        ("UPDATE nodes SET name = x'612f62' WHERE name = x'61'", "node name: "),
        ("UPDATE namespaces SET fingerprint = x'00' WHERE namespace_id = 99", "fingerprint: 0x63"),
        ("UPDATE namespaces SET layout = '{' WHERE namespace_id = 99", "namespace layout: 0x63"),
    ],
)
def test_check_finds_what_is_broken(catalog: Catalog, sql: str, finding: str) -> None:
    add(catalog, "a", 700)
    root = catalog.namespace(NS).root_node_id
    directory = catalog.make_directory(root, "d", mode=0o755, uid=0, gid=0, now_ns=1).node_id
    catalog.make_directory(directory, "e", mode=0o755, uid=0, gid=0, now_ns=1)
    catalog.create_namespace(99, "other", OPAQUE, "cache", 6, 0o700, 3, 4)
    assert catalog.check() == []
    raw(catalog, sql)
    problems = catalog.check()
    assert [problem for problem in problems if finding in problem], problems


def test_check_finds_damage_of_the_database_itself(catalog: Catalog) -> None:
    add(catalog, "a", 700)
    raw(catalog, "PRAGMA writable_schema=ON")
    raw(catalog, "DELETE FROM sqlite_master WHERE name = 'nodes_by_namespace'")
    copy = sqlite3.connect(":memory:")
    copy.deserialize(catalog._connection.serialize())
    problems = Catalog.from_connection(copy).check()
    assert problems
    assert all(problem.startswith("database: ") for problem in problems)


def test_unreadable_values_are_corruption(catalog: Catalog) -> None:
    node = add(catalog, "a").node_id
    raw(catalog, "UPDATE nodes SET kind = 7 WHERE name = x'61'")
    with pytest.raises(CorruptionError, match="found kind 7"):
        catalog.node(node)
    raw(catalog, "UPDATE namespaces SET layout = '[]'")
    with pytest.raises(CorruptionError, match="layout not understood"):
        catalog.namespaces()
    raw(catalog, "UPDATE nodes SET parent_id = node_id WHERE name = x'64656661756c74'")
    with pytest.raises(CorruptionError, match="has a cycle"):
        catalog.path_of(2**32 + 1)
