"""Content of contexts: versions, refusals and damage, beyond what the state machine walks."""

import contextlib
import sqlite3

import numpy as np
import pytest

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    EPOCH_VERSION_BITS,
    ROOT_NODE_ID,
    ROW_KEYS,
    Node,
    NodeState,
    Origin,
)
from kvfs.errors import CorruptionError, UsageError
from kvfs.keys import KeyArray
from kvfs.layout import OPAQUE

NS = 0x1234
FULL = {"block_bytes": 5000, "stride": 8192}


def some_keys(count: int, seed: int = 0) -> KeyArray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


@pytest.fixture
def catalog() -> Catalog:
    made = Catalog.from_connection(sqlite3.connect(":memory:"))
    made.create_namespace(NS, "default", OPAQUE, "cache", 1, 0o755, 0, 0)
    return made


def add(catalog: Catalog, name: str = "x", state: NodeState = NodeState.ACTIVE) -> Node:
    return catalog.create_context(ROOT_NODE_ID, name, NS, Origin.FILE, state, 0o644, 0, 0, 2)


def damage(catalog: Catalog, sql: str) -> None:
    catalog._connection.execute(sql)


def test_an_empty_context(catalog: Catalog) -> None:
    node = add(catalog)
    assert catalog.keys(node.node_id).shape == (0, 32)
    tokens = catalog.tokens(node.node_id)
    assert tokens is not None
    assert tokens.shape == (0,)


def test_append_counts_bytes_and_tokens(catalog: Catalog) -> None:
    node, keys = add(catalog), some_keys(ROW_KEYS + 1)
    counts = [16] * ROW_KEYS + [3]
    found = catalog.append_blocks(
        node.node_id, keys, tail_bytes=937, token_counts=counts, now_ns=9, **FULL
    )
    assert found == catalog.node(node.node_id)
    assert found.size_bytes == ROW_KEYS * 8192 + 937
    assert (found.block_count, found.tail_bytes) == (ROW_KEYS + 1, 937)
    assert (found.token_count, found.tail_tokens) == (sum(counts), 3)
    assert (found.mtime_ns, found.ctime_ns, found.version) == (9, 9, 0)
    assert catalog.tokens(node.node_id) is None


def test_ranges_of_keys(catalog: Catalog) -> None:
    node, keys = add(catalog), some_keys(1300)
    catalog.append_blocks(node.node_id, keys, tail_bytes=5000, now_ns=1, **FULL)
    for start, stop in ((0, None), (0, 1), (511, 513), (512, 1024), (1023, 1300), (1299, 9999)):
        assert (catalog.keys(node.node_id, start, stop) == keys[start:stop]).all()
    for start, stop in ((5, 5), (6, 5), (1300, None), (-1, 5)):
        assert catalog.keys(node.node_id, start, stop).shape == (0, 32)
    assert not catalog.keys(node.node_id).flags.writeable


def test_append_behind_a_partial_block_is_refused(catalog: Catalog) -> None:
    node, keys = add(catalog).node_id, some_keys(3)
    with pytest.raises(UsageError, match="no tail to replace"):
        catalog.append_blocks(node, keys, tail_bytes=5, replace_tail=True, now_ns=1, **FULL)
    catalog.append_blocks(node, keys[:2], tail_bytes=5, now_ns=1, **FULL)
    with pytest.raises(UsageError, match=r"partial block: .* expected 5000 bytes, found 5"):
        catalog.append_blocks(node, keys[2:], tail_bytes=5, now_ns=1, **FULL)
    catalog.append_blocks(node, keys[2:], tail_bytes=5000, replace_tail=True, now_ns=1, **FULL)
    assert (catalog.keys(node) == keys[[0, 2]]).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": some_keys(0)},
        {"tail_bytes": 0},
        {"tail_bytes": 5001},
        {"stride": 4999},
        {"token_counts": [1]},
        {"token_counts": [1, -1]},
        {"tokens": [1, 2]},
        {"token_counts": [1, 1], "tokens": [1, 2, 3]},
        {"keys": np.zeros((2, 31), np.uint8)},
    ],
)
def test_arguments_that_do_not_fit_change_nothing(catalog: Catalog, wrong: dict) -> None:
    node = add(catalog)
    arguments = {"keys": some_keys(2), "tail_bytes": 5, "now_ns": 7, **FULL, **wrong}
    with pytest.raises(UsageError):
        catalog.append_blocks(node.node_id, **arguments)
    assert catalog.node(node.node_id) == node


def test_truncate_refuses_what_cannot_be(catalog: Catalog) -> None:
    node = add(catalog)
    before = catalog.append_blocks(
        node.node_id, some_keys(600), tail_bytes=5000, token_counts=[2] * 600, now_ns=1, **FULL
    )
    for count, tail_bytes, tokens, tail_tokens in (
        (601, 5000, 1200, 2),
        (3, 0, 6, 2),
        (0, 5, 0, 0),
        (512, 5000, 1025, 2),
        (513, 5000, 1023, 2),
        (513, 5000, 1300, 2),
        (5, 5000, 1, 2),
    ):
        with pytest.raises(UsageError):
            catalog.truncate_blocks(
                node.node_id, count, stride=8192, tail_bytes=tail_bytes, token_count=tokens,
                tail_tokens=tail_tokens, now_ns=2,
            )  # fmt: skip
    assert catalog.node(node.node_id) == before
    cut = catalog.truncate_blocks(
        node.node_id, 513, stride=8192, tail_bytes=5000, token_count=1026, tail_tokens=2, now_ns=2
    )
    assert (cut.size_bytes, cut.block_count) == (512 * 8192 + 5000, 513)
    empty = catalog.truncate_blocks(node.node_id, 0, stride=8192, tail_bytes=0, now_ns=3)
    assert (empty.size_bytes, empty.token_count, empty.mtime_ns) == (0, 0, 3)
    assert catalog.check() == []


