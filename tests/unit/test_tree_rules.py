"""What the tree promises besides names: attributes, namespaces that keep apart, retention."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.engine.catalog_schema import CrossNamespaceError, NoAttributeError, Node
from kvfs.errors import NoSpaceError
from kvfs.pool import Pool
from kvfs.tree import Tree
from kvfs.units import MIB
from tests.unit.small_pools import small_pool


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with small_pool(tmp_path, size="128MiB") as made:
        yield made


def write(pool: Pool, parent: int, name: str, data: bytes) -> Node:
    node = Tree(pool).create_file(parent, name, 0o644, 0, 0)
    handle = pool.files.open_write(node, truncate=True)
    try:
        for start in range(0, len(data), MIB):
            pool.files.write(handle, start, data[start : start + MIB])
        pool.files.flush(handle)
    finally:
        pool.files.close_write(handle)
    return node


def names(pool: Pool, parent: int) -> list[str]:
    return [node.name for node in Tree(pool).children(parent, "")]


def content_of(pool: Pool, node: Node) -> bytes:
    reader = pool.files.open_read(node)
    try:
        return bytes(pool.files.read(reader, 0, 1 << 30))
    finally:
        pool.files.close_read(reader)


# --- namespaces


@pytest.mark.parametrize("kind", ["file", "unpublished", "written", "directory", "root file"])
def test_a_name_never_leaves_its_namespace(pool: Pool, kind: str) -> None:
    """EXDEV, before anything changes: mv(1) then copies."""
    tree = Tree(pool)
    one, two = (tree.make_directory(1, name, 0o755, 0, 0).node_id for name in ("one", "two"))
    write(pool, two, "target", b"target")
    pool.sync()
    parent, handle = (1 if kind == "root file" else one), None
    if kind == "directory":
        tree.make_directory(one, "source", 0o755, 0, 0)
    elif kind == "written":
        node = tree.create_file(one, "source", 0o644, 0, 0)
        handle = pool.files.open_write(node, truncate=True)
        pool.files.write(handle, 0, b"being written")
    else:
        write(pool, parent, "source", b"source")
        if kind != "unpublished":
            pool.sync()
    was_unpublished = pool.files.has_unpublished
    for new_parent in (two, one if parent == 1 else 1):
        for name in ("target", "new"):
            with pytest.raises(CrossNamespaceError) as caught:
                tree.rename(parent, "source", new_parent, name, replace=True)
            assert caught.value.errno == errno.EXDEV
    assert pool.files.has_unpublished == was_unpublished
    if handle is not None:
        assert handle.writer.is_dirty, "it was not adopted for a rename that cannot be"
        pool.files.close_write(handle)
    assert "source" in names(pool, parent)
    assert names(pool, two) == ["target"]
    target = tree.lookup(two, "target")
    assert target is not None
    assert content_of(pool, target) == b"target"


def test_a_namespace_cannot_become_a_directory(pool: Pool) -> None:
    tree = Tree(pool)
    one, two = (tree.make_directory(1, name, 0o755, 0, 0) for name in ("one", "two"))
    tree.make_directory(one.node_id, "inner", 0o755, 0, 0)
    for parent, name, new_parent in ((1, "one", two.node_id), (one.node_id, "inner", 1)):
        with pytest.raises(CrossNamespaceError):
            tree.rename(parent, name, new_parent, "x", replace=True)


# --- attributes


def test_attributes_are_kept_with_a_file(pool: Pool) -> None:
    tree = Tree(pool)
    node = write(pool, 1, "f", b"x")
    tree.set_attribute(node, b"user.model", b"llama")
    tree.set_attribute(node, b"user.model", b"llama-8b", must_exist=True)
    write(pool, 1, "g", b"y")
    pool.sync()
    tree.rename(1, "f", 1, "g", replace=True)
    found = tree.lookup(1, "g")
    assert found is not None
    assert tree.attribute(found, b"user.model") == b"llama-8b"
    handle = pool.files.open_write(found, truncate=True)  # new content, the same file
    pool.files.write(handle, 0, b"new")
    pool.files.close_write(handle)
    pool.sync()
    assert tree.attribute_names(found) == [b"user.model"]
    tree.remove_attribute(found, b"user.model")
    with pytest.raises(NoAttributeError):
        tree.attribute(found, b"user.model")


def test_attributes_go_with_a_file_that_is_evicted(pool: Pool) -> None:
    node = write(pool, 1, "f", b"x" * MIB)
    Tree(pool).set_attribute(node, b"user.a", b"1")
    pool.sync()
    assert pool.store.state.names.forget_files(pool.catalog.keys(node.node_id)[:1])
    assert pool.catalog.attribute_names(node.node_id) == []
    assert pool.catalog.check() == []


def test_times_mode_and_owner_are_set(pool: Pool) -> None:
    tree = Tree(pool)
    for node in (write(pool, 1, "f", b"x"), tree.make_directory(1, "space", 0o755, 0, 0)):
        for _ in range(2):  # before it is published, and after
            changed = tree.set_attributes(
                node.node_id, mode=0o4711, uid=5, gid=6, mtime_ns=1_234_567_891
            )
            assert (changed.mode, changed.uid, changed.gid) == (0o4711, 5, 6)
            assert tree.node(node.node_id).mtime_ns == 1_234_567_891
            pool.sync()


# --- retention


def fill(pool: Pool, parent: int, prefix: str, count: int, nbytes: int) -> int:
    """Write files until one is refused; return how many were taken."""
    for number in range(count):
        try:
            write(pool, parent, f"{prefix}{number:03d}", bytes([number]) * nbytes)
        except NoSpaceError:
            return number
        pool.sync()
    return count


@pytest.mark.parametrize("nbytes", [3 * MIB, 6 * MIB])
def test_a_full_pool_drops_whole_files_of_a_cache_oldest_first(pool: Pool, nbytes: int) -> None:
    tree = Tree(pool)
    cache = tree.make_directory(1, "cache", 0o755, 0, 0)
    info = tree.namespace_of(cache)
    assert info is not None
    assert info.retention == "cache"
    count = 3 * 128 * MIB // nbytes
    assert fill(pool, cache.node_id, "f", count, nbytes) == count, "a cache always has room"
    left = names(pool, cache.node_id)
    assert 128 * MIB // nbytes // 2 < len(left) < count
    for name in left:
        node = tree.lookup(cache.node_id, name)
        assert node is not None
        assert content_of(pool, node) == bytes([int(name[1:]) % 256]) * nbytes
    assert left[-1] == f"f{count - 1:03d}"
    assert int(left[0][1:]) >= count // 3, "the oldest went first"


@pytest.mark.parametrize("nbytes", [3 * MIB, 6 * MIB])
def test_a_full_pool_drops_nothing_durable(pool: Pool, nbytes: int) -> None:
    tree = Tree(pool)
    cache = tree.make_directory(1, "cache", 0o755, 0, 0)
    keep = tree.make_directory(1, "keep", 0o755, 0, 0)
    tree.set_retention(keep, "durable")
    info = tree.namespace_of(tree.node(keep.node_id))
    assert info is not None
    assert info.retention == "durable"
    fill(pool, cache.node_id, "c", 10, nbytes)
    taken = fill(pool, keep.node_id, "k", 200, nbytes)
    assert 60 * MIB // nbytes < taken < 200, "a full pool refuses"
    assert names(pool, keep.node_id) == [f"k{number:03d}" for number in range(taken)]
    fill(pool, cache.node_id, "d", 20, nbytes)
    for number in range(taken):
        node = tree.lookup(keep.node_id, f"k{number:03d}")
        assert node is not None
        assert content_of(pool, node) == bytes([number]) * nbytes
