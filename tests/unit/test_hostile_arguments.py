"""Arguments that can never work raise UsageError before anything is stored."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvfs.buffers import addresses_of
from kvfs.errors import ExistsError, UsageError
from kvfs.keys import as_key_array, as_u32_array, chain_keys
from kvfs.layout import OPAQUE
from kvfs.lifecycle import create_pool
from kvfs.namespace import Namespace
from kvfs.pool import Pool
from kvfs.tree import Tree
from tests.unit.small_pools import BLOCK, payloads, small_namespace, small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path) as made:
        yield made


@pytest.fixture
def namespace(pool: Pool) -> Namespace:
    return small_namespace(pool)


@pytest.mark.parametrize("counts", [[1], [1, 2, 3], [-1, 4], [4, 2**32], [4, 1.5], "ab", 4, [[4]]])
def test_token_counts(namespace: Namespace, counts: Any) -> None:
    keys = namespace.keys(range(8))[0]
    context = namespace.context("c")
    with pytest.raises(UsageError, match="token counts"):
        namespace.put(keys, payloads(2), token_counts=counts)
    with pytest.raises(UsageError, match="token counts"):
        context.append(keys, payloads(2), token_counts=counts)
    assert namespace.match_prefix(keys) == 0
    assert len(context.keys) == 0


@pytest.mark.parametrize(
    "tokens", [[-1, 2, 3, 4], [1, 2, 3, 2**32], np.array([1, 2, 3, -4]), "abcd"]
)
def test_token_ids(namespace: Namespace, tokens: Any) -> None:
    keys = namespace.keys(range(4))[0]
    with pytest.raises(UsageError, match="token ids"):
        namespace.keys(tokens)
    with pytest.raises(UsageError, match="tokens"):
        namespace.context("c").append(keys, payloads(1), tokens=tokens)
    assert namespace.match_prefix(keys) == 0


@pytest.mark.parametrize(
    "keys", [[1, 2], "abc", 7, None, np.full((1, 32), 300), np.full((1, 32), 0.5), ["a" * 32]]
)
def test_keys(namespace: Namespace, keys: Any) -> None:
    with pytest.raises(UsageError):
        as_key_array(keys)
    calls: list[Callable[[], object]] = [
        lambda: namespace.lookup(keys),
        lambda: namespace.match_prefix(keys),
        lambda: namespace.view(keys),
        lambda: namespace.put(keys, [bytes(BLOCK)]),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("parent", [b"", bytes(31), "a" * 32, None])
def test_parent(parent: Any) -> None:
    with pytest.raises(UsageError, match="32 bytes"):
        chain_keys(1, [1, 2], 4, parent)


@pytest.mark.parametrize("pair", [("a", 1), (None, 1), (-1, 1), (1.5, 2), (2**64, 1)])
def test_addresses(pair: Any) -> None:
    with pytest.raises(UsageError):
        addresses_of([pair], 1)


def test_numbers_that_fit() -> None:
    for given in ([0, 2**32 - 1], np.array([0, 2**32 - 1], np.int64), (0, 2**32 - 1)):
        found = as_u32_array(given, "x")
        assert found.dtype == np.uint32
        assert found.tolist() == [0, 2**32 - 1]
    assert as_u32_array([], "x").size == 0


@pytest.mark.parametrize("name", [5, None, b"c", b"", "", "/"])
def test_names_of_contexts(namespace: Namespace, name: Any) -> None:
    with pytest.raises(UsageError):
        namespace.context(name)


def test_names_and_layouts_of_namespaces(pool: Pool) -> None:
    names: list[Any] = [None, 5, b"n", "", "a/b"]
    for name in names:
        with pytest.raises(UsageError):
            pool.namespace(name, OPAQUE)
    layout: Any = {"dtype": "uint8"}
    with pytest.raises(UsageError, match="Layout"):
        pool.namespace("default", layout)
    with pytest.raises(UsageError, match="Layout"):
        pool.make_namespace("new", layout)


def test_retentions(pool: Pool) -> None:
    unknown: Any = "durabel"
    with pytest.raises(UsageError, match="retention"):
        pool.namespace("new", OPAQUE, retention=unknown)
    with pytest.raises(UsageError, match="retention"):
        pool.set_retention("default", unknown)
    with pytest.raises(ExistsError):
        pool.make_namespace("default", OPAQUE)
    state = pool.store.state
    assert [info.name for info in pool.namespaces()] == ["default"]
    assert len(state.namespaces) == len(state.indexes) == pool.statistics().namespaces == 1


@pytest.mark.parametrize("path", ["{0}/file", "{0}/file/below", "/proc/kvfs-none", "{0}/a\0b"])
def test_paths_that_cannot_be_directories(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    path = path.format(tmp_path)
    with pytest.raises(UsageError):
        create_pool(tmp_path / "made", [f"dir:{path}?size=64MiB&segment=16MiB"])
    with pytest.raises(UsageError):
        create_pool(path, [f"dir:{tmp_path}/device?size=64MiB&segment=16MiB"])
    assert not (tmp_path / "device").exists()


@pytest.mark.parametrize("order", [1, -1])
def test_a_device_inside_another(tmp_path: Path, order: int) -> None:
    places = [f"{tmp_path}/device", f"{tmp_path}/device/segments"][::order]
    with pytest.raises(UsageError, match="inside another"):
        create_pool(tmp_path / "pool", [f"dir:{p}?size=64MiB&segment=16MiB" for p in places])


@pytest.mark.parametrize("mtime_ns", [2**63, -(2**80)])
def test_times_beyond_what_is_kept(pool: Pool, mtime_ns: int) -> None:
    tree = Tree(pool)
    for close_first in (True, False):
        node = tree.create_file(1, f"f{close_first}", 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        if close_first:
            pool.files.close_write(handle)
        found = tree.set_attributes(node.node_id, mtime_ns=mtime_ns)
        assert abs(found.mtime_ns) == 2**63 - 1
        if not close_first:
            pool.files.close_write(handle)
        pool.sync()
        assert tree.node(node.node_id).mtime_ns == found.mtime_ns


def test_closing_a_file_of_a_dropped_namespace(pool: Pool, tmp_path: Path) -> None:
    namespace = small_namespace(pool, "gone")
    node = Tree(pool).create_file(namespace.info.root_node_id, "f", 0o644, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    pool.files.write(handle, 0, b"x" * 100)
    pool.drop_namespace("gone")
    pool.files.flush(handle)
    pool.files.close_write(handle)
    assert handle.writer.staged is None
    assert [name for _, _, names in os.walk(tmp_path) for name in names if "staging" in name] == []