def test_replace_publishes_a_pending_file(catalog: Catalog) -> None:
    node = add(catalog, state=NodeState.PENDING)
    with pytest.raises(UsageError, match="not adopted yet"):
        catalog.append_blocks(node.node_id, some_keys(1), tail_bytes=5, now_ns=1, **FULL)
    version, keys = catalog.next_version(node.node_id), some_keys(700)
    found = catalog.replace_content(
        node.node_id, keys, stride=8192, tail_bytes=8192, version=version, now_ns=4
    )
    assert (found.state, found.version, found.size_bytes) == (NodeState.ACTIVE, version, 700 * 8192)
    again = catalog.replace_content(
        node.node_id, keys[:2], stride=8192, tail_bytes=1, token_counts=[1, 2], tokens=[7, 8, 9],
        now_ns=5,
    )  # fmt: skip
    assert again.version > version
    assert (catalog.keys(node.node_id) == keys[:2]).all()
    tokens = catalog.tokens(node.node_id)
    assert tokens is not None
    assert list(tokens) == [7, 8, 9]
    with pytest.raises(UsageError, match="content is out of date"):
        catalog.replace_content(
            node.node_id, keys, stride=8192, tail_bytes=1, version=version, now_ns=6
        )
    assert catalog.node(node.node_id) == again
    empty = catalog.replace_content(node.node_id, keys[:0], stride=8192, tail_bytes=0, now_ns=7)
    assert (empty.size_bytes, empty.block_count, empty.state) == (0, 0, NodeState.ACTIVE)
    assert catalog.check() == []


def test_a_version_is_given_once(catalog: Catalog) -> None:
    node = add(catalog).node_id
    given = [catalog.next_version(node) for _ in range(3)]
    assert given == [(1 << EPOCH_VERSION_BITS) + index for index in range(3)]
    with contextlib.suppress(ZeroDivisionError), catalog.transaction():
        catalog.replace_content(
            node, some_keys(1), stride=8192, tail_bytes=1, version=given[2], now_ns=1
        )
        raise ZeroDivisionError
    assert catalog.next_version(node) == given[2] + 1
    catalog.replace_content(
        node, some_keys(1), stride=8192, tail_bytes=1, version=given[1], now_ns=1
    )
    assert catalog.next_version(node) == given[2] + 2
    catalog.replace_content(node, some_keys(1), stride=8192, tail_bytes=1, now_ns=1)
    assert catalog.next_version(node) == given[2] + 4


def test_a_version_lost_in_a_crash_is_not_given_again() -> None:
    images: list[bytes] = []
    connection = sqlite3.connect(":memory:")
    catalog = Catalog.from_connection(
        connection, on_commit=lambda: images.append(connection.serialize())
    )
    catalog.create_namespace(NS, "default", OPAQUE, "cache", 1, 0o755, 0, 0)
    node = add(catalog).node_id
    image = images[-1]
    given = {catalog.next_version(node) for _ in range(3)}
    copy = sqlite3.connect(":memory:")
    copy.deserialize(image)
    assert Catalog.from_connection(copy).next_version(node) not in given


def test_a_worn_epoch_is_followed_by_a_new_one(catalog: Catalog) -> None:
    node = add(catalog).node_id
    given = [catalog.next_version(node) for _ in range(1 << EPOCH_VERSION_BITS)]
    assert len(set(given)) == len(given)
    assert given == sorted(given)
    assert max(given) < (catalog.statistics().epoch + 1) << EPOCH_VERSION_BITS
    assert catalog.statistics().epoch > 1


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE context_rows SET keys = substr(keys, 1, 40) WHERE row_index = 1",
        "DELETE FROM context_rows WHERE row_index = 0",
        "UPDATE nodes SET version = version + 1 WHERE kind = 2",
    ],
)
def test_damaged_keys_are_noticed(catalog: Catalog, sql: str) -> None:
    node = add(catalog).node_id
    catalog.append_blocks(node, some_keys(600), tail_bytes=5000, now_ns=1, **FULL)
    damage(catalog, sql)
    with pytest.raises(CorruptionError, match="does not hold what it says"):
        catalog.keys(node)
    with pytest.raises(CorruptionError):
        list(catalog.iter_file_contexts())
    assert catalog.check() != []


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE context_rows SET tokens = x'00'",
        "UPDATE context_rows SET tokens = substr(tokens, 1, length(tokens) - 1)",
        "UPDATE context_rows SET token_count = token_count + 1",
        "UPDATE nodes SET token_count = token_count + 1 WHERE kind = 2",
    ],
)
def test_damaged_tokens_are_noticed(catalog: Catalog, sql: str) -> None:
    node = add(catalog).node_id
    catalog.append_blocks(
        node, some_keys(2), tail_bytes=5000, token_counts=[3, 3], tokens=range(6), now_ns=1, **FULL
    )
    damage(catalog, sql)
    with pytest.raises(CorruptionError, match="does not hold what it says"):
        catalog.tokens(node)
    assert catalog.check() != []
